"""A ConvNet's features, forward and back to the images, by hand on the fused operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddfast.engine.chain import Block, Chain
from ddfast.engine.sums import algorithm_of
from ddfast.ops import class_weight_grad as conv
from ddfast.ops import first_block as first
from ddfast.ops import norm_relu_pool as norm
from ddfast.ops import norm_relu_pool_means as means


@dataclass
class Trace:
    """What a forward pass returns, and leaves behind for `backward`."""

    counts: list[int]
    result: Tensor  # of the last block, (N, channels, H, W)
    maps: list[Tensor] = field(default_factory=list)  # (classes, channels, H, W) of each block
    sizes: list[list[int]] = field(default_factory=list)  # planes that enter each block
    outputs: list[Tensor] = field(default_factory=list)  # of each convolution
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def forward(
    chain: Chain, images: Tensor, counts: list[int], algorithm: str, keep: bool, layers: bool
) -> Trace:
    """The last block's result for images that lie class after class; the trace with `keep`."""
    x = images
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    trace = Trace(counts, x)
    for number, block in enumerate(chain.blocks):
        trace.sizes.append(list(x.shape[2:]))
        if block.before is not None:
            scale, shift = block.scale_and_shift()
            x = torch.addcmul(shift, x, scale)
        if number == 0 and not keep and not layers and _recomputes(x, algorithm):
            x = _first_block(block, x)
            continue
        kind = algorithm_of(block, x.shape[2:], algorithm)
        z = conv.class_conv(x, _weight(block), [len(x)], block.padding, kind)
        if block.convolution.bias is not None and block.bias_counts:
            z.add_(block.convolution.bias.detach().view(1, -1, 1, 1))
        settings = block.groups, block.eps, block.activation, block.pool
        if layers:
            found = means.norm_relu_pool_means(z, *block.affine(), counts, *settings)
            x, mean, rstd, of_classes = found
            trace.maps.append(of_classes)
        else:
            x, mean, rstd = norm.norm_relu_pool(z, *block.affine(), *settings)
        if keep:
            trace.outputs.append(z)
            trace.statistics.append((mean, rstd))
    trace.result = x
    return trace


def _recomputes(x: Tensor, algorithm: str) -> bool:
    """Whether the first convolution's result need not be written, and that is faster."""
    few = x.shape[1] <= first.MOST_CHANNELS
    return x.device.type == "cpu" and few and algorithm != "winograd"


def _first_block(block: Block, x: Tensor) -> Tensor:
    bias = block.convolution.bias if block.bias_counts else None
    return first.first_block(
        x,
        block.convolution.weight.detach(),
        None if bias is None else bias.detach(),
        *block.affine(),
        *(block.padding, block.groups, block.eps, block.activation, block.pool),
    )[0]


def _weight(block: Block) -> Tensor:
    return block.convolution.weight.detach().unsqueeze(0)


def backward(
    chain: Chain,
    trace: Trace,
    by_features: Tensor | None,
    by_maps: Sequence[Tensor],
    algorithm: str,
) -> Tensor:
    """Gradient of the images.

    Args:
        by_maps: for every block, (classes, channels, H, W), the cotangent of the activation of each
            image of the class; or none.
    """
    g: Tensor | None = None
    if by_features is not None:
        g = _last(by_features.view(trace.result.shape))
    for number in range(len(chain.blocks) - 1, -1, -1):
        block, z = chain.blocks[number], trace.outputs[number]
        share = by_maps[number] if by_maps else None
        settings = block.groups, block.activation, block.pool
        given = z, *block.affine(), *trace.statistics[number], trace.counts
        found = means.norm_relu_pool_means_bwd(g, share, *given, *settings)
        if found is None:
            continue
        size = trace.sizes[number]
        kind = algorithm_of(block, size, algorithm)
        g = conv.class_input_grad(found[0], _weight(block), [len(z)], size, block.padding, kind)
        if block.before is not None:
            g.mul_(block.scale_and_shift()[0])
    if g is None:
        x = chain.blocks[0].convolution.in_channels, *trace.sizes[0]
        return trace.outputs[0].new_zeros(len(trace.outputs[0]), *x)
    return g


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
