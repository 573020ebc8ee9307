"""What the Triton kernels of `mmd` do with a tile of pairs: distances, kernel values, slopes."""

from __future__ import annotations

import triton
import triton.language as tl

from ddfast.reference.mmd import NEAR

GAUSSIAN = tl.constexpr(0)
LAPLACE = tl.constexpr(1)
ENERGY = tl.constexpr(2)
POLYNOMIAL = tl.constexpr(3)
NEAR_PART = tl.constexpr(NEAR)


@triton.jit
def inner(left, right, total, PRECISION: tl.constexpr):
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _by_columns(a, b, i, j, n, m, width, a_row, b_row, DISTANCE: tl.constexpr, ACC: tl.constexpr):
    """Squared distances, or inner products, column by column."""
    s = i[:, None].to(ACC) * 0 + j[None, :].to(ACC) * 0
    for k in range(width):
        left = tl.load(a + i * a_row + k, mask=i < n, other=0.0).to(ACC)
        right = tl.load(b + j * b_row + k, mask=j < m, other=0.0).to(ACC)
        if DISTANCE:
            difference = left[:, None] - right[None, :]
            s += difference * difference
        else:
            s += left[:, None] * right[None, :]
    return s


@triton.jit
def pairs(
    a,
    b,
    centre,
    i,
    j,
    n,
    m,
    width,
    a_row,
    b_row,
    SELF: tl.constexpr,
    DISTANCE: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(squared distances or inner products, pairs that are close, whether there are any)."""
    inside = (i < n)[:, None] & (j < m)[None, :]
    if not DOT:
        s = _by_columns(a, b, i, j, n, m, width, a_row, b_row, DISTANCE, ACC)
        near = inside
        some = 1
    else:
        s = tl.zeros([TILE, TILE], ACC)
        left_norms = tl.zeros([TILE], ACC)
        right_norms = tl.zeros([TILE], ACC)
        for start in range(0, width, DEPTH):
            k = start + tl.arange(0, DEPTH)
            of_left = (i < n)[:, None] & (k < width)[None, :]
            of_right = (k < width)[:, None] & (j < m)[None, :]
            left = tl.load(a + i[:, None] * a_row + k[None, :], mask=of_left, other=0.0).to(ACC)
            right = tl.load(b + j[None, :] * b_row + k[:, None], mask=of_right, other=0.0).to(ACC)
            if DISTANCE:
                middle = tl.load(centre + k, mask=k < width, other=0.0)
                left = tl.where(of_left, left - middle[None, :], 0.0)
                right = tl.where(of_right, right - middle[:, None], 0.0)
                left_norms += tl.sum(left * left, 1)
                right_norms += tl.sum(right * right, 0)
            s = inner(left, right, s, "ieee")
        near = inside & False
        some = 0
        if DISTANCE:
            norms = left_norms[:, None] + right_norms[None, :]
            s = norms - 2 * s
            near = inside & (s < norms * NEAR_PART)
            if SELF:
                near = near & (i[:, None] != j[None, :])
            s = tl.where(s < 0, 0.0, s)  # a NaN stays
            some = tl.max(tl.max(near.to(tl.int32), 1), 0)
            if some > 0:
                exact = _by_columns(a, b, i, j, n, m, width, a_row, b_row, DISTANCE, ACC)
                s = tl.where(near, exact, s)
    if SELF and DISTANCE:
        s = tl.where(i[:, None] == j[None, :], 0.0, s)
    return s, near, some


@triton.jit
def kernel_of(s, rates, KIND: tl.constexpr, DEGREE: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """Kernel values, and what multiplies b - a (b, for the polynomial) in the gradient by a."""
    if KIND == POLYNOMIAL:
        slope = s * 0 + 1.0
        for _ in tl.static_range(DEGREE - 1):
            slope *= s + 1.0
        return slope * (s + 1.0), slope * DEGREE
    positive = s > 0
    if KIND == GAUSSIAN:
        at = s
        factor = tl.where(positive, 2.0, 0.0).to(s.dtype)
    else:
        root = (
            tl.sqrt_rn(tl.where(positive, s, 1.0))
            if s.dtype == tl.float32
            else tl.sqrt(tl.where(positive, s, 1.0))
        )
        at = tl.where(s == 0, 0.0, tl.where(positive, root, s))
        factor = tl.where(positive, 1.0 / root, 0.0).to(s.dtype)
    if KIND == ENERGY:
        return -at, factor
    value = s * 0
    slope = s * 0
    for r in tl.static_range(BANDWIDTHS):
        rate = tl.load(rates + r)
        e = tl.where(rate == 0, 0.0, tl.exp(-at * rate))
        value += e
        slope += e * rate
    return value, slope * factor
