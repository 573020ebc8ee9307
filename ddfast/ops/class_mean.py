"""Operators `class_mean` and `class_mean_distance`: schemas, shapes, implementations, derivatives.

A family that is closed under differentiation: `class_mean` and `class_mean_bwd` are each other's
derivative, and the distance's derivative is made of them and of the difference it returns. So every
order is right. Features are (classes, rows, width) with no counts, or (rows of all classes, width)
with them; the gradient of the 3-D form is an expanded view, which nobody writes out.
`ddfast.losses` checks what a user passes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ddfast.layout import readable
from ddfast.ops.registry import TYPES, declare, derivative
from ddfast.reference import class_mean as reference
from ddfast.reference.gradient_distance import accumulator


def _classes(x: Tensor, counts: list[int]) -> int:
    return x.shape[0] if x.dim() == 3 else len(counts)


def _described(x: Tensor, counts: list[int]) -> tuple[list[int], list[int]]:
    """What the compiled kernel reads: (address, type, strides, rows), first row of each class."""
    if x.dim() == 3:
        return [x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(1), x.shape[1]], []
    return [x.data_ptr(), TYPES[x.dtype], 0, x.stride(0), 0], [0, *itertools.accumulate(counts)]


def _over_rows(share: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Each class's share, (classes, width), for every one of its rows, without writing them out."""
    return share.to(dtype).unsqueeze(1).expand(-1, rows, -1)


# --- the mean ---------------------------------------------------------------------------------


def _mean_cpu(compiled: Any, x: Tensor, counts: list[int]) -> Tensor:
    x = readable(x)
    out = torch.empty(_classes(x, counts), x.shape[-1], dtype=accumulator(x.dtype))
    compiled.class_mean(*_described(x, counts), [], [], *_sizes(out), 0, torch.get_num_threads())
    return out


def _sizes(out: Tensor) -> tuple[bool, int, int, int]:
    """What the compiled kernel writes: (in double, classes, width, address)."""
    return out.dtype == torch.float64, out.shape[0], out.shape[1], out.data_ptr()


def _mean_cuda(kernels: Any, x: Tensor, counts: list[int]) -> Any:
    return kernels.class_mean(x, counts)


def _mean_fake(x: Tensor, counts: list[int]) -> Tensor:
    return x.new_empty(_classes(x, counts), x.shape[-1], dtype=accumulator(x.dtype))


class_mean = declare(
    "class_mean(Tensor x, int[] counts) -> Tensor",
    reference=reference.class_mean,
    cpu=_mean_cpu,
    cuda=_mean_cuda,
    fake=_mean_fake,
    kernels="class_mean",
)


def _mean_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.counts = inputs
    ctx.rows, ctx.dtype = x.shape[1] if x.dim() == 3 else None, x.dtype


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.rows is None:
        return class_mean_bwd(grad, ctx.counts, ctx.dtype), None
    return _over_rows(grad / ctx.rows, ctx.rows, ctx.dtype), None


derivative("class_mean", _mean_backward, _mean_setup)


# --- its derivative with respect to rows of uneven classes ---------------------------------------


def _bwd_fake(grad: Tensor, counts: list[int], dtype: torch.dtype) -> Tensor:
    return grad.new_empty(sum(counts), grad.shape[1], dtype=dtype)


class_mean_bwd = declare(
    "class_mean_bwd(Tensor grad, int[] counts, ScalarType dtype) -> Tensor",
    reference=reference.class_mean_bwd,
    cpu=None,
    cuda=None,
    fake=_bwd_fake,
)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.counts = inputs[1]


def _bwd_backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    return class_mean(cotangent, ctx.counts), None, None


derivative("class_mean_bwd", _bwd_backward, _bwd_setup)


# --- the distance -------------------------------------------------------------------------------


def _distance_cpu(
    compiled: Any, syn: Tensor, real: Tensor, syn_counts: list[int], real_counts: list[int]
) -> tuple[Tensor, Tensor]:
    syn, real = readable(syn), readable(real)
    dtype = accumulator(torch.promote_types(syn.dtype, real.dtype))
    difference = torch.empty(_classes(syn, syn_counts), syn.shape[-1], dtype=dtype)
    distance = torch.empty(difference.shape[0], dtype=dtype)
    compiled.class_mean(
        *_described(syn, syn_counts),
        *_described(real, real_counts),
        *_sizes(difference),
        distance.data_ptr(),
        torch.get_num_threads(),
    )
    return distance, difference


def _distance_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.class_mean_distance(*arguments)


def _distance_fake(
    syn: Tensor, real: Tensor, syn_counts: list[int], real_counts: list[int]
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(torch.promote_types(syn.dtype, real.dtype))
    classes = _classes(syn, syn_counts)
    return syn.new_empty(classes, dtype=dtype), syn.new_empty(classes, syn.shape[-1], dtype=dtype)


class_mean_distance = declare(
    "class_mean_distance(Tensor syn, Tensor real, int[] syn_counts, int[] real_counts) "
    "-> (Tensor distance, Tensor difference)",
    reference=reference.class_mean_distance,
    cpu=_distance_cpu,
    cuda=_distance_cuda,
    fake=_distance_fake,
    kernels="class_mean",
)


def _distance_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    syn, real, *ctx.counts = inputs
    ctx.rows = [x.shape[1] if x.dim() == 3 else None for x in (syn, real)]
    ctx.dtypes = syn.dtype, real.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _distance_backward(
    ctx: Any, grad: Tensor | None, grad_difference: Tensor | None
) -> tuple[Any, ...]:
    (difference,) = ctx.saved_tensors

    def gradient(side: int, sign: int) -> Tensor | None:
        if not ctx.needs_input_grad[side] or (grad is None and grad_difference is None):
            return None
        rows = ctx.rows[side]
        factor = sign if rows is None else sign / rows
        by_mean: Any = 0
        if grad is not None:
            by_mean = (2 * factor * grad).unsqueeze(1) * difference
        if grad_difference is not None:
            by_mean = by_mean + factor * grad_difference
        if rows is None:
            return class_mean_bwd(by_mean, ctx.counts[side], ctx.dtypes[side])
        return _over_rows(by_mean, rows, ctx.dtypes[side])

    return gradient(0, 1), gradient(1, -1), None, None


derivative("class_mean_distance", _distance_backward, _distance_setup)
