"""What the Triton kernels of `dense_kernel` do with a tile of pairs of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def covariances(
    x,
    y,
    i,
    j,
    n,
    m,
    width,
    x_row,
    y_row,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Inner products of the rows i of x with the rows j of y."""
    total = tl.zeros([TILE, TILE], ACC)
    for start in range(0, width, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        of_x = (i < n)[:, None] & (k < width)[None, :]
        of_y = (k < width)[:, None] & (j < m)[None, :]
        left = tl.load(x + i[:, None] * x_row + k[None, :], mask=of_x, other=0.0).to(ACC)
        right = tl.load(y + j[None, :] * y_row + k[:, None], mask=of_y, other=0.0).to(ACC)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def equal_rows(
    x, y, k, p, i, j, n, m, width, x_row, y_row, CLOSE: tl.constexpr, SELF: tl.constexpr
):
    """Which pairs have equal rows. NaN equals nothing."""
    near = (i < n)[:, None] & (j < m)[None, :] & (p - k <= CLOSE * p)
    if SELF:
        near = near & (i[:, None] != j[None, :])
    same = near
    if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
        for c in range(width):
            left = tl.load(x + i * x_row + c, mask=i < n, other=0.0)
            right = tl.load(y + j * y_row + c, mask=j < m, other=0.0)
            same = same & (left.to(k.dtype)[:, None] == right.to(k.dtype)[None, :])
    if SELF:
        same = same | (i[:, None] == j[None, :])
    return same


@triton.jit
def pair(of_x, of_y, row, i, j, n, m):
    """The product of one row of two tables for every pair, zero outside."""
    left = tl.load(of_x + row * n + i, mask=i < n, other=0.0)
    right = tl.load(of_y + row * m + j, mask=j < m, other=0.0)
    return left[:, None] * right[None, :]


@triton.jit
def variances_of(of_x, of_y, i, j, n, m):
    """The mean of both variances of every pair."""
    left = tl.load(of_x + i, mask=i < n, other=0.0)
    right = tl.load(of_y + j, mask=j < m, other=0.0)
    return 0.5 * (left[:, None] + right[None, :])
