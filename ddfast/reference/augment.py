"""The definition of operator `augment` in plain torch: any floating dtype, any order of derivative.

One operation of differentiable siamese augmentation (Zhao and Bilen, ICML 2021) per image. A record
says which: float64, on the CPU, (rows, 4), with one row per image or one for all, and columns

    operation   parameters
    0 color     brightness added, saturation factor, contrast factor
    1 crop      shift down and right, in whole pixels: output (i, j) is input (i + down, j + right)
    2 cutout    centre of the erased square, row and column, in whole pixels; its side / image side
    3 flip      1 mirrors left and right, 0 does nothing
    4 scale     factors of the horizontal and vertical sampling grid; above 1 shrinks the content
    5 rotate    angle of the sampling grid in radians

Every operation is affine in the image, x -> A x + offset. `augment_adjoint` is A^T. So the
derivative of `augment` is `augment_adjoint`, that of `augment_adjoint` is `augment` without its
offset, and the two have every order of derivative between them. The record is not differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""In the order of their numbers, the first column of a record."""

#: Larger parameters are refused: they mean nothing, and shifts must stay exact as integers.
LARGEST_PARAMETER = 1e9


def invalid_row(record: Tensor) -> int:
    """The first row that is no operation with parameters in range, or -1."""
    rows = record.detach().numpy()
    operation, first, second, third = rows.T
    whole = (first == np.floor(first)) & (second == np.floor(second))
    rules = {
        "crop": whole,
        "cutout": whole & (third >= 0),
        "flip": (first == 0) | (first == 1),
        "scale": (first > 0) & (second > 0),
    }
    valid = (np.abs(rows) <= LARGEST_PARAMETER).all(1) & np.isin(operation, range(len(OPERATIONS)))
    for name, rule in rules.items():
        valid &= rule | (operation != OPERATIONS.index(name))
    return -1 if valid.all() else int(np.argmin(valid))


# --- color ------------------------------------------------------------------------------------


def _color(x: Tensor, rows: Tensor, offset: bool) -> Tensor:
    """Brightness, then saturation about the channel mean, then contrast about the image mean."""
    brightness, saturation, contrast = rows.to(x.device, x.dtype)[:, 1:, None, None, None].unbind(1)
    if offset:
        x = x + brightness
    x = saturation * x + (1 - saturation) * x.mean(1, keepdim=True)
    return contrast * x + (1 - contrast) * x.mean((1, 2, 3), keepdim=True)


# --- the others: output pixel p is the sum over k of weight_k[p] * x[index_k[p]] ----------------

Size = tuple[int, int]
Taps = list[tuple[Tensor, Tensor]]  # (index, weight), each (rows, height * width); weight float64


def _taps_at(size: Size, row: Tensor, column: Tensor, weight: Tensor) -> Taps:
    """One tap at whole coordinates, with weight 0 outside the image."""
    row, column, weight = torch.broadcast_tensors(row, column, weight)
    height, width = size
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return [(index.flatten(1).long(), torch.where(inside, weight, 0.0).flatten(1))]


def _crop(rows: Tensor, i: Tensor, j: Tensor, size: Size) -> Taps:
    down, right = rows[:, 1, None, None], rows[:, 2, None, None]
    return _taps_at(size, i + down, j + right, torch.ones_like(i))


def _cutout(rows: Tensor, i: Tensor, j: Tensor, size: Size) -> Taps:
    def covered(place: Tensor, length: int, centre: Tensor) -> Tensor:
        side = torch.floor(length * rows[:, 3] + 0.5)
        start = centre - torch.floor(side / 2)
        return (place >= start[:, None, None]) & (place < (start + side)[:, None, None])

    hidden = covered(i, size[0], rows[:, 1]) & covered(j, size[1], rows[:, 2])
    weight = torch.where(hidden, 0.0, 1.0).to(torch.float64)
    return _taps_at(size, i, j, weight)


def _flip(rows: Tensor, i: Tensor, j: Tensor, size: Size) -> Taps:
    column = torch.where(rows[:, 1, None, None] == 1, size[1] - 1 - j, j)
    return _taps_at(size, i, column, torch.ones_like(i))


def sampling_matrix(name: str, rows: np.ndarray, size: Size, align_corners: bool) -> np.ndarray:
    """xx, xy, yx, yy: pixel (i, j) reads at x = xx j + xy i, y = yx j + yy i about the centre.

    torch's `affine_grid` followed by `grid_sample`, in units of pixels. Rotation mixes the axes in
    normalised coordinates, hence the aspect ratio; `align_corners` counts pixel distances.

    Args:
        name: "scale" or "rotate".
        rows: (n, 4), rows of a record.

    Returns:
        (4, n).
    """
    if name == "scale":
        zero = np.zeros(len(rows))
        return np.stack([rows[:, 1], zero, zero, rows[:, 2]])
    height, width = (side - 1 if align_corners else side for side in size)
    cos, sin = np.cos(rows[:, 1]), np.sin(rows[:, 1])
    across = width / height if height else 0.0
    down = height / width if width else 0.0
    return np.stack([cos, -sin * across, sin * down, cos])


