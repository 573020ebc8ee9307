"""What every network shares: its interface, its normalisations, and the rule for 28x28 digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

Size = tuple[int, int]  # height, width, in pixels


class Network(nn.Module):
    """A classifier in two parts: ``embed``, then one linear layer called ``classifier``.

    Feature matching (DM, CAFE, ...) compares ``embed``; gradient matching and evaluation use the
    logits. ``forward(x)`` is ``classifier(embed(x))`` for every network.

    No network overwrites an activation in place (the official ones do, in their ReLUs).
    Distillation differentiates twice and under ``torch.func`` transforms, where a tensor that is
    still needed must not change, nor may one that a hook has kept.
    """

    if TYPE_CHECKING:  # a layer in some networks, a property that names the last layer in others

        @property
        def classifier(self) -> nn.Linear: ...

    def embed(self, images: Tensor) -> Tensor:
        """Features before the last linear layer.

        Args:
            images: (N, channels, H, W), in the dtype of the parameters.

        Returns:
            (N, features).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define embed(images)")

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: as for :meth:`embed`.

        Returns:
            (N, classes).
        """
        return self.classifier(self.embed(images))


def margin(channels: int, size: Size) -> int:
    """Extra padding of the first convolution, in pixels on each side: 2 for grey 28x28 images.

    It exists to bring 28x28 digits to 32x32, so that they meet the same network as CIFAR. The
    official code adds it to any one-channel input; here other sizes are left alone, where it would
    only surround the picture with zeros (8x8 digits would become 12x12). It differs from the
    official code in its outputs, never in parameter shapes, for grey 32x32 images.
    """
    return 2 if channels == 1 and size == (28, 28) else 0


def normalisation(kind: str, plane: tuple[int, int, int]) -> nn.Module | None:
    """The normalisation layer for activations of shape ``plane`` = (channels, H, W).

    ``"instancenorm"`` is a GroupNorm with one group per channel, as in the DC family: affine, the
    same in training and evaluation, each image independent of its batch. ``"layernorm"`` normalises
    over (channels, H, W) and its affine parameters have that shape. ``"none"`` returns None.
    """
    channels = plane[0]
    if kind == "instancenorm":
        return nn.GroupNorm(channels, channels)
    if kind == "batchnorm":
        return nn.BatchNorm2d(channels)
    if kind == "layernorm":
        return nn.LayerNorm(plane)
    if kind == "groupnorm":
        if channels % 4:
            raise ValueError(
                f"group normalisation has 4 groups: width must be a multiple of 4, got {channels}"
            )
        return nn.GroupNorm(4, channels)
    if kind == "none":
        return None
    raise ValueError(
        "norm must be 'instancenorm', 'batchnorm', 'layernorm', 'groupnorm' or 'none', "
        f"got {kind!r}"
    )


def at_least(network: str, size: Size, least: int, extra: int = 0) -> None:
    """Raise ValueError unless both sides of ``size``, padded by ``extra``, reach ``least``."""
    if min(size) + 2 * extra < least:
        raise ValueError(
            f"{network} halves its planes too often for images of {size[0]}x{size[1]}: "
            f"each side must be at least {least} pixels"
            + (" (or 28x28 with one channel)" if least > 28 else "")
        )
