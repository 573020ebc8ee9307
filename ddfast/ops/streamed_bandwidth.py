"""Bandwidths of `mmd` without a matrix of pairs, in plain torch: what GPUs are given.

The definition in `ddfast.reference.mmd` holds all distances for a median, and all rows in float64
for a mean; here both come in pieces of a few megabytes. The median is found by its digits in base
65536, the highest first, as in csrc/cpu/mmd_bandwidth.cpp: for each digit the distances are
computed again, and those that agree with the digits found so far are counted by the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.reference.mmd import near_pairs, pooled_centre

#: Numbers that one piece of the work has; there are a handful of tensors of this size at a time.
PIECE = 1 << 19

BITS = 16
BINS = 1 << BITS


def mean_distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean of |z_i - z_j|^2 over all pairs of pooled rows i < j, some columns at a time.

    With z about the first row, N rows: 2 N sum |z_i|^2 - 2 |sum z_i|^2, over N^2 - N.

    Args:
        x, y: (classes, n, d) and (classes, m, d), float32 or float64.

    Returns:
        (classes,), in the dtype of x.
    """
    rows = x.shape[1] + y.shape[1]
    total = x.new_zeros(x.shape[0], dtype=torch.float64)
    columns = max(1, PIECE // max(1, x.shape[0] * rows))
    for first in range(0, x.shape[2], columns):
        part = slice(first, first + columns)
        origin = x[:, :1, part].double()
        squares, sums = torch.zeros_like(total), torch.zeros_like(origin)
        for z in (x, y):
            apart = z[..., part].double() - origin
            sums += apart.sum(1, keepdim=True)
            squares += (apart * apart).sum((1, 2))
        total += 2 * rows * squares - 2 * (sums * sums).sum((1, 2))
    return (total.clamp_min(0) / (rows * rows - rows)).to(x.dtype)


def median_distance(x: Tensor, y: Tensor) -> Tensor:
    """The lower median of |z_i - z_j|^2 over all pairs of pooled rows i < j, exact.

    Distances that are no number count as infinite.

    Args:
        x, y: (classes, n, d) and (classes, m, d), float32 or float64.

    Returns:
        (classes,), in the dtype of x.
    """
    centre = pooled_centre(x, y)
    found = [_median(torch.cat([a - c, b - c])) for a, b, c in zip(x, y, centre, strict=True)]
    return torch.stack(found) if found else x.new_empty(0)


def _median(rows: Tensor) -> Tensor:
    """Of the distances of one class's rows, centred."""
    count, kind = len(rows), torch.int32 if rows.dtype == torch.float32 else torch.int64
    rank = torch.tensor((count * (count - 1) // 2 - 1) // 2, device=rows.device)
    bits = torch.zeros((), dtype=kind, device=rows.device)
    for shift in range(torch.iinfo(kind).bits - BITS, -1, -BITS):
        counts = torch.zeros(BINS, dtype=torch.int64, device=rows.device)
        first = 0
        while first < count - 1:
            # Rows from `first` on, against all that follow: numbered from `first`.
            some = max(1, min(PIECE // (count - first), count - first))
            squared = _squared_distances(rows[first : first + some], rows[first:])
            upper = torch.ones_like(squared, dtype=torch.bool).triu(1)
            values = squared.nan_to_num(nan=float("inf"), posinf=float("inf"))[upper].view(kind)
            digits = values >> shift
            # Two shifts: one of all bits would leave them as they are.
            digits = digits[(digits >> BITS) == bits] & (BINS - 1)
            counts += torch.bincount(digits, minlength=BINS)
            first += some
        below = counts.cumsum(0)
        digit = (below <= rank).sum()
        rank -= (below - counts)[digit]
        bits = (bits << BITS) | digit.to(kind)
    return bits.view(rows.dtype)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """As the definition's, with its exact differences of near pairs some at a time."""
    squared, (_, i, j) = near_pairs(a[None], b[None])
    squared = squared[0].clamp_min_(0)
    some = max(1, PIECE // max(1, a.shape[1]))
    for first in range(0, len(i), some):
        here = i[first : first + some], j[first : first + some]
        squared[here] = (a[here[0]] - b[here[1]]).square_().sum(1)
    return squared
