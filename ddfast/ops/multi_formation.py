"""Operators `multi_formation` and `multi_formation_adjoint`: each the other's derivative.

The first is affine in the images, the second linear, so every order of derivative is exact.
ddfast/reference/multi_formation.py has the definition; `ddfast.synthetic` what IDC makes of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import memory
from ddfast.ops.registry import TYPES, declare, derivative
from ddfast.reference import multi_formation as reference


def _check(name: str, x: Tensor, factor: int, order: str, fill: float = 0.0) -> None:
    if x.dim() != 4 or x.dtype not in TYPES:
        raise ValueError(
            f"{name}: got {x.dtype} of shape {tuple(x.shape)}, expected floating point images "
            "(N, channels, height, width)"
        )
    if factor < 1:
        raise ValueError(f"factor: got {factor}, expected at least 1")
    if order not in reference.ORDERS:
        raise ValueError(f"order: got {order!r}, expected 'crop' or 'image'")
    if not math.isfinite(fill):
        raise ValueError(f"fill: got {fill}, expected a finite number")
    if name == "grad" and x.shape[0] % factor**2:
        raise ValueError(
            f"grad: got {x.shape[0]} images, expected a multiple of {factor**2}, the crops of one"
        )


def _run_compiled(
    compiled: Any, x: Tensor, images: int, factor: int, order: str, adjoint: bool, fill: float
) -> Tensor:
    x = x.contiguous()
    shape = (images if adjoint else images * factor**2, *x.shape[1:])
    out = memory.empty(math.prod(shape), x.dtype).view(shape)
    if out.numel():
        compiled.multi_formation(
            x.data_ptr(),
            out.data_ptr(),
            TYPES[x.dtype],
            (images, *x.shape[1:]),
            factor,
            order == "image",
            adjoint,
            fill,
            torch.get_num_threads(),
        )
    return out


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# --- x -> A x + offset --------------------------------------------------------------------------


def _reference(x: Tensor, factor: int, order: str, fill: float) -> Tensor:
    _check("x", x, factor, order, fill)
    return reference.multi_formation(x, factor, order, fill)


def _cpu(compiled: Any, x: Tensor, factor: int, order: str, fill: float) -> Tensor:
    _check("x", x, factor, order, fill)
    if factor == 1:
        return _copy(x)
    return _run_compiled(compiled, x, x.shape[0], factor, order, False, fill)


def _cuda(kernels: Any, x: Tensor, factor: int, order: str, fill: float) -> Any:
    _check("x", x, factor, order, fill)
    return _copy(x) if factor == 1 else kernels.multi_formation(x, factor, order, fill)


def _fake(x: Tensor, factor: int, order: str, fill: float) -> Tensor:
    _check("x", x, factor, order, fill)
    return x.new_empty(x.shape[0] * factor**2, *x.shape[1:])


multi_formation = declare(
    "multi_formation(Tensor x, int factor, str order, float fill) -> Tensor",
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="multi_formation",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor, ctx.order = inputs[1:3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return multi_formation_adjoint(grad, ctx.factor, ctx.order), None, None, None


derivative("multi_formation", _backward, _setup)


# --- g -> A^T g ---------------------------------------------------------------------------------


def _adjoint_reference(grad: Tensor, factor: int, order: str) -> Tensor:
    _check("grad", grad, factor, order)
    return reference.multi_formation_adjoint(grad, factor, order)


def _adjoint_cpu(compiled: Any, grad: Tensor, factor: int, order: str) -> Tensor:
    _check("grad", grad, factor, order)
    if factor == 1:
        return _copy(grad)
    return _run_compiled(compiled, grad, grad.shape[0] // factor**2, factor, order, True, 0.0)


def _adjoint_cuda(kernels: Any, grad: Tensor, factor: int, order: str) -> Any:
    _check("grad", grad, factor, order)
    return _copy(grad) if factor == 1 else kernels.multi_formation_adjoint(grad, factor, order)


def _adjoint_fake(grad: Tensor, factor: int, order: str) -> Tensor:
    _check("grad", grad, factor, order)
    return grad.new_empty(grad.shape[0] // factor**2, *grad.shape[1:])


multi_formation_adjoint = declare(
    "multi_formation_adjoint(Tensor grad, int factor, str order) -> Tensor",
    reference=_adjoint_reference,
    cpu=_adjoint_cpu,
    cuda=_adjoint_cuda,
    fake=_adjoint_fake,
    kernels="multi_formation",
)


def _adjoint_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    return multi_formation(cotangent, ctx.factor, ctx.order, 0.0), None, None


derivative("multi_formation_adjoint", _adjoint_backward, _setup)
