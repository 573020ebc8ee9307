"""Forward, backward, tangent forward and tangent backward of a ConvNet, by hand.

No autograd graph is built. A batch holds images of several segments; they share the network's
weights, and only the sums over images (weight gradients) and the tangents of the weights are
segment by segment. Activations are channels_last on the CPU, where a pixel's channels fill vector
registers, and as torch prefers them elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddfast.engine.chain import Block, Chain
from ddfast.engine.segments import check_labels
from ddfast.engine.sums import (
    algorithm_of,
    collect,
    collect_first,
    collect_rows,
    segment_sum,
    weight_grad_tangent,
)
from ddfast.ops import class_weight_grad as conv
from ddfast.ops import first_block as first
from ddfast.ops import norm_relu_pool as norm


@dataclass
class Trace:
    """What a forward and backward pass leaves behind for the tangents."""

    counts: list[int]
    share: Tensor
    inputs: list[Tensor] = field(default_factory=list)  # of each block
    outputs: list[Tensor] = field(default_factory=list)  # of each convolution
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    features: Tensor | None = None  # (N, width) into the head
    logits: Tensor | None = None
    logits_tangent: Tensor | None = None  # of the last `tangent`
    probabilities: Tensor | None = None
    by_logits: Tensor | None = None
    by_pooled: list[Tensor] = field(default_factory=list)  # cotangent of each block's result
    by_output: list[Tensor] = field(default_factory=list)  # cotangent of each convolution's


def _arguments(block: Block, statistics: tuple[Tensor, Tensor]) -> tuple[object, ...]:
    return (*statistics, block.groups, block.activation, block.pool)


def _spread(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(segments, ...) -> (N, ...): each segment's values for every one of its images."""
    if len(set(counts)) == 1:
        return values.repeat_interleave(counts[0], 0)
    # Not repeat_interleave with a tensor of counts: a copy to the GPU would have to wait.
    return torch.cat([v.expand(n, *v.shape) for v, n in zip(values, counts, strict=True)])


def _weight(block: Block) -> Tensor:
    return block.convolution.weight.detach().unsqueeze(0)


def forward_backward(
    chain: Chain,
    images: Tensor,
    labels: Tensor,
    share: Tensor,
    counts: list[int],
    names: Sequence[str],
    algorithm: str,
    keep: bool,
    recompute: bool = False,
) -> tuple[dict[str, Tensor], Trace]:
    """Weight gradients (segments, *shape) by name; the trace is complete only with `keep`.

    Args:
        labels: (N,) int64, or (N, classes), weights of the classes.
        recompute: not to store what the first convolution gives (not together with `keep`).
    """
    trace = Trace(counts, share)
    everything = [len(images)]
    x = images.detach()
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    for number, block in enumerate(chain.blocks):
        trace.inputs.append(x)
        if recompute and number == 0:
            x, mean, rstd = first.first_block(
                *_first_block(block, x),
                block.padding,
                block.groups,
                block.eps,
                block.activation,
                block.pool,
            )
            trace.outputs.append(x)  # keeps the place
            trace.statistics.append((mean, rstd))
            continue
        kind = algorithm_of(block, x.shape[2:], algorithm)
        z = conv.class_conv(x, _weight(block), everything, block.padding, kind)
        if block.convolution.bias is not None and block.bias_counts:
            z.add_(block.convolution.bias.detach().view(1, -1, 1, 1))
        weight, bias = block.affine()
        x, mean, rstd = norm.norm_relu_pool(
            z, weight, bias, block.groups, block.eps, block.activation, block.pool
        )
        trace.outputs.append(z)
        trace.statistics.append((mean, rstd))
    features = x.flatten(1)
    head = chain.head.weight.detach()
    logits = torch.nn.functional.linear(features, head, chain.head.bias.detach())
    probabilities = logits.softmax(1)
    if labels.is_floating_point():
        trace.share = share * labels.sum(1)
        by_logits = probabilities * trace.share.unsqueeze(1) - labels * share.unsqueeze(1)
    else:
        check_labels(labels, chain.head.out_features)
        by_logits = probabilities.clone()
        by_logits[torch.arange(len(x), device=x.device), labels] -= 1
        by_logits *= share.unsqueeze(1)
    trace.features, trace.logits = features, logits
    trace.probabilities, trace.by_logits = probabilities, by_logits

    found: dict[str, Tensor] = {}
    if f"{chain.head_name}.weight" in names:
        found[f"{chain.head_name}.weight"] = conv.class_weight_grad(
            features, by_logits, counts, [], 0, "auto"
        )
    if f"{chain.head_name}.bias" in names:
        found[f"{chain.head_name}.bias"] = segment_sum(by_logits, counts)
    last = _least_block(chain, names)
    if last is None and not keep:
        return found, trace
    g = (by_logits @ head).view(x.shape)
    if x.device.type == "cpu":
        g = g.contiguous(memory_format=torch.channels_last)
    for number in range(len(chain.blocks) - 1, -1, -1):
        block, x, z = chain.blocks[number], trace.inputs[number], trace.outputs[number]
        mean, rstd = trace.statistics[number]
        if recompute and number == 0:
            collect_first(
                found,
                block,
                names,
                first.first_block_bwd(
                    *(g, *_first_block(block, x), mean, rstd, counts, block.padding, block.groups),
                    block.activation,
                    block.pool,
                ),
                counts,
            )
            break
        weight, bias = block.affine()
        gz, by_scale, by_shift = norm.norm_relu_pool_bwd(
            g, z, weight, bias, mean, rstd, block.groups, block.activation, block.pool
        )
        collect(found, block, names, x, gz, by_scale, by_shift, counts, algorithm)
        if keep:
            trace.by_pooled.insert(0, g)
            trace.by_output.insert(0, gz)
        else:
            trace.outputs.pop()
        if number == 0 or (not keep and last is not None and number <= last):
            break
        size = list(x.shape[2:])
        kind = algorithm_of(block, size, algorithm)
        g = conv.class_input_grad(gz, _weight(block), everything, size, block.padding, kind)
    return found, trace


