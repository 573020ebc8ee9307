"""ConvNet-D, the network of the dataset distillation literature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddfast.layers import norm_relu_pool
from ddfast.nets.fusion import can_fuse
from ddfast.nets.network import Network, Size, margin, normalisation


class ConvNet(Network):
    """Blocks of 3x3 convolution, normalisation, activation and 2x2 pooling, then one linear layer.

    Zhao, Mopuri and Bilen, Dataset Condensation with Gradient Matching, ICLR 2021, after Gidaris
    and Komodakis 2018. The convolutions have biases, whatever the normalisation. Parameter names
    and order are those of the official checkpoints: ``features.<i>.weight``, ``.bias``, ...,
    ``classifier.weight``, ``classifier.bias``. Pooling drops the last row or column of an odd
    plane; the linear layer has the size that is left.

    Normalisation, activation and pooling of a block run as one operator, `layers.norm_relu_pool`,
    where it serves (see `ddfast.nets.fusion`); else, and with ``net.fused = False``, layer by
    layer. The operator has first and second derivatives, the layers have all.

    Args:
        channels: of the images.
        classes: number of logits.
        size: (H, W) of the images, in pixels.
        depth: number of blocks.
        width: channels of every block.
        norm: ``"instancenorm"``, ``"batchnorm"``, ``"layernorm"``, ``"groupnorm"`` (4 groups) or
            ``"none"``.
        activation: ``"relu"``, ``"leakyrelu"`` (slope 0.01), ``"sigmoid"`` or ``"swish"``
            (x * sigmoid(x)).
        pooling: ``"avgpooling"``, ``"maxpooling"`` or ``"none"``.
        prepended: one more block without pooling in front, as KIP's ConvNet has it (Nguyen et al.,
            NeurIPS 2021).

    Raises:
        ValueError: an unknown setting; a depth that would pool the image away; a width that 4
            groups do not divide; instance normalisation of single pixels, which is constant.
    """

    classifier: nn.Linear
    fused = True

    def __init__(
        self,
        channels: int,
        classes: int,
        size: Size,
        depth: int = 3,
        width: int = 128,
        norm: str = "instancenorm",
        activation: str = "relu",
        pooling: str = "avgpooling",
        prepended: bool = False,
    ) -> None:
        super().__init__()
        extra = margin(channels, size)
        height, side = size[0] + 2 * extra, size[1] + 2 * extra
        deepest = min(height, side).bit_length() - 1
        if pooling != "none" and depth > deepest:
            raise ValueError(
                f"depth {depth} is too deep for images of {size[0]}x{size[1]}: each block halves "
                f"the plane, so the maximum depth is {deepest} (or do without pooling: NP)"
            )
        if norm == "instancenorm" and height * side == 1:
            raise ValueError("instance normalisation of a 1x1 plane is constant: use another norm")
        layers: list[nn.Module] = []
        kinds = ["none"] * prepended + [pooling] * depth
        for block, kind in enumerate(kinds):
            inputs, padding = (width, 1) if block else (channels, 1 + extra)
            layers.append(nn.Conv2d(inputs, width, 3, padding=padding))
            layers.extend(_some(normalisation(norm, (width, height, side))))
            layers.append(_activation(activation))
            layers.extend(_some(_pooling(kind)))
            if kind != "none":
                height, side = height // 2, side // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * height * side, classes)

    def embed(self, images: Tensor) -> Tensor:
        blocks = _blocks(self.features) if self.fused else None
        if not blocks or not can_fuse(images, self.features, _values(images, blocks[0])):
            return self.features(images).flatten(1)
        x = images
        if images.device.type == "cpu":
            x = images.contiguous(memory_format=torch.channels_last)  # the fastest for both
        for block in blocks:
            x = block(x)
        return x.flatten(1)


class _Block(NamedTuple):
    """A convolution and the settings of what follows it."""

    convolution: nn.Conv2d
    norm: nn.GroupNorm | None
    activation: str
    pool: str

    def __call__(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        if self.norm is None:
            return norm_relu_pool(x, activation=self.activation, pool=self.pool)
        norm = self.norm
        return norm_relu_pool(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, self.activation, self.pool
        )


def _values(images: Tensor, block: _Block) -> int:
    """How many values the block's convolution returns; it keeps the plane, or adds a margin."""
    return images.shape[0] * block.convolution.out_channels * images.shape[2:].numel()


def _blocks(features: nn.Sequential) -> list[_Block] | None:
    """The blocks of a chain of layers; None unless `norm_relu_pool` computes all of it."""
    blocks: list[_Block] = []
    layers = list(features)
    while layers:
        convolution = layers.pop(0)
        norm, activation, pool, used = after_convolution(layers)
        del layers[:used]
        if type(convolution) is not nn.Conv2d or activation is None:
            return None
        blocks.append(_Block(convolution, norm, activation, pool))
    return blocks


def after_convolution(
    layers: Sequence[nn.Module],
) -> tuple[nn.GroupNorm | None, str | None, str, int]:
    """What `norm_relu_pool` can do of the layers behind a convolution.

    Returns:
        The norm, or None; the name of the activation, or None if there is none that it knows; of
        the pooling; and how many layers these are.
    """
    norm, pool, used = None, "none", 0
    if layers and type(layers[0]) is nn.GroupNorm:
        norm, used = layers[0], 1
    activation = _ACTIVATIONS.get(type(layers[used])) if len(layers) > used else None
    used += 1
    if len(layers) > used and type(layers[used]) in _POOLS:
        pool, used = _POOLS[type(layers[used])], used + 1
    return norm, activation, pool, used


# As this file makes them: the slope of LeakyReLU and the size of the cells are fixed.
_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "swish",
}
_POOLS: dict[type, str] = {nn.AvgPool2d: "average", nn.MaxPool2d: "max"}


def _some(layer: nn.Module | None) -> list[nn.Module]:
    return [] if layer is None else [layer]


def _activation(kind: str) -> nn.Module:
    if kind == "relu":
        return nn.ReLU()
    if kind == "leakyrelu":
        return nn.LeakyReLU(0.01)
    if kind == "sigmoid":
        return nn.Sigmoid()
    if kind == "swish":
        return nn.SiLU()
    raise ValueError(f"activation must be 'relu', 'leakyrelu', 'sigmoid' or 'swish', got {kind!r}")


def _pooling(kind: str) -> nn.Module | None:
    if kind == "avgpooling":
        return nn.AvgPool2d(2)
    if kind == "maxpooling":
        return nn.MaxPool2d(2)
    if kind == "none":
        return None
    raise ValueError(f"pooling must be 'avgpooling', 'maxpooling' or 'none', got {kind!r}")
