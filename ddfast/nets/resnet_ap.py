"""ResNet-AP as IDC uses it for ImageNet (Kim et al. 2022): average pooling in place of strides."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from ddfast.nets.initialisation import FanOutConv2d
from ddfast.nets.network import Network, Size, at_least
from ddfast.nets.resnet import _norm

#: Blocks of each of the four stages, by depth.
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class Stem(nn.Module):
    """The first convolution, and how much of the plane it keeps: the larger the image, the less."""

    def __init__(self, channels: int, outputs: int, size: Size, norm: str) -> None:
        super().__init__()
        side = min(size)
        kernel, self.pool = (3, 1) if side <= 64 else (3, 2) if side <= 128 else (7, 4)
        self.conv1 = FanOutConv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn1 = _norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        return avg_pool2d(x, self.pool) if self.pool > 1 else x


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; pools by ``pool`` after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, pool: int, norm: str) -> None:
        super().__init__()
        self.conv1 = FanOutConv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = _norm(norm, outputs)
        self.conv2 = FanOutConv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(norm, outputs)
        self.pool = pool
        self.downsample: nn.Sequential | None = None
        if inputs != outputs:
            self.downsample = nn.Sequential(
                FanOutConv2d(inputs, outputs, 1, bias=False),
                nn.AvgPool2d(pool),
                _norm(norm, outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.bn1(self.conv1(x)))
        if self.pool > 1:
            inner = avg_pool2d(inner, self.pool)
        inner = self.bn2(self.conv2(inner))
        return relu(inner + (x if self.downsample is None else self.downsample(x)))


class ResNetAP(Network):
    """A stem, four stages of blocks with 64 to 512 channels, the mean over the plane, ``fc``.

    Parameters ``layer0.conv1``, ``layer0.bn1``, ``layer1.0.conv1``, ...,
    ``layer2.0.downsample.0``, ``layer2.0.downsample.2``, ..., ``fc``, named and shaped as in IDC's
    code; ``bn`` also names instance normalisations. Convolutions have no bias and start as
    N(0, sqrt(2 / (kernel^2 outputs))).

    The stem follows the shorter side: up to 64 pixels a 3x3 convolution, up to 128 the same and 2x2
    pooling, beyond a 7x7 convolution and 4x4 pooling. (IDC's code has a narrower network of the
    same name for CIFAR alone, which this is not.)

    Small images: a stage halves its planes only as long as both sides keep two pixels, as in
    :class:`~ddfast.nets.resnet.ResNet18`; from 16 pixels on this changes nothing.

    Args: as :class:`~ddfast.nets.convnet.ConvNet`; ``norm`` is ``"instancenorm"`` or
    ``"batchnorm"``; ``depth`` 10, 18 or 34.

    Raises:
        ValueError: a side of ``size`` is under 2 pixels, an unknown depth or norm.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        channels: int,
        classes: int,
        size: Size,
        norm: str = "instancenorm",
        depth: int = 10,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        at_least("ResNetAP", size, 2)
        self.layer0 = Stem(channels, 64, size, norm)
        inputs, shorter = 64, min(size) // self.layer0.pool
        for stage, (outputs, blocks) in enumerate(
            zip((64, 128, 256, 512), BLOCKS[depth], strict=True)
        ):
            pool = 2 if stage > 0 and shorter >= 4 else 1
            shorter //= pool
            several = [Block(inputs, outputs, pool, norm)]
            several += [Block(outputs, outputs, 1, norm) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*several))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def embed(self, images: Tensor) -> Tensor:
        x = self.layer0(images)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.mean((2, 3))
