"""Operators `trajectory` and `trajectory_distance`: schemas, shapes, implementations, derivatives.

The derivatives are made of plain torch operations on what goes in and comes out, so that every
order is right; they are a small share of the time of anything that needs them. `ddfast.losses`
checks what a user passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops.registry import TYPES, declare, derivative
from ddfast.reference import trajectory as reference
from ddfast.reference.gradient_distance import accumulator


def _call(
    compiled: Any,
    theta: Tensor,
    step: tuple[Tensor, ...],
    start: Tensor,
    target: Tensor,
    out: tuple[Tensor, ...],
    lr: float,
) -> Tensor:
    """Run the compiled kernel; the squares. `step` and `out` are empty where there is no step."""
    addresses = [[x.data_ptr() for x in tensors] or [0, 0] for tensors in (step, out)]
    pointers = [theta.data_ptr(), *addresses[0], start.data_ptr(), target.data_ptr(), *addresses[1]]
    squares = compiled.trajectory(
        TYPES[theta.dtype], theta.numel(), pointers, lr, torch.get_num_threads()
    )
    return torch.tensor(squares, dtype=accumulator(theta.dtype))


# --- one step -----------------------------------------------------------------------------------


def _step_cpu(compiled: Any, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    theta, gradient, total, start, target = (x.contiguous() for x in arguments[:5])
    out = torch.empty_like(theta), torch.empty_like(total)
    rate = arguments[5].item()
    return *out, _call(compiled, theta, (gradient, total), start, target, out, rate)


def _step_fake(
    theta: Tensor, gradient: Tensor, total: Tensor, start: Tensor, target: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return theta.new_empty(theta.shape), total.new_empty(total.shape), total.new_empty(2)


trajectory = declare(
    "trajectory(Tensor theta, Tensor gradient, Tensor total, Tensor start, Tensor target, "
    "Tensor lr) -> (Tensor next, Tensor next_total, Tensor squares)",
    reference=reference.trajectory,
    cpu=_step_cpu,
    cuda=lambda kernels, *arguments: kernels.trajectory(*arguments),
    fake=_step_fake,
    kernels="trajectory",
)


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    theta, gradient, _, start, target, lr = inputs
    ctx.save_for_backward(theta, gradient, start, target, lr)


def _step_backward(ctx: Any, by_next: Tensor, by_total: Tensor, by_squares: Tensor) -> Any:
    theta, gradient, start, target, lr = ctx.saved_tensors
    wide = by_total.dtype
    moved = theta.to(wide) - lr * gradient.to(wide)
    away, begun = (x.to(wide) - target.to(wide) for x in (moved, start))
    by_away, by_begun = 2 * by_squares[0] * away, 2 * by_squares[1] * begun
    by_moved = by_next.to(wide) + by_away
    return (
        by_moved.to(theta.dtype),
        (by_total - lr * by_moved).to(gradient.dtype),
        by_total,
        by_begun.to(start.dtype),
        (-by_away - by_begun).to(target.dtype),
        -(by_moved * gradient.to(wide)).sum(),
    )


derivative("trajectory", _step_backward, _step_setup)


# --- the distances ------------------------------------------------------------------------------


def _distance_cpu(compiled: Any, student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    student, start, target = (x.contiguous() for x in (student, start, target))
    return _call(compiled, student, (), start, target, (), 0.0)


def _distance_fake(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    return student.new_empty(2, dtype=accumulator(student.dtype))


trajectory_distance = declare(
    "trajectory_distance(Tensor student, Tensor start, Tensor target) -> Tensor squares",
    reference=reference.trajectory_distance,
    cpu=_distance_cpu,
    cuda=lambda kernels, *arguments: kernels.trajectory_distance(*arguments),
    fake=_distance_fake,
    kernels="trajectory",
)


def _distance_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _distance_backward(ctx: Any, by_squares: Tensor) -> Any:
    student, start, target = ctx.saved_tensors
    wanted, wide = ctx.needs_input_grad, by_squares.dtype

    def pulled(side: int, x: Tensor) -> Any:
        if not (wanted[side] or wanted[2]):  # where only the student is learned, it is one pass
            return None
        away, factor = x.to(wide) - target.to(wide), 2 * by_squares[side]
        # In place where no graph is recorded of it: half the memory traffic.
        return away * factor if torch.is_grad_enabled() else away.mul_(factor)

    by_student, by_start = pulled(0, student), pulled(1, start)
    return (
        by_student.to(student.dtype) if wanted[0] else None,
        by_start.to(start.dtype) if wanted[1] else None,
        (-by_student - by_start).to(target.dtype) if wanted[2] else None,
    )


derivative("trajectory_distance", _distance_backward, _distance_setup)
