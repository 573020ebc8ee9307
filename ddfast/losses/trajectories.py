"""How far a student ends from an expert's parameters: MTT, TESLA, FTD, DATM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.losses.dtypes import FLOATS
from ddfast.ops import trajectory as ops
from ddfast.ops.registry import refuse_transforms

Parameters = Tensor | Sequence[Tensor]


def trajectory_distance(student: Parameters, start: Parameters, target: Parameters) -> Tensor:
    """|student - target|^2 / |start - target|^2 (Cazenavette et al., CVPR 2022, eq. 3).

    1 means that the student came no nearer to the expert's later parameters than it began. Both
    sums are made in one pass over memory. The slow equivalent is
    `(student - target).square().sum() / (start - target).square().sum()`. Derivatives of every
    order, with respect to all three.

    Args:
        student: parameters after training, a flat tensor or one for each parameter. float32,
            float64, bfloat16 or float16; half types are subtracted and summed in float32.
        start: those that the training began with, in the same shapes.
        target: the expert's, in the same shapes.

    Returns:
        0-d; float64 for float64, else float32.

    Raises:
        TypeError: what is given are no floating-point tensors, or of several dtypes.
        ValueError: shapes or devices that differ; on a CPU, also start equal to target.
    """
    lists = {
        name: _tensors(name, value)
        for name, value in (("student", student), ("start", start), ("target", target))
    }
    first = lists["student"][0]
    for name, tensors in lists.items():
        shapes = [tuple(x.shape) for x in tensors]
        expected = [tuple(x.shape) for x in lists["student"]]
        if shapes != expected:
            raise ValueError(f"{name}: got shapes {shapes}, expected {expected}, those of student")
        for x in tensors:
            if x.dtype != first.dtype:
                raise TypeError(f"{name}: got {x.dtype}, expected {first.dtype}, as in student")
            if x.device != first.device:
                raise ValueError(
                    f"{name}: on {x.device}, expected {first.device}, where student is"
                )
    flat = (
        x[0].reshape(-1) if len(x) == 1 else torch.cat([part.reshape(-1) for part in x])
        for x in lists.values()
    )
    squares = ops.trajectory_distance(*flat)
    if squares.device.type == "cpu" and not torch.compiler.is_compiling() and not squares[1]:
        raise ValueError("start: equal to target, so that no distance can be measured by theirs")
    return squares[0] / squares[1]


def _tensors(name: str, value: Parameters) -> list[Tensor]:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    if not tensors:
        raise ValueError(f"{name}: is empty, expected a tensor or more")
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected tensors")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: got {x.dtype}, expected a floating dtype")
    refuse_transforms(*tensors)
    return tensors
