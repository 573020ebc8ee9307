"""Operators `mmd` and `mmd_bandwidth`: schemas, shapes, implementations, the first derivative.

The chain is `mmd` -> `mmd_bwd`, which raises when it is differentiated: a second derivative of the
discrepancy is not implemented. On CPU the value and the gradients that are asked for come from one
pass, and backward hands them over. Sets are (classes, n, d) and (classes, m, d) here;
`ddfast.losses` checks what a user passes and arranges it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops.memory import empty_like
from ddfast.ops.registry import TYPES, declare, derivative, end_of_chain
from ddfast.ops.streamed_bandwidth import mean_distance, median_distance
from ddfast.reference import mmd as reference
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.mmd import KERNELS


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """What is computed and returned in."""
    return accumulator(torch.promote_types(x.dtype, y.dtype))


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in the dtype that is computed in."""
    dtype = _dtype(x, y)
    return x.to(dtype), y.to(dtype)


def _call_compiled(
    compiled: Any,
    what: int,
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor | None = None,
    kernel: str = "linear",
    degree: int = 0,
    unbiased: bool = False,
    scale: Tensor | None = None,
    by_x: Tensor | None = None,
    by_y: Tensor | None = None,
) -> Tensor:
    """Hand both sets to the compiled kernel; what: 0 the distance, 1 the mean, 2 the median."""
    dtype = _dtype(x, y)
    # Rows are read where they lie if their columns are side by side.
    x, y = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (x, y))
    sets = [[t.data_ptr(), TYPES[t.dtype], t.stride(0), t.stride(1), t.shape[1]] for t in (x, y)]
    values = compiled.mmd(
        what,
        *sets,
        dtype == torch.float64,
        x.shape[0],
        x.shape[2],
        KERNELS.index(kernel),
        degree,
        unbiased,
        [] if bandwidths is None else bandwidths.flatten().tolist(),
        0 if bandwidths is None else bandwidths.shape[1],
        [] if scale is None else scale.tolist(),
        0 if by_x is None else by_x.data_ptr(),
        0 if by_y is None else by_y.data_ptr(),
        torch.get_num_threads(),
    )
    return torch.tensor(values, dtype=dtype)


# --- the bandwidth ------------------------------------------------------------------------------


def _bandwidth_reference(x: Tensor, y: Tensor, how: str) -> Tensor:
    return reference.bandwidth(*_wide(x, y), how)


def _bandwidth_cpu(compiled: Any, x: Tensor, y: Tensor, how: str) -> Tensor:
    return _call_compiled(compiled, 1 if how == "mean" else 2, x, y)


def _bandwidth_cuda(kernels: Any, x: Tensor, y: Tensor, how: str) -> Tensor:
    sets = _wide(x, y)
    return mean_distance(*sets) if how == "mean" else median_distance(*sets)


def _bandwidth_fake(x: Tensor, y: Tensor, how: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_dtype(x, y))


# No derivative: a bandwidth is a constant, as published.
mmd_bandwidth = declare(
    "mmd_bandwidth(Tensor x, Tensor y, str how) -> Tensor",
    reference=_bandwidth_reference,
    cpu=_bandwidth_cpu,
    cuda=_bandwidth_cuda,
    fake=_bandwidth_fake,
    kernels="mmd",
)
end_of_chain("mmd_bandwidth", "a bandwidth has no derivative here")


# --- the discrepancy, with its gradients if asked for ------------------------------------------


def _like(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> list[Tensor]:
    """Room for the gradients that are needed."""
    dtype = _dtype(x, y)
    needed = [t for t, need in ((x, need_x), (y, need_y)) if need]
    return [t.new_empty(t.shape, dtype=dtype) for t in needed]


def _reference(
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, list[Tensor]]:
    x, y = _wide(x, y)
    value = reference.mmd(x, y, bandwidths, kernel, degree, unbiased)
    ones = torch.ones_like(value)
    return value, reference.mmd_bwd(
        ones, x, y, bandwidths, kernel, degree, unbiased, need_x, need_y
    )


def _cpu(
    compiled: Any,
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    dtype = _dtype(x, y)
    needed = [t for t, need in ((x, need_x), (y, need_y)) if need]
    out = empty_like([torch.empty(t.shape, dtype=dtype, device="meta") for t in needed])
    by_x, by_y = out[0] if need_x else None, out[-1] if need_y else None
    value = _call_compiled(
        compiled, 0, x, y, bandwidths, kernel, degree, unbiased, scale, by_x, by_y
    )
    return value, out


def _cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.mmd(*arguments)


def _fake(
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(x.shape[0], dtype=_dtype(x, y)), _like(x, y, need_x, need_y)


mmd = declare(
    "mmd(Tensor x, Tensor y, Tensor bandwidths, str kernel, int degree, bool unbiased, "
    "bool need_x, bool need_y) -> (Tensor value, Tensor[] gradients)",
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="mmd",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, y, bandwidths, ctx.kernel, ctx.degree, ctx.unbiased, ctx.has_x, ctx.has_y = inputs
    # The gradients are intermediates of ours, without a derivative of their own.
    ctx.gradients = output[1]
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, bandwidths)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    rest = (None,) * 6
    need_x, need_y = ctx.needs_input_grad[:2]
    if grad is None or not (need_x or need_y):
        return None, None, *rest
    x, y, bandwidths = ctx.saved_tensors
    gradients, ctx.gradients = ctx.gradients, []
    given = dict(zip([n for n in "xy" if getattr(ctx, f"has_{n}")], gradients, strict=False))
    if (
        ("x" in given or not need_x)
        and ("y" in given or not need_y)
        and not torch.is_grad_enabled()
    ):
        # Handed over once, then forgotten: a second backward recomputes, so nobody else holds them.
        found = [_scaled(given[n], grad) for n, need in (("x", need_x), ("y", need_y)) if need]
    else:
        found = mmd_bwd(
            grad, x, y, bandwidths, ctx.kernel, ctx.degree, ctx.unbiased, need_x, need_y
        )
    by_x = found[0].to(x.dtype) if need_x else None
    by_y = found[-1].to(y.dtype) if need_y else None
    return by_x, by_y, *rest


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or grad.device.type != "cpu" or type(grad) is not Tensor:
        return gradient * grad.to(gradient.dtype)[:, None, None]
    for part, factor in zip(gradient, grad.tolist(), strict=True):
        if factor != 1:
            part.mul_(factor)
    return gradient


derivative("mmd", _backward, _setup)


# --- first derivative ---------------------------------------------------------------------------


def _bwd_reference(
    grad: Tensor, x: Tensor, y: Tensor, bandwidths: Tensor, *arguments: Any
) -> list[Tensor]:
    return reference.mmd_bwd(grad, *_wide(x, y), bandwidths, *arguments)


def _bwd_cpu(
    compiled: Any,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    return _cpu(compiled, x, y, bandwidths, kernel, degree, unbiased, need_x, need_y, grad)[1]


def _bwd_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.mmd_bwd(*arguments)


def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    return _like(x, y, need_x, need_y)


mmd_bwd = declare(
    "mmd_bwd(Tensor grad, Tensor x, Tensor y, Tensor bandwidths, str kernel, int degree, "
    "bool unbiased, bool need_x, bool need_y) -> Tensor[]",
    reference=_bwd_reference,
    cpu=_bwd_cpu,
    cuda=_bwd_cuda,
    fake=_bwd_fake,
    kernels="mmd",
)
end_of_chain("mmd_bwd", "the second derivative of mmd is not implemented")
