"""Operators `characteristic_function` and its first derivative; the chain ends there.

Features are (classes, rows, width), frequencies (classes or 1, count, width), or None where they
are drawn inside the kernel. The forward also returns the products <x, t> if they are to be kept:
with them the backward need not compute them again. ddfast/reference/characteristic_function.py has
the definition; `ddfast.losses` checks what a user passes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddfast.layout import readable
from ddfast.ops import memory
from ddfast.ops.registry import TYPES, declare, derivative, end_of_chain
from ddfast.reference import characteristic_function as reference
from ddfast.reference.characteristic_function import wide_dtype


def _described(x: Tensor | None) -> list[int]:
    """What the compiled kernel reads: address, type, size of an element, strides."""
    if x is None:
        return []
    by_class = x.stride(0) if x.shape[0] > 1 else 0
    return [x.data_ptr(), TYPES[x.dtype], x.element_size(), by_class, x.stride(1)]


def _count(t: Tensor | None, count: int) -> int:
    return count if t is None else t.shape[1]


def _sizes(x: Tensor, t: Tensor | None, count: int) -> list[int]:
    """Classes, rows, frequencies, features, and whether the classes share the frequencies."""
    return [*x.shape[:2], count, x.shape[2], t is not None and t.shape[0] == 1]


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return memory.empty(math.prod(shape), dtype).view(shape)


# --- the mean of exp(j <t, x>) ------------------------------------------------------------------


def _cpu(
    compiled: Any,
    x: Tensor,
    t: Tensor | None,
    count: int,
    seed: int,
    scale: float,
    stream: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x, t = readable(x), None if t is None else readable(t)
    dtype, count = wide_dtype(x, t), _count(t, count)
    phi = torch.empty(x.shape[0], count, 2, dtype=dtype)
    phase = _empty(dtype, x.shape[0], x.shape[1], count) if keep else torch.empty(0, dtype=dtype)
    if phi.numel():
        compiled.characteristic_function(
            _described(x),
            _described(t),
            dtype == torch.float64,
            _sizes(x, t, count),
            seed,
            stream,
            scale,
            phase.data_ptr() if keep else 0,
            [phi.data_ptr()],
            torch.get_num_threads(),
        )
    return phi, phase


def _cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.characteristic_function(*arguments)


def _fake(
    x: Tensor, t: Tensor | None, count: int, seed: int, scale: float, stream: int, keep: bool
) -> tuple[Tensor, Tensor]:
    dtype, count = wide_dtype(x, t), _count(t, count)
    phi = x.new_empty(x.shape[0], count, 2, dtype=dtype)
    if keep:
        return phi, x.new_empty(x.shape[0], x.shape[1], count, dtype=dtype)
    return phi, x.new_empty(0, dtype=dtype)


characteristic_function = declare(
    "characteristic_function(Tensor x, Tensor? t, SymInt count, SymInt seed, float scale, "
    "SymInt stream, bool keep) -> (Tensor phi, Tensor phase)",
    reference=reference.characteristic_function,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="characteristic_function",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, t, *ctx.drawn, _ = inputs
    # The products are an intermediate of ours: nobody differentiates them.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, t, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    rest = (None,) * 5
    if grad is None:
        return None, None, *rest
    x, t, phase = ctx.saved_tensors
    need_x, need_t = ctx.needs_input_grad[0], t is not None and ctx.needs_input_grad[1]
    by_x, by_t = characteristic_function_bwd(grad, x, t, phase, *ctx.drawn, need_x, need_t)
    return by_x if need_x else None, by_t if need_t else None, *rest


derivative("characteristic_function", _backward, _setup)


# --- its derivative -----------------------------------------------------------------------------


def _bwd_cpu(
    compiled: Any,
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    phase: Tensor,
    count: int,
    seed: int,
    scale: float,
    stream: int,
    by_x: bool,
    by_t: bool,
) -> tuple[Tensor, Tensor]:
    dtype, count = wide_dtype(x, t), _count(t, count)
    of_x, of_t = x.dtype, dtype if t is None else t.dtype
    x, t, grad = readable(x), None if t is None else readable(t), grad.contiguous()
    grad_x = _empty(dtype, *x.shape) if by_x else torch.empty(0, dtype=dtype)
    grad_t = _empty(dtype, *t.shape) if by_t and t is not None else torch.empty(0, dtype=dtype)
    if 0 in (*x.shape, count):
        grad_x.zero_()
        grad_t.zero_()
    else:
        compiled.characteristic_function(
            _described(x),
            _described(t),
            dtype == torch.float64,
            _sizes(x, t, count),
            seed,
            stream,
            scale,
            phase.data_ptr() if phase.numel() else 0,
            [grad.data_ptr(), grad_x.data_ptr() if by_x else 0, grad_t.data_ptr() if by_t else 0],
            torch.get_num_threads(),
        )
    return grad_x.to(of_x), grad_t.to(of_t)


def _bwd_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.characteristic_function_bwd(*arguments)


def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    phase: Tensor,
    count: int,
    seed: int,
    scale: float,
    stream: int,
    by_x: bool,
    by_t: bool,
) -> tuple[Tensor, Tensor]:
    of_t = wide_dtype(x, None) if t is None else t.dtype
    return (
        x.new_empty(x.shape if by_x else 0),
        x.new_empty(t.shape if by_t and t is not None else 0, dtype=of_t),
    )


characteristic_function_bwd = declare(
    "characteristic_function_bwd(Tensor grad, Tensor x, Tensor? t, Tensor phase, SymInt count, "
    "SymInt seed, float scale, SymInt stream, bool by_x, bool by_t) -> (Tensor, Tensor)",
    reference=reference.characteristic_function_bwd,
    cpu=_bwd_cpu,
    cuda=_bwd_cuda,
    fake=_bwd_fake,
    kernels="characteristic_function",
)
end_of_chain("characteristic_function_bwd", "a second derivative is not supported")
