"""Triton kernels of `trajectory` and `trajectory_distance`: one pass, a pair of sums a program.

The programs' sums are added up in a fixed order afterwards: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator


def block(dtype: torch.dtype) -> int:
    """Elements of a program, as many as leave all values in registers."""
    return 512 if dtype == torch.float64 else 1024


@triton.jit
def trajectory_kernel(
    theta,
    gradient,  # this, total, lr, next and next_total: anything if not STEP
    total,
    start,
    target,
    lr,
    next,
    next_total,
    sums,  # (2, programs)
    size,
    programs,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    here = tl.load(theta + i, mask=inside, other=0.0).to(ACC)
    if STEP:
        g = tl.load(gradient + i, mask=inside, other=0.0).to(ACC)
        before = tl.load(total + i, mask=inside, other=0.0).to(ACC)
        tl.store(next_total + i, before + g, mask=inside)
        here -= tl.load(lr).to(ACC) * g
        tl.store(next + i, here.to(next.dtype.element_ty), mask=inside)
    goal = tl.load(target + i, mask=inside, other=0.0).to(ACC)
    begun = tl.load(start + i, mask=inside, other=0.0).to(ACC)
    a = tl.where(inside, here - goal, 0.0)
    b = tl.where(inside, begun - goal, 0.0)
    tl.store(sums + program, tl.sum(a * a, 0))
    tl.store(sums + programs + program, tl.sum(b * b, 0))


def _launch(
    theta: Tensor, step: tuple[Tensor, ...], start: Tensor, target: Tensor, out: tuple[Tensor, ...]
) -> Tensor:
    """The squares; `step` is (gradient, total, lr) and `out` (next, next_total), or both empty."""
    dtype = accumulator(theta.dtype)
    theta, start, target = (x.contiguous() for x in (theta, start, target))
    size = theta.numel()
    programs = triton.cdiv(size, block(dtype))
    sums = torch.zeros(2, programs, dtype=dtype, device=theta.device)
    gradient, total, lr = (x.contiguous() for x in step) if step else (theta, theta, theta)
    moved, next_total = out or (theta, theta)
    if programs:
        trajectory_kernel[(programs,)](
            *(theta, gradient, total, start, target, lr, moved, next_total, sums),
            size,
            programs,
            STEP=bool(step),
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK=block(dtype),
        )
    return sums.sum(1, dtype=torch.float64).to(dtype)


def trajectory(
    theta: Tensor, gradient: Tensor, total: Tensor, start: Tensor, target: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name; see ddfast/ops/trajectory.py."""
    out = theta.new_empty(theta.shape), total.new_empty(total.shape)
    return *out, _launch(theta, (gradient, total, lr), start, target, out)


def trajectory_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """The operator of the same name."""
    return _launch(student, (), start, target, ())


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    variants: list[tuple[object, dict[str, str], dict[str, object]]] = []
    for dtype, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        types = dict.fromkeys(("theta", "gradient", "start", "target", "next"), f"*{dtype}")
        types |= dict.fromkeys(("total", "lr", "next_total", "sums"), f"*{wide}")
        types |= {"size": "i64", "programs": "i64"}
        acc = tl.float64 if wide == "fp64" else tl.float32
        for step in (False, True):
            size = block(torch.float64 if wide == "fp64" else torch.float32)
            variants.append((trajectory_kernel, types, {"STEP": step, "ACC": acc, "BLOCK": size}))
    return variants