def _first_block(block: Block, x: Tensor) -> tuple[Tensor | None, ...]:
    """Its tensors; the bias only where it counts."""
    bias = block.convolution.bias if block.bias_counts else None
    weight = block.convolution.weight.detach()
    return x, weight, None if bias is None else bias.detach(), *block.affine()


def _least_block(chain: Chain, names: Sequence[str]) -> int | None:
    """The first block with a wanted parameter."""
    for number, block in enumerate(chain.blocks):
        owned = {f"{block.name}.weight", f"{block.name}.bias"}
        owned |= {f"{block.norm_name}.weight", f"{block.norm_name}.bias"}
        if owned & set(names):
            return number
    return None


def tangent(
    chain: Chain,
    trace: Trace,
    direction: Mapping[str, Tensor],
    algorithm: str,
    by_parameters: dict[str, Tensor] | None = None,
) -> Tensor:
    """d/de of the image gradient when every segment's weights move along its `direction`.

    By the symmetry of second derivatives this is the gradient of <direction, weight gradient> with
    respect to the images. One tangent forward, one tangent backward pass.

    Args:
        trace: complete, of the same images.
        direction: (segments, *shape) by parameter name; missing names do not move.
        by_parameters: to be filled with the same derivative of all weight gradients, of each
            segment, (segments, *shape).
    """
    counts, everything = trace.counts, [len(trace.share)]
    moved: Tensor | None = None  # tangent of the current block's input
    outputs: list[Tensor | None] = []
    inputs: list[Tensor | None] = []
    affine: list[tuple[Tensor | None, Tensor | None]] = []
    for number, block in enumerate(chain.blocks):
        inputs.append(moved if by_parameters is not None else None)
        moved, z_tangent, pair = _block_tangent(block, trace, number, moved, direction, algorithm)
        outputs.append(z_tangent)
        affine.append(pair)

    assert trace.features is not None and trace.by_logits is not None
    head = chain.head.weight.detach()
    p, by_logits = trace.probabilities, trace.by_logits
    assert p is not None
    logits: Tensor | None = None
    if moved is not None:
        logits = moved.flatten(1) @ head.T
    turn = direction.get(f"{chain.head_name}.weight")
    if turn is not None:
        part = conv.class_conv(trace.features, turn, counts, 0, "auto")
        logits = part if logits is None else logits.add_(part)
    shift = direction.get(f"{chain.head_name}.bias")
    if shift is not None:
        part = _spread(shift, counts)
        logits = part if logits is None else logits + part
    if logits is None:
        return torch.zeros_like(trace.inputs[0])
    trace.logits_tangent = logits
    by_logits_tangent = p * (logits - (p * logits).sum(1, keepdim=True))
    by_logits_tangent *= trace.share.unsqueeze(1)
    g_tangent = by_logits_tangent @ head
    if turn is not None:
        g_tangent += conv.class_input_grad(by_logits, turn, counts, [], 0, "auto")
    if by_parameters is not None:
        features = None if moved is None else moved.flatten(1)
        by_parameters[f"{chain.head_name}.weight"] = weight_grad_tangent(
            (trace.features, features), (by_logits, by_logits_tangent), counts, [], 0, "auto"
        )
        by_parameters[f"{chain.head_name}.bias"] = segment_sum(by_logits_tangent, counts)

    g_tangent = g_tangent.view(trace.by_pooled[-1].shape)
    if g_tangent.device.type == "cpu":
        g_tangent = g_tangent.contiguous(memory_format=torch.channels_last)
    for number in range(len(chain.blocks) - 1, -1, -1):
        block = chain.blocks[number]
        z, z_tangent = trace.outputs[number], outputs[number]
        weight, bias = block.affine()
        if z_tangent is None and affine[number] == (None, None):
            gz_tangent, *rows = norm.norm_relu_pool_bwd(
                g_tangent, z, weight, bias, *_arguments(block, trace.statistics[number])
            )
        else:
            gz_tangent, *rows = norm.norm_relu_pool_tangent_bwd(
                trace.by_pooled[number],
                g_tangent,
                z,
                torch.zeros_like(z) if z_tangent is None else z_tangent,
                weight,
                bias,
                *affine[number],
                *_arguments(block, trace.statistics[number]),
            )
        outputs[number] = None
        size = list(trace.inputs[number].shape[2:])
        kind = algorithm_of(block, size, algorithm)
        if by_parameters is not None:
            x = trace.inputs[number], inputs[number]
            gz = trace.by_output[number], gz_tangent
            kernel = list(block.convolution.kernel_size)
            by_parameters[f"{block.name}.weight"] = weight_grad_tangent(
                x, gz, counts, kernel, block.padding, kind
            )
            collect_rows(by_parameters, block, gz_tangent, rows, counts)
            inputs[number] = None
        g_tangent = conv.class_input_grad(
            gz_tangent, _weight(block), everything, size, block.padding, kind
        )
        turn = direction.get(f"{block.name}.weight")
        if turn is not None:
            g_tangent += conv.class_input_grad(
                trace.by_output[number], turn, counts, size, block.padding, kind
            )
    return g_tangent