def _bilinear(
    name: str, rows: Tensor, i: Tensor, j: Tensor, size: Size, align_corners: bool
) -> Taps:
    """Four taps around the source point (y, x), zeros outside the image."""
    matrix = torch.from_numpy(sampling_matrix(name, rows.numpy(), size, align_corners))
    xx, xy, yx, yy = matrix[:, :, None, None]
    centre_y, centre_x = (size[0] - 1) / 2, (size[1] - 1) / 2
    x = centre_x + xx * (j - centre_x) + xy * (i - centre_y)
    y = centre_y + yx * (j - centre_x) + yy * (i - centre_y)
    left, top = x.floor(), y.floor()
    right, bottom = x - left, y - top  # the weights of the neighbours on that side
    return [
        *_taps_at(size, top, left, (1 - bottom) * (1 - right)),
        *_taps_at(size, top, left + 1, (1 - bottom) * right),
        *_taps_at(size, top + 1, left, bottom * (1 - right)),
        *_taps_at(size, top + 1, left + 1, bottom * right),
    ]


def _taps(name: str, rows: Tensor, size: Size, align_corners: bool) -> Taps:
    i = torch.arange(size[0], dtype=torch.float64)[None, :, None]
    j = torch.arange(size[1], dtype=torch.float64)[None, None, :]
    if name in ("scale", "rotate"):
        return _bilinear(name, rows, i, j, size, align_corners)
    return {"crop": _crop, "cutout": _cutout, "flip": _flip}[name](rows, i, j, size)


def _read(x: Tensor, taps: Taps) -> Tensor:
    """sum over k of weight_k * x[index_k]; a weight of zero reads nothing, not even a NaN."""
    flat = x.flatten(2)
    out = torch.zeros_like(flat)
    for index, weight in taps:
        weight = weight[:, None].to(x.device, x.dtype)
        value = flat.gather(2, index[:, None].to(x.device).expand(flat.shape))
        out = out + torch.where(weight != 0, weight * value, 0.0)
    return out.reshape(x.shape)


def _write(grad: Tensor, taps: Taps) -> Tensor:
    """The transpose of `_read`."""
    flat = grad.flatten(2)
    out = torch.zeros_like(flat)
    for index, weight in taps:
        weight = weight[:, None].to(grad.device, grad.dtype)
        value = torch.where(weight != 0, weight * flat, 0.0)
        out = out.scatter_add(2, index[:, None].to(grad.device).expand(flat.shape), value)
    return out.reshape(grad.shape)


# --- the operator -----------------------------------------------------------------------------


def _by_operation(
    x: Tensor, record: Tensor, apply: Callable[[str, Tensor, Tensor], Tensor]
) -> Tensor:
    """apply(name, images, rows) to the images of each operation, in the batch's order."""
    if x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    record = record.detach()
    operations = record[:, 0].long()
    result = torch.zeros_like(x, dtype=accumulator(x.dtype), memory_format=torch.contiguous_format)
    for operation in operations.unique().tolist():
        name, which = OPERATIONS[operation], (operations == operation).nonzero()[:, 0]
        if len(which) == len(record):
            result = apply(name, x.to(result.dtype), record)
        else:
            there = which.to(x.device)
            part = apply(name, x.index_select(0, there).to(result.dtype), record[which])
            result = result.index_copy(0, there, part)
    return result.to(x.dtype).contiguous()


def augment(x: Tensor, record: Tensor, align_corners: bool = False, offset: bool = True) -> Tensor:
    """Apply to each image the operation that the record names.

    Args:
        x: (N, channels, height, width), floating point.
        record: (N, 4) or (1, 4), valid, see the head of this file.
        align_corners: scale and rotate as torch before 1.3 did.
        offset: False leaves out what does not depend on x (color's brightness).

    Returns:
        A new contiguous tensor of x's shape and dtype; computed in at least float32.
    """

    def apply(name: str, images: Tensor, rows: Tensor) -> Tensor:
        if name == "color":
            return _color(images, rows, offset)
        return _read(images, _taps(name, rows, (x.shape[2], x.shape[3]), align_corners))

    return _by_operation(x, record, apply)


def augment_adjoint(grad: Tensor, record: Tensor, align_corners: bool = False) -> Tensor:
    """The transpose of the linear part of `augment`, in the same shapes."""

    def apply(name: str, images: Tensor, rows: Tensor) -> Tensor:
        if name == "color":  # symmetric
            return _color(images, rows, offset=False)
        return _write(images, _taps(name, rows, (grad.shape[2], grad.shape[3]), align_corners))

    return _by_operation(grad, record, apply)
