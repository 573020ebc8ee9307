"""The definition of `multi_formation` and its adjoint, in plain torch.

Source: Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization (IDC), ICML
2022, section 4. An image of (height, width) holds factor^2 smaller ones. Its crop (p, q) is the
rows from p ceil(height / factor) on, ceil(height / factor) of them, and the columns likewise; what
lies beyond the image has the value `fill`. Each crop is enlarged bilinearly to (height, width):
output row i reads at (i + 1/2) ceil(height / factor) / height - 1/2 of the crop, clamped to its
rows (`torch.nn.functional.interpolate` with align_corners=False).

Everything here may be differentiated any number of times. Sums are kept in float64 for float64
images, else in float32, and rounded at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ddfast.reference.gradient_distance import accumulator

ORDERS = ("crop", "image")


def crop_side(side: int, factor: int) -> int:
    """Rows (or columns) of a crop of an image with `side` rows."""
    return -(-side // factor)


def _reads(side: int, factor: int, dtype: torch.dtype, like: Tensor) -> tuple[Tensor, ...]:
    """Of every output row: the two crop rows it mixes and the share of the second, (side,) each.

    In whole numbers until the share, so that every implementation finds the same rows. Where the
    share is zero both rows are the same: a pixel that does not count is not read.
    """
    crop = crop_side(side, factor)
    number = torch.arange(side, dtype=torch.int64, device=like.device)
    place = ((2 * number + 1) * crop - side).clamp(min=0)  # in units of 1 / (2 side) rows
    low = place // (2 * side)
    rest = torch.where(low < crop - 1, place - low * (2 * side), 0)
    share = rest.to(torch.float64) / (2 * side)
    return low, low + (rest > 0).long(), share.to(dtype)


def multi_formation(x: Tensor, factor: int, order: str = "crop", fill: float = 0.5) -> Tensor:
    """The enlarged crops of each image.

    Args:
        x: (N, channels, height, width).
        factor: crops per side, at least 1.
        order: "crop": crop (0, 0) of all images first, then (0, 1), ..., as published; "image": all
            crops of image 0 first.
        fill: value of what lies beyond the image, where factor divides a side not.

    Returns:
        (N factor^2, channels, height, width) of x's dtype, contiguous.
    """
    if factor == 1:
        return x.clone(memory_format=torch.contiguous_format)
    n, channels, height, width = x.shape
    tall, broad = crop_side(height, factor), crop_side(width, factor)
    wide = x.to(accumulator(x.dtype))
    wide = pad(wide, (0, factor * broad - width, 0, factor * tall - height), value=fill)
    crops = wide.reshape(n, channels, factor, tall, factor, broad)
    crops = crops.permute(*((2, 4, 0) if order == "crop" else (0, 2, 4)), 1, 3, 5)
    crops = crops.reshape(n * factor * factor, channels, tall, broad)
    for dim in (3, 2):
        low, high, share = _reads(x.shape[dim], factor, crops.dtype, x)
        share = share if dim == 3 else share.unsqueeze(1)
        crops = crops.index_select(dim, low) * (1 - share) + crops.index_select(dim, high) * share
    return crops.to(x.dtype)


def multi_formation_adjoint(grad: Tensor, factor: int, order: str = "crop") -> Tensor:
    """The transpose of the linear part of `multi_formation`, hence its derivative.

    Args:
        grad: (N factor^2, channels, height, width).
        factor, order: as `multi_formation`.

    Returns:
        (N, channels, height, width) of grad's dtype, contiguous.
    """
    if factor == 1:
        return grad.clone(memory_format=torch.contiguous_format)
    n, (channels, height, width) = grad.shape[0] // factor**2, grad.shape[1:]
    tall, broad = crop_side(height, factor), crop_side(width, factor)
    crops = grad.to(accumulator(grad.dtype))
    for dim, side in ((2, tall), (3, broad)):
        low, high, share = _reads(grad.shape[dim], factor, crops.dtype, grad)
        share = share if dim == 3 else share.unsqueeze(1)
        shape = list(crops.shape)
        shape[dim] = side
        total = crops.new_zeros(shape).index_add(dim, low, crops * (1 - share))
        crops = total.index_add(dim, high, crops * share)
    first = (factor, factor, n) if order == "crop" else (n, factor, factor)
    crops = crops.reshape(*first, channels, tall, broad)
    crops = crops.permute(*((2, 3, 0, 4, 1, 5) if order == "crop" else (0, 3, 1, 4, 2, 5)))
    whole = crops.reshape(n, channels, factor * tall, factor * broad)
    return whole[:, :, :height, :width].to(grad.dtype).contiguous()
