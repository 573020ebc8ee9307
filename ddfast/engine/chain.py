"""A ConvNet as a chain of fused steps, and how many of its images fit where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddfast.nets.convnet import ConvNet
from ddfast.nets.frepo import FRePoNet

ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Sigmoid: "sigmoid", nn.SiLU: "swish"}
POOLS = {nn.AvgPool2d: "average", nn.MaxPool2d: "max"}


@dataclass
class Block:
    """A convolution, its normalisation (groups 0: none), activation and pooling.

    Batch normalisation with running statistics may stand `before` the convolution.
    """

    name: str
    convolution: nn.Conv2d
    norm_name: str = ""
    norm: nn.GroupNorm | None = None
    activation: str = ""
    pool: str = "none"
    before: nn.BatchNorm2d | None = None

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What `before` does to each channel, (channels, 1, 1) each, outside any graph."""
        norm = self.before
        assert norm is not None and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias.detach() - scale * norm.running_mean
        return scale.view(-1, 1, 1), shift.view(-1, 1, 1)

    @property
    def groups(self) -> int:
        return 0 if self.norm is None else self.norm.num_groups

    @property
    def eps(self) -> float:
        return 0.0 if self.norm is None else self.norm.eps

    @property
    def padding(self) -> int:
        return int(self.convolution.padding[0])

    @property
    def bias_counts(self) -> bool:
        """Whether the convolution's bias changes anything: instance norm subtracts it again."""
        return self.groups != self.convolution.out_channels

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The norm's weight and bias, outside any graph."""
        if self.norm is None or self.norm.weight is None:
            return None, None
        return self.norm.weight.detach(), self.norm.bias.detach()


@dataclass
class Chain:
    """Blocks from the image on, then one linear layer."""

    blocks: list[Block]
    head_name: str
    head: nn.Linear

    def elements(self, image: tuple[int, ...]) -> tuple[int, int]:
        """Numbers an image leaves behind: all convolutions' outputs; all blocks' inputs."""
        planes, _ = self.shapes(image)
        inputs = image[0] * image[-2] * image[-1]
        for block, (channels, height, width) in zip(self.blocks, planes, strict=True):
            cell = 1 if block.pool == "none" else 2
            inputs += channels * (height // cell) * (width // cell)
        return sum(channels * height * width for channels, height, width in planes), inputs

    def shapes(self, image: tuple[int, ...]) -> tuple[list[tuple[int, int, int]], int]:
        """(channels, H, W) of every convolution's output; how many features an image has."""
        found = []
        channels, height, width = image
        for block in self.blocks:
            tall, wide = block.convolution.kernel_size
            channels = block.convolution.out_channels
            height += 2 * block.padding - tall + 1
            width += 2 * block.padding - wide + 1
            found.append((channels, height, width))
            if block.pool != "none":
                height, width = height // 2, width // 2
        return found, channels * height * width


def recognise(net: nn.Module, frozen_norms: bool = False) -> Chain | None:
    """The network as a chain, or None if it is not one that the fused operators can serve.

    They serve :class:`ddfast.nets.convnet.ConvNet` itself, not a class derived from it, with
    instance, group or no normalisation, in float32 or float64, without hooks; and FRePoNet without
    normalisation.

    Args:
        frozen_norms: whether the caller knows what to do with a block's `before`, which FRePoNet
            has with batch normalisation; in evaluation mode, so that images stay independent.
    """
    if type(net) not in (ConvNet, FRePoNet) or {"embed", "forward"} & net.__dict__.keys():
        return None
    if any(_hooked(module) for module in net.modules()):
        return None
    if {p.dtype for p in net.parameters()} not in ({torch.float32}, {torch.float64}):
        return None
    blocks: list[Block] = []
    before: nn.BatchNorm2d | None = None
    features: nn.Sequential = net.features  # type: ignore[assignment]
    for number, layer in features.named_children():
        name = f"features.{number}"
        if isinstance(layer, nn.Conv2d):
            blocks.append(Block(name, layer, before=before))
            before = None
        elif isinstance(layer, nn.GroupNorm) and type(net) is ConvNet:
            blocks[-1].norm_name, blocks[-1].norm = name, layer
        elif type(layer) in ACTIVATIONS:
            blocks[-1].activation = ACTIVATIONS[type(layer)]
        elif type(layer) in POOLS:
            blocks[-1].pool = POOLS[type(layer)]
        elif frozen_norms and type(net) is FRePoNet and isinstance(layer, nn.BatchNorm2d):
            if layer.training:
                return None
            before = layer
        else:
            return None
    return Chain(blocks, "classifier", net.classifier)  # type: ignore[arg-type]


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
