"""A small class-conditional generator of images, and the discriminator that it is trained against.

In BigGAN's spirit (Brock, Donahue and Simonyan, ICLR 2019): residual blocks, batch normalisation
conditioned on class and latent, spectral normalisation, a discriminator with projection (Miyato and
Koyama, ICLR 2018). Much smaller, though, so that small images take minutes on one core.

Any module can stand in for :class:`Generator`; :func:`ddfast.generator.check_generator` says what
it must be able to do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

__all__ = ["Discriminator", "Generator", "default_latent_dim", "default_width", "folded"]

SMALLEST = 4  # images with a shorter side below this are refused
MOST = 4  # how many times `width` the widest block has

Size = tuple[int, int]


def halvings(size: Size) -> int:
    """How often images of this size are halved: until the shorter side is 4 to 7 pixels."""
    return min(size).bit_length() - 3


def default_width(size: Size) -> int:
    """Channels of the last block: 64 from 28 pixels on, as published; 16, and below 16 pixels 32.

    The last two are for one core, on which a step then costs about the same for 8 and 16 pixels.
    """
    return 64 if min(size) >= 28 else 16 if min(size) >= 16 else 32


def default_latent_dim(size: Size) -> int:
    """128 from 28 pixels on, as published; smaller images have less to say: 64, below 16: 32."""
    return 128 if min(size) >= 28 else 64 if min(size) >= 16 else 32


class Generator(nn.Module):
    """Images of given classes from latents drawn from a standard normal distribution.

    In evaluation mode each image depends on its own latent and label alone, deterministically.

    Args:
        classes, channels, size: of the data set; size is one number for squares or (H, W), each at
            least 4 pixels. Blocks double the plane from 4 to 7 pixels on, and what then sticks out
            is cut off.
        latent_dim: numbers in a latent; None for :func:`default_latent_dim`.
        width: channels of the last block; each block before it has twice as many, up to four times
            this. None for :func:`default_width`. BigGAN calls it G_ch.
        generator: CPU generator for the weights; None stands for a new one with seed 0.
        spectral: spectral normalisation of the weights, for training.

    Raises:
        TypeError, ValueError: a number of the wrong type or out of range; it is named.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        size: int | Sequence[int],
        latent_dim: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        spectral: bool = True,
    ) -> None:
        super().__init__()
        self.recipe: dict[str, Any] = {}
        """How it was made, plain values; filled by `ddfast.generator.load` and by training."""
        self.classes = _positive("classes", classes)
        self.channels = _positive("channels", channels)
        self.size = _plane(size)
        if latent_dim is None:
            latent_dim = default_latent_dim(self.size)
        self.latent_dim = _positive("latent_dim", latent_dim)
        self.width = _positive("width", default_width(self.size) if width is None else width)
        times = halvings(self.size)
        self.base = tuple(-(-side // 2**times) for side in self.size)
        widths = [self.width * min(MOST, 2**left) for left in range(times, -1, -1)]
        condition = 2 * self.latent_dim

        def build() -> None:
            self.embedding = nn.Embedding(self.classes, self.latent_dim)
            self.first = nn.Linear(condition, widths[0] * self.base[0] * self.base[1])
            self.blocks = nn.ModuleList([_Up(a, b, condition) for a, b in pairwise(widths)])
            if not times:  # 4 to 7 pixels: one block without doubling
                self.blocks.append(_Up(widths[0], widths[0], condition, factor=1))
            self.norm = nn.BatchNorm2d(widths[-1])
            self.last = nn.Conv2d(widths[-1], self.channels, 3, padding=1)

        _made(self, build, generator, (nn.Linear, nn.Conv2d) if spectral else ())

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments that make a generator of this shape, as plain values."""
        return {
            "classes": self.classes,
            "channels": self.channels,
            "size": list(self.size),
            "latent_dim": self.latent_dim,
            "width": self.width,
        }

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images in [-1, 1].

        Args:
            latents: floating-point ``(N, latent_dim)``.
            labels: int64 ``(N,)`` in ``[0, classes)``.

        Returns:
            ``(N, channels, H, W)``.

        Raises:
            ValueError: shapes that do not fit.
        """
        if latents.dim() != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}, expected (N, {self.latent_dim})"
            )
        if labels.shape != latents.shape[:1]:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {len(latents)}")
        condition = torch.cat([latents, self.embedding(labels)], 1)
        x = self.first(condition).unflatten(1, (-1, *self.base))
        # oneDNN convolves so about one and a half times as fast.
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, condition)
        x = torch.tanh(self.last(F.relu(self.norm(x))))
        top, left = ((have - want) // 2 for have, want in zip(x.shape[2:], self.size, strict=True))
        return x[:, :, top : top + self.size[0], left : left + self.size[1]]


class Discriminator(nn.Module):
    """How real images of given classes look: large for real ones, small for generated ones.

    Args:
        classes, channels, size, generator: as in :class:`Generator`.
        width: channels of the first block; each block after it has twice as many, up to four times
            this. BigGAN calls it D_ch.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        size: int | Sequence[int],
        width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        plane = _plane(size)
        width = _positive("width", default_width(plane) if width is None else width)
        times = halvings(plane)
        widths = [width * min(MOST, 2**done) for done in range(times + 1)]

        def build() -> None:
            down = [
                _Down(a, b, first=place == 0)
                for place, (a, b) in enumerate(
                    zip([channels, *widths[:-2]], widths[:-1], strict=False)
                )
            ]
            # The last block keeps its plane.
            last = _Down(widths[-2] if times else channels, widths[-1], first=not times, factor=1)
            self.blocks = nn.ModuleList([*down, last])
            self.score = nn.Linear(widths[-1], 1)
            self.embedding = nn.Embedding(classes, widths[-1])

        _made(self, build, generator, (nn.Linear, nn.Conv2d, nn.Embedding))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """A score for each image.

        Args:
            images: floating-point ``(N, channels, H, W)``.
            labels: int64 ``(N,)`` in ``[0, classes)``.

        Returns:
            ``(N,)``, in the dtype of the images.
        """
        x = images.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        features = F.relu(x).sum((2, 3))
        return self.score(features)[:, 0] + (self.embedding(labels) * features).sum(1)


class _ConditionalNorm(nn.Module):
    """Batch normalisation with a scale and a shift for each image, linear in its condition."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale_shift = nn.Linear(condition, 2 * channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.scale_shift(condition)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class _Up(nn.Module):
    """A residual block that enlarges its plane by `factor`."""

    def __init__(self, inputs: int, outputs: int, condition: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.norm1 = _ConditionalNorm(inputs, condition)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _ConditionalNorm(outputs, condition)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y = self.conv1(self._enlarged(F.relu(self.norm1(x, condition))))
        y = self.conv2(F.relu(self.norm2(y, condition)))
        # A convolution of one pixel commutes with the enlargement, and costs a quarter before it.
        return y + self._enlarged(self.shortcut(x))

    def _enlarged(self, x: Tensor) -> Tensor:
        if self.factor == 1:
            return x
        return F.interpolate(x, scale_factor=self.factor, mode="nearest")


class _Down(nn.Module):
    """A residual block that shrinks its plane by `factor`; odd rows and columns are dropped."""

    def __init__(self, inputs: int, outputs: int, first: bool, factor: int = 2) -> None:
        super().__init__()
        self.first, self.factor = first, factor
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        # No ReLU before the first convolution: it would cut off half of the image.
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.factor > 1:
            x, y = F.avg_pool2d(x, self.factor), F.avg_pool2d(y, self.factor)
        return y + self.shortcut(x)


class _SpectralNorm(nn.Module):
    """A weight, as a matrix with a row an output, divided by its largest singular value.

    In training every use of the weight is one step of the power method, as in
    `torch.nn.utils.parametrizations.spectral_norm`. That one draws from the global generator, and
    on the meta device takes a third of a second for a small network.

    Attributes:
        left, right: estimates of the singular vectors.
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows = weight.flatten(1).shape[0]
        self.register_buffer("left", F.normalize(torch.randn(rows, generator=generator), dim=0))
        self.register_buffer("right", weight.new_zeros(weight[0].numel()))
        self._step(weight.detach().flatten(1))

    def _step(self, matrix: Tensor) -> None:
        # New tensors: a graph may hold the old ones.
        self.right = F.normalize(self.left @ matrix, dim=0)
        self.left = F.normalize(matrix @ self.right, dim=0)

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                self._step(matrix)
        return weight / torch.dot(self.left, matrix @ self.right)


@torch.no_grad()
def folded(generator: Generator) -> Generator:
    """The same generator with the normalised weights in place of the spectral normalisation."""
    state = generator.state_dict()
    for path, module in generator.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            start = f"{path}.parametrizations.weight."
            # To the end of the power method: the average of the weights has none of its own.
            weight = state[f"{start}original"]
            largest = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
            state = {name: value for name, value in state.items() if not name.startswith(start)}
            state[f"{path}.weight"] = weight / largest
    plain = Generator(**generator.architecture, spectral=False)
    plain = plain.to(generator.embedding.weight)
    plain.load_state_dict(state)
    plain.recipe = dict(generator.recipe)
    return plain.train(generator.training)


def _made(
    net: nn.Module,
    build: Callable[[], None],
    generator: torch.Generator | None,
    spectral: tuple[type[nn.Module], ...],
) -> None:
    """Build the layers of `net` and draw their weights from `generator` alone.

    PyTorch's constructors draw from the global generator, except on the meta device, which has no
    numbers to draw.
    """
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.device("meta"):
        build()
    net.to_empty(device="cpu")
    for module in list(net.modules()):
        with torch.no_grad():
            _draw(module, generator, orthogonal=isinstance(module, spectral))
        if isinstance(module, spectral):
            weight: Any = module.weight
            normalisation = _SpectralNorm(weight, generator)
            parametrize.register_parametrization(module, "weight", normalisation)


def _draw(module: nn.Module, generator: torch.Generator, orthogonal: bool) -> None:
    """Orthogonal weights as in BigGAN, zero biases, standard normal embeddings for latents."""
    if isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()
    elif isinstance(module, nn.Embedding) and not orthogonal:
        module.weight.normal_(generator=generator)
    elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        nn.init.orthogonal_(module.weight, generator=generator)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        module.bias.zero_()


def _positive(argument: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: got {value!r}, expected an integer") from None
    if number < 1:
        raise ValueError(f"{argument}: got {number}, expected at least 1")
    return number


def _plane(size: int | Sequence[int]) -> Size:
    sides = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size: got {size}, expected one integer or (H, W)")
    height, width = (_positive("size", side) for side in sides)
    if min(height, width) < SMALLEST:
        raise ValueError(f"size: got {height}x{width}, expected at least {SMALLEST} pixels a side")
    return height, width
