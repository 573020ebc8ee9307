"""Operators `augment` and `augment_adjoint`: each the other's derivative, so every order is exact.

`ddfast.augment` draws records and checks what a user passes; ddfast/reference/augment.py has the
definition, the columns of a record included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import memory
from ddfast.ops.registry import TYPES, declare, derivative
from ddfast.reference import augment as reference


def _check_shapes(x: Tensor, record: Tensor) -> None:
    if x.dim() != 4 or x.dtype not in TYPES:
        raise ValueError(
            f"x: got {x.dtype} of shape {tuple(x.shape)}, expected floating point images "
            "(N, channels, height, width)"
        )
    if (x.shape[2] + 2) * (x.shape[3] + 2) >= 2**31:
        raise ValueError(
            f"x: got images of {x.shape[2]} x {x.shape[3]}, expected below 2^31 pixels"
        )
    if record.dtype != torch.float64 or record.dim() != 2 or record.shape[1] != 4:
        raise ValueError(
            f"record: got {record.dtype} of shape {tuple(record.shape)}, expected float64 (rows, 4)"
        )
    if record.shape[0] != 1 and record.shape[0] != x.shape[0]:
        raise ValueError(
            f"record: got {record.shape[0]} rows, expected 1 or {x.shape[0]}, the number of images"
        )
    if record.device.type not in ("cpu", "meta"):
        raise ValueError(f"record: on {record.device}, expected the CPU")


def _refuse(record: Tensor, row: int) -> None:
    raise ValueError(
        f"record[{row}]: got {record[row].tolist()}, expected an operation from 0 to "
        f"{len(reference.OPERATIONS) - 1} with finite parameters in the range that "
        "ddfast.reference.augment states"
    )


def check_record(record: Tensor) -> None:
    """Raise a ValueError that names the first row which is not valid."""
    row = reference.invalid_row(record)
    if row >= 0:
        _refuse(record, row)


def _run_compiled(
    compiled: Any, x: Tensor, record: Tensor, align_corners: bool, offset: bool, adjoint: bool
) -> Tensor:
    _check_shapes(x, record)
    x, record = x.contiguous(), record.contiguous()
    small = x.nbytes < memory.POOLED_BYTES
    out = torch.empty_like(x) if small else memory.empty(x.numel(), x.dtype).view(x.shape)
    row = compiled.augment(
        x.data_ptr(),
        out.data_ptr(),
        TYPES[x.dtype],
        record.data_ptr(),
        record.shape[0],
        x.shape,
        align_corners,
        offset,
        adjoint,
        torch.get_num_threads(),
    )
    if row >= 0:
        _refuse(record, row)
    return out


# --- x -> A x + offset --------------------------------------------------------------------------


def _reference(x: Tensor, record: Tensor, align_corners: bool, offset: bool) -> Tensor:
    _check_shapes(x, record)
    check_record(record)
    return reference.augment(x, record, align_corners, offset)


def _cpu(compiled: Any, x: Tensor, record: Tensor, align_corners: bool, offset: bool) -> Tensor:
    return _run_compiled(compiled, x, record, align_corners, offset, False)


def _cuda(kernels: Any, x: Tensor, record: Tensor, align_corners: bool, offset: bool) -> Any:
    _check_shapes(x, record)
    check_record(record)
    return kernels.augment(x, record, align_corners, offset)


def _fake(x: Tensor, record: Tensor, align_corners: bool, offset: bool) -> Tensor:
    _check_shapes(x, record)
    return x.new_empty(x.shape)


augment = declare(
    "augment(Tensor x, Tensor record, bool align_corners, bool offset) -> Tensor",
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="augment",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.align_corners = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (record,) = ctx.saved_tensors
    return augment_adjoint(grad, record, ctx.align_corners), None, None, None


derivative("augment", _backward, _setup)


# --- g -> A^T g ---------------------------------------------------------------------------------


def _adjoint_reference(grad: Tensor, record: Tensor, align_corners: bool) -> Tensor:
    _check_shapes(grad, record)
    check_record(record)
    return reference.augment_adjoint(grad, record, align_corners)


def _adjoint_cpu(compiled: Any, grad: Tensor, record: Tensor, align_corners: bool) -> Tensor:
    return _run_compiled(compiled, grad, record, align_corners, False, True)


def _adjoint_cuda(kernels: Any, grad: Tensor, record: Tensor, align_corners: bool) -> Any:
    _check_shapes(grad, record)
    check_record(record)
    return kernels.augment_adjoint(grad, record, align_corners)


def _adjoint_fake(grad: Tensor, record: Tensor, align_corners: bool) -> Tensor:
    _check_shapes(grad, record)
    return grad.new_empty(grad.shape)


augment_adjoint = declare(
    "augment_adjoint(Tensor grad, Tensor record, bool align_corners) -> Tensor",
    reference=_adjoint_reference,
    cpu=_adjoint_cpu,
    cuda=_adjoint_cuda,
    fake=_adjoint_fake,
    kernels="augment",
)


def _adjoint_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    (record,) = ctx.saved_tensors
    return augment(cotangent, record, ctx.align_corners, False), None, None


derivative("augment_adjoint", _adjoint_backward, _setup)
