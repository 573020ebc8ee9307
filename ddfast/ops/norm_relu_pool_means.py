"""Operator `norm_relu_pool_means`: schema, shapes, implementations, derivative.

Its derivative is made of `norm_relu_pool_bwd`, which is linear in the cotangent of the activation,
so that first and second derivatives are right and a third is refused there. `ddfast.layers` checks
what a user passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.ops.norm_relu_pool import (
    COMPILED,
    _empty,
    _fake,
    _flat,
    _pooled_size,
    _readable,
    norm_relu_pool_bwd,
)
from ddfast.ops.registry import TYPES, declare, derivative
from ddfast.reference import norm_relu_pool_means as reference
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import ACTIVATIONS, POOLS, memory_format


def _forward_cpu(
    compiled: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    counts: list[int],
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.dtype not in COMPILED:
        return reference.norm_relu_pool_means(
            x, weight, bias, counts, groups, eps, activation, pool
        )
    x = _readable(x)
    weight, bias = _flat(x, weight), _flat(x, bias)
    out, means = _empty(x, _pooled_size(x, pool)), _empty(x, (len(counts), *x.shape[1:]))
    mean, rstd = x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)
    compiled.norm_relu_pool_means(
        TYPES[x.dtype],
        memory_format(x) is torch.channels_last,
        list(x.shape),
        groups,
        eps,
        ACTIVATIONS.index(activation),
        POOLS.index(pool),
        [0 if t is None else t.data_ptr() for t in (x, weight, bias, mean, rstd, out, means)],
        [0, *itertools.accumulate(counts)],
        torch.get_num_threads(),
    )
    return out, mean, rstd, means


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    counts: list[int],
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], groups, dtype=accumulator(x.dtype))
    means = torch.empty(
        (len(counts), *x.shape[1:]),
        dtype=accumulator(x.dtype),
        device=x.device,
        memory_format=memory_format(x),
    )
    return _fake(x, _pooled_size(x, pool)), statistics, torch.empty_like(statistics), means


norm_relu_pool_means = declare(
    "norm_relu_pool_means(Tensor x, Tensor? weight, Tensor? bias, int[] counts, int groups, "
    "float eps, str activation, str pool) -> (Tensor out, Tensor mean, Tensor rstd, Tensor means)",
    reference=reference.norm_relu_pool_means,
    cpu=_forward_cpu,
    cuda=lambda kernels, *arguments: kernels.norm_relu_pool_means(*arguments),
    fake=_forward_fake,
    kernels="norm_relu_pool_means",
)


def norm_relu_pool_means_bwd(
    by_out: Tensor | None,
    shares: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    counts: Sequence[int],
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients as `norm_relu_pool_bwd` gives them, from the cotangents that there are.

    Args:
        shares: (classes, channels, H, W), what the activation of one image of the class owes to
            the means: their cotangent, divided by the number of images.
    """

    def back(grad: Tensor, pool: str) -> tuple[Tensor, Tensor, Tensor]:
        settings = weight, bias, mean, rstd, groups, activation, pool
        return norm_relu_pool_bwd(grad, x, *settings)

    if shares is None:
        return None if by_out is None else back(by_out, pool)
    over = torch.cat([s.expand(n, *s.shape) for s, n in zip(shares, counts, strict=True)])
    over = over.to(x.dtype)
    if by_out is None:
        return back(over, "none")
    if pool == "max":  # which pixel was the maximum, the operator knows
        first, second = back(over, "none"), back(by_out, pool)
        return first[0] + second[0], first[1] + second[1], first[2] + second[2]
    # `over` is ours alone. Each pixel owes a quarter to its cell's average, or nothing to no cell.
    if pool == "none":
        return back(over.add_(by_out), pool)
    height, width = by_out.shape[2:]
    inside = over[:, :, : 2 * height, : 2 * width]
    cells = inside.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    cells.add_(by_out[:, :, :, None, :, None], alpha=0.25)
    return back(over, "none")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.counts, groups, _, activation, pool = inputs
    _, mean, rstd, _ = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.settings = groups, activation, pool


def _backward(
    ctx: Any,
    by_out: Tensor | None,
    by_mean: Tensor | None,
    by_rstd: Tensor | None,
    by_means: Tensor | None,
) -> tuple[Any, ...]:
    if by_mean is not None or by_rstd is not None:
        raise NotImplementedError("ddfast::norm_relu_pool_means: mean and rstd have no derivative")
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if by_means is not None and ctx.counts:
        sizes = [max(count, 1) for count in ctx.counts]
        by_means = torch.stack([m / n for m, n in zip(by_means.unbind(0), sizes, strict=True)])
    if not ctx.counts:
        by_means = None
    found = norm_relu_pool_means_bwd(
        *(by_out, by_means, x, weight, bias, mean, rstd, ctx.counts), *ctx.settings
    )
    if found is None:
        return (None,) * 8
    by_x, by_weight, by_bias = found
    parameters = [
        row.sum(0).to(p.dtype) if p is not None and needed else None
        for row, p, needed in zip(
            (by_weight, by_bias), (weight, bias), ctx.needs_input_grad[1:3], strict=True
        )
    ]
    return by_x if ctx.needs_input_grad[0] else None, *parameters, *[None] * 5


derivative("norm_relu_pool_means", _backward, _setup)
