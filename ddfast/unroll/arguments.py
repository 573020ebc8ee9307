"""What the arguments of an unrolled student must be."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ADJOINTS = ("exact", "frozen", "graph")
"""Ways to differentiate a student's training, see `ddfast.unroll.final_parameters`."""

SOFT = ("probabilities", "logits")


def check_arguments(
    net: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Sequence[Tensor],
    soft: str,
    window: int | None,
) -> Tensor:
    """Raise a TypeError or ValueError that names what is wrong; the learning rate as a tensor."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: got {type(net).__name__}, expected a module")
    size = sum(p.numel() for p in net.parameters())
    if not isinstance(start, Tensor) or not start.is_floating_point():
        raise TypeError(f"start: expected a floating-point tensor ({size},), the flat parameters")
    if tuple(start.shape) != (size,):
        raise ValueError(
            f"start: got shape {tuple(start.shape)}, expected ({size},), the parameters of the "
            f"{type(net).__name__}"
        )
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        raise TypeError("images: expected a floating-point tensor (N, ...)")
    _check_labels(labels, images, soft)
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor.device != start.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {start.device}, as start")
        if tensor.is_floating_point() and tensor.dtype != start.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, expected {start.dtype}, as start")
    _check_batches(batches, images)
    if window is not None:
        window = operator.index(window)
        if not 0 <= window <= len(batches):
            raise ValueError(
                f"window: got {window}, expected 0 to {len(batches)}, the number of steps"
            )
        if window < len(batches) and start.requires_grad:
            raise ValueError(
                "start: requires a gradient, and a window shorter than the steps cuts it off"
            )
    return _rate(lr, len(batches), start)


def of_step(lr: Tensor, number: int) -> Tensor:
    """The learning rate of a step, of one for all or one for each."""
    return lr[number] if lr.dim() else lr


def _check_labels(labels: Tensor, images: Tensor, soft: str) -> None:
    if soft not in SOFT:
        raise ValueError(f"soft: got {soft!r}, expected one of {', '.join(SOFT)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected a tensor")
    if labels.is_floating_point():
        if labels.dim() != 2 or len(labels) != len(images):
            raise ValueError(
                f"labels: got soft ones of shape {tuple(labels.shape)}, expected "
                f"({len(images)}, classes)"
            )
    elif labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}, expected int64 or floating point")
    elif tuple(labels.shape) != (len(images),):
        raise ValueError(f"labels: got {tuple(labels.shape)}, expected ({len(images)},)")


def _check_batches(batches: Sequence[Tensor], images: Tensor) -> None:
    for number, rows in enumerate(batches):
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            raise TypeError(f"batches[{number}]: expected an int64 vector of positions")
        if not len(rows):
            raise ValueError(f"batches[{number}]: is empty")
        if rows.device != images.device:
            raise ValueError(
                f"batches[{number}]: on {rows.device}, expected {images.device}, as images"
            )
        if rows.device.type == "cpu":  # on a GPU the comparison would have to wait
            least, most = int(rows.min()), int(rows.max())
            if least < 0 or most >= len(images):
                raise ValueError(
                    f"batches[{number}]: positions {least} to {most}, expected 0 to "
                    f"{len(images) - 1}"
                )


def _rate(lr: Tensor | float, steps: int, start: Tensor) -> Tensor:
    if not isinstance(lr, Tensor):
        return torch.tensor(float(lr), dtype=start.dtype, device=start.device)
    if not lr.is_floating_point() or tuple(lr.shape) not in ((), (steps,)):
        raise ValueError(
            f"lr: got {lr.dtype} of shape {tuple(lr.shape)}, expected a floating-point number or "
            f"({steps},), one for each step"
        )
    return lr.to(start)