def _block_tangent(
    block: Block,
    trace: Trace,
    number: int,
    moved: Tensor | None,
    direction: Mapping[str, Tensor],
    algorithm: str,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """Tangents of the block's result and of its convolution's; (N, channels) those of its norm."""
    x, z, counts = trace.inputs[number], trace.outputs[number], trace.counts
    kind = algorithm_of(block, x.shape[2:], algorithm)
    z_tangent: Tensor | None = None
    if moved is not None:
        z_tangent = conv.class_conv(moved, _weight(block), [len(x)], block.padding, kind)
    turn = direction.get(f"{block.name}.weight")
    if turn is not None:
        part = conv.class_conv(x, turn, counts, block.padding, kind)
        z_tangent = part if z_tangent is None else z_tangent.add_(part)
    shift = direction.get(f"{block.name}.bias")
    if shift is not None and block.bias_counts:
        part = _spread(shift, counts)[:, :, None, None]
        z_tangent = (torch.zeros_like(z) if z_tangent is None else z_tangent).add_(part)
    scale_shift = [
        _spread(direction[name], counts) if name in direction else None
        for name in (f"{block.norm_name}.weight", f"{block.norm_name}.bias")
    ]
    pair = (scale_shift[0], scale_shift[1])
    if z_tangent is None and pair == (None, None):
        return None, None, pair
    weight, bias = block.affine()
    out = norm.norm_relu_pool_tangent(
        z,
        torch.zeros_like(z) if z_tangent is None else z_tangent,
        weight,
        bias,
        *pair,
        *_arguments(block, trace.statistics[number]),
    )
    return out, z_tangent, pair
