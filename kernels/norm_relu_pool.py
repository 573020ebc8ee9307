"""Triton kernels of `norm_relu_pool`: forward, backward, tangent and tangent backward.

A program serves one unit of one image: a block of channels that are normalised one by one (instance
norm, no norm), or the channels of one group. Its pixels are indexed as (cell, corner), a cell being
the 2x2 window of the pool (one pixel where nothing is pooled), so that pooling is a sum or maximum
over the last axis of a tile (channels, cells, corners); cells cut off by an odd height or width are
there for the statistics and only not written. Where the unit fits into registers each input is
read once; otherwise in tiles, once more for every quantity that has to be known beforehand.

Both memory formats: a tensor is described by the distance of two images and one more step, that of
channels (pixels side by side) or that of pixels (channels side by side, channels_last).

No atomics and a fixed order of sums: the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import memory_format

#: Elements of a tile that a program keeps in registers, by the number of tiles it holds at once.
FORWARD, BACKWARD, TANGENT_BACKWARD = 16384, 8192, 8192
TILE = 4096  # elements of a tile where the unit does not fit, for which fewer warps suffice
PACKED = 2048  # elements up to which small planes are put together


# --- parts that the four kernels share ------------------------------------------------------------


@triton.jit
def _activation(y, ACTIVATION: tl.constexpr):
    """act(y); NaN stays NaN."""
    if ACTIVATION == "relu":
        a = tl.where(y <= 0, 0.0, y)
    elif ACTIVATION == "leaky_relu":
        a = tl.where(y > 0, y, 0.01 * y)
    else:
        a = 1.0 / (1.0 + tl.exp(-y))
        if ACTIVATION == "swish":
            a *= y
    return a


@triton.jit
def _slope(y, ACTIVATION: tl.constexpr):
    """act'(y); 0 at the kink of relu."""
    if ACTIVATION == "relu":
        d = tl.where(y > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(y > 0, 1.0, 0.01)
    else:
        s = 1.0 / (1.0 + tl.exp(-y))
        if ACTIVATION == "sigmoid":
            d = s * (1.0 - s)
        else:
            d = s * (1.0 + y * (1.0 - s))
    return d.to(y.dtype)


@triton.jit
def _curvature(y, ACTIVATION: tl.constexpr):
    """act''(y) of the two smooth activations."""
    s = 1.0 / (1.0 + tl.exp(-y))
    d = s * (1.0 - s)
    if ACTIVATION == "sigmoid":
        c = d * (1.0 - 2.0 * s)
    else:
        c = d * (2.0 + y * (1.0 - 2.0 * s))
    return c


@triton.jit
def _chosen(a, POOL: tl.constexpr):
    """Which corner max pooling takes: the first NaN, else the first maximum."""
    corner = tl.arange(0, 4)[None, None, :]
    maximum = tl.max(a, 2, keep_dims=True)
    rank = tl.where(a != a, corner, tl.where(a == maximum, corner + 4, 8))
    first = tl.min(rank, 2, keep_dims=True)
    return (rank == first) & (rank < 8)


@triton.jit
def _pool(v, a, POOL: tl.constexpr):
    """v, (channels, cells, corners), pooled as the activations a are."""
    if POOL == "max":
        pooled = tl.sum(tl.where(_chosen(a, POOL), v, 0.0), 2)
    elif POOL == "average":
        pooled = tl.sum(v, 2) * 0.25
    else:
        pooled = tl.sum(v, 2)
    return pooled


@triton.jit
def _unpool(g, a, POOL: tl.constexpr):
    """The transpose: g, (channels, cells), spread over the corners."""
    g = g[:, :, None]
    if POOL == "max":
        g = tl.where(_chosen(a, POOL), g, 0.0)
    elif POOL == "average":
        g = g * 0.25
    return g


@triton.jit
def _cells(
    begin, height, across, ODD: tl.constexpr, POOL: tl.constexpr, CELLS: tl.constexpr
):  # -> pixels (1, CELLS, corners) and which exist; pooled pixels (1, CELLS) and which exist
    """The cells from `begin` on. A width is given as cells across, so that even ones are known."""
    cell = begin + tl.arange(0, CELLS)
    if POOL == "none":
        pixel = cell[None, :, None]
        exists = pixel < height * across
        pooled, kept = cell[None, :], cell[None, :] < height * across
    else:
        width = 2 * across - ODD
        i, j = cell // across, cell % across
        corner = tl.arange(0, 4)
        h = 2 * i[None, :, None] + (corner // 2)[None, None, :]
        w = 2 * j[None, :, None] + (corner % 2)[None, None, :]
        pixel = h * width + w
        exists = (h < height) & (w < width)
        pooled = (i * (width // 2) + j)[None, :]
        kept = ((2 * i + 1 < height) & (2 * j + 1 < width))[None, :]
    return pixel, exists, pooled, kept


@triton.jit
def _at(c, pixel, step, LAST: tl.constexpr, OFFSET: tl.constexpr):
    """Offsets in an image: `step` elements lie between channels, or (LAST) between pixels."""
    if LAST:
        offset = pixel.to(OFFSET) * step + c
    else:
        offset = c.to(OFFSET) * step + pixel
    return offset


@triton.jit
def _load(pointer, offset, mask, ACC: tl.constexpr):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(ACC)


@triton.jit
def _parameter(
    pointer, c, last, GIVEN: tl.constexpr, missing: tl.constexpr, ACC: tl.constexpr
):
    """One number per channel of the tile, (CHANNELS,)."""
    if GIVEN:
        p = tl.load(pointer + c, mask=c < last, other=0.0).to(ACC)
    else:
        p = tl.full(c.shape, missing, ACC)
    return p


@triton.jit
def _over_unit(v, GROUPED: tl.constexpr):
    """Sums of v, one per channel, over what is normalised together."""
    if GROUPED:
        v = tl.sum(v, 0, keep_dims=True)
    return v


@triton.jit
def _over_pixels(v):
    return tl.sum(tl.sum(v, 2), 1)


@triton.jit
def _load_statistics(
    mean, rstd, n, unit, c, channels, units, NORM: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr
):
    """mean and rstd of the tile, (CHANNELS or 1, 1, 1)."""
    if GROUPED:
        at = n * units + unit + tl.arange(0, 1)
        m, r = tl.load(mean + at), tl.load(rstd + at)
    elif NORM:
        at = n * channels + c
        m = tl.load(mean + at, mask=c < channels, other=0.0)
        r = tl.load(rstd + at, mask=c < channels, other=0.0)
    else:
        m, r = tl.zeros(c.shape, ACC), tl.full(c.shape, 1.0, ACC)
    return m[:, None, None], r[:, None, None]


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    out,
    mean,
    rstd,
    x_image,  # elements between images
    x_step,  # between channels, or between pixels if LAST
    out_image,
    out_step,
    channels,
    units,  # per image: groups or blocks of channels
    per_unit,  # channels
    height,
    across,  # cells
    cells,
    elements,  # of what is normalised together
    EPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    ODD: tl.constexpr,
    LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, unit = program // units, program % units
    x += n * x_image
    out += n * out_image
    first = (unit * per_unit).to(tl.int32)
    last = tl.minimum(first + per_unit, channels)
    # A loop over a single tile has constant bounds: it dissolves, and what it loads is kept.
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_unit if GROUPED else CHANNELS
    if NORM:
        m = tl.zeros([1 if GROUPED else CHANNELS], ACC)
        squares = tl.zeros([1 if GROUPED else CHANNELS], ACC)
        total = tl.zeros([1], ACC)
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            for begin in range(0, span, CELLS):
                pixel, exists, pooled, kept = _cells(begin, height, across, ODD, POOL, CELLS)
                inside = exists & (c < last)[:, None, None]
                v = _load(x, _at(c[:, None, None], pixel, x_step, LAST, OFFSET), inside, ACC)
                size = _over_pixels(exists.to(ACC))
                if GROUPED:
                    size *= tl.sum((c < last).to(ACC), 0)
                tile_mean = _over_unit(_over_pixels(v), GROUPED) / size
                d = tl.where(inside, v - tile_mean[:, None, None], 0.0)
                tile_squares = _over_unit(_over_pixels(d * d), GROUPED)
                if RESIDENT:
                    m, squares = tile_mean, tile_squares
                else:
                    # Chan's update: statistics of the tiles so far and of this one, together.
                    share = size / (total + size)
                    delta = tile_mean - m
                    squares += tile_squares + delta * delta * total * share
                    m += delta * share
                    total += size
        r = 1.0 / tl.sqrt(squares / elements + EPS)
    else:
        m, r = tl.zeros([CHANNELS], ACC), tl.full([CHANNELS], 1.0, ACC)
    for down in range(0, depth, CHANNELS):
        c = first + down + tl.arange(0, CHANNELS)
        w = _parameter(weight, c, last, HAS_WEIGHT, 1.0, ACC)
        b = _parameter(bias, c, last, HAS_BIAS, 0.0, ACC)
        for begin in range(0, span, CELLS):
            pixel, exists, pooled, kept = _cells(begin, height, across, ODD, POOL, CELLS)
            inside = exists & (c < last)[:, None, None]
            v = _load(x, _at(c[:, None, None], pixel, x_step, LAST, OFFSET), inside, ACC)
            y = (v - m[:, None, None]) * r[:, None, None] * w[:, None, None] + b[:, None, None]
            a = _activation(y, ACTIVATION)
            target = out + _at(c[:, None], pooled, out_step, LAST, OFFSET)
            tl.store(target, _pool(a, a, POOL), mask=kept & (c < last)[:, None])
    if GROUPED:
        at = n * units + unit + tl.arange(0, 1)
        tl.store(mean + at, m)
        tl.store(rstd + at, r)
    elif NORM:
        c = first + tl.arange(0, CHANNELS)
        tl.store(mean + n * channels + c, m, mask=c < last)
        tl.store(rstd + n * channels + c, r, mask=c < last)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _backward_tile(
    grad, x, grad_step, x_step, c, last, begin, height, across, m, r, w, b,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, ODD: tl.constexpr, LAST: tl.constexpr,
    OFFSET: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Normalised values, the gradient of what goes into the activation, offsets of pixels, mask."""
    pixel, exists, pooled, kept = _cells(begin, height, across, ODD, POOL, CELLS)
    inside = exists & (c < last)[:, None, None]
    v = _load(x, _at(c[:, None, None], pixel, x_step, LAST, OFFSET), inside, ACC)
    at = _at(c[:, None], pooled, grad_step, LAST, OFFSET)
    g = _load(grad, at, kept & (c < last)[:, None], ACC)
    xh = tl.where(inside, (v - m) * r, 0.0)
    y = xh * w[:, None, None] + b[:, None, None]
    gy = _unpool(g, _activation(y, ACTIVATION), POOL) * _slope(y, ACTIVATION)
    return xh, gy, pixel, inside


@triton.jit
def backward_kernel(
    grad,
    x,
    weight,
    bias,
    mean,
    rstd,
    grad_x,
    grad_weight,  # (images, channels), as is grad_bias
    grad_bias,
    grad_image,
    grad_step,
    x_image,
    x_step,
    out_image,
    out_step,
    channels,
    units,
    per_unit,
    height,
    across,
    cells,
    elements,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    ODD: tl.constexpr,
    LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, unit = program // units, program % units
    grad += n * grad_image
    x += n * x_image
    grad_x += n * out_image
    grad_weight += n * channels
    grad_bias += n * channels
    first = (unit * per_unit).to(tl.int32)
    last = tl.minimum(first + per_unit, channels)
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_unit if GROUPED else CHANNELS
    m, r = _load_statistics(
        mean, rstd, n, unit, first + tl.arange(0, CHANNELS), channels, units, NORM, GROUPED, ACC
    )
    m1 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    m2 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    by_bias = tl.zeros([CHANNELS], ACC)
    by_weight = tl.zeros([CHANNELS], ACC)
    for down in range(0, depth, CHANNELS):
        c = first + down + tl.arange(0, CHANNELS)
        w = _parameter(weight, c, last, HAS_WEIGHT, 1.0, ACC)
        b = _parameter(bias, c, last, HAS_BIAS, 0.0, ACC)
        by_bias = tl.zeros([CHANNELS], ACC)
        by_weight = tl.zeros([CHANNELS], ACC)
        for begin in range(0, span, CELLS):
            xh, gy, pixel, inside = _backward_tile(
                grad, x, grad_step, x_step, c, last, begin, height, across, m, r, w, b,
                ACTIVATION, POOL, ODD, LAST, OFFSET, ACC, CELLS,
            )  # fmt: skip
            by_bias += _over_pixels(gy)
            by_weight += _over_pixels(gy * xh)
            if not NORM:
                target = grad_x + _at(c[:, None, None], pixel, out_step, LAST, OFFSET)
                tl.store(target, gy * w[:, None, None], mask=inside)
        m1 += _over_unit(w * by_bias, GROUPED)
        m2 += _over_unit(w * by_weight, GROUPED)
        if not RESIDENT:
            tl.store(grad_bias + c, by_bias, mask=c < last)
            tl.store(grad_weight + c, by_weight, mask=c < last)
    if NORM:
        m1 = (m1 / elements)[:, None, None]
        m2 = (m2 / elements)[:, None, None]
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            w = _parameter(weight, c, last, HAS_WEIGHT, 1.0, ACC)
            b = _parameter(bias, c, last, HAS_BIAS, 0.0, ACC)
            for begin in range(0, span, CELLS):
                xh, gy, pixel, inside = _backward_tile(
                    grad, x, grad_step, x_step, c, last, begin, height, across, m, r, w, b,
                    ACTIVATION, POOL, ODD, LAST, OFFSET, ACC, CELLS,
                )  # fmt: skip
                target = grad_x + _at(c[:, None, None], pixel, out_step, LAST, OFFSET)
                tl.store(target, r * (gy * w[:, None, None] - m1 - xh * m2), mask=inside)
    if RESIDENT:
        # Last of all, so that no store stands between the loads above that are one.
        c = first + tl.arange(0, CHANNELS)
        tl.store(grad_bias + c, by_bias, mask=c < last)
        tl.store(grad_weight + c, by_weight, mask=c < last)


# --- tangent --------------------------------------------------------------------------------------


@triton.jit
def _tangent_tile(
    x, tangent, x_step, tangent_step, c, last, begin, height, across, m, r,
    ODD: tl.constexpr, POOL: tl.constexpr, LAST: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Normalised values and the tangent of x, zero outside; the cells."""
    pixel, exists, pooled, kept = _cells(begin, height, across, ODD, POOL, CELLS)
    inside = exists & (c < last)[:, None, None]
    v = _load(x, _at(c[:, None, None], pixel, x_step, LAST, OFFSET), inside, ACC)
    t = _load(tangent, _at(c[:, None, None], pixel, tangent_step, LAST, OFFSET), inside, ACC)
    xh = tl.where(inside, (v - m) * r, 0.0)
    return xh, t, pixel, inside, pooled, kept & (c < last)[:, None]


@triton.jit
def tangent_kernel(
    x,
    tangent,
    weight,
    bias,
    weight_tangent,
    bias_tangent,
    mean,
    rstd,
    out,
    x_image,
    x_step,
    tangent_image,
    tangent_step,
    out_image,
    out_step,
    weight_tangent_image,  # 0 or channels
    bias_tangent_image,
    channels,
    units,
    per_unit,
    height,
    across,
    cells,
    elements,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT_TANGENT: tl.constexpr,
    HAS_BIAS_TANGENT: tl.constexpr,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    ODD: tl.constexpr,
    LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, unit = program // units, program % units
    x += n * x_image
    tangent += n * tangent_image
    out += n * out_image
    weight_tangent += n * weight_tangent_image
    bias_tangent += n * bias_tangent_image
    first = (unit * per_unit).to(tl.int32)
    last = tl.minimum(first + per_unit, channels)
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_unit if GROUPED else CHANNELS
    m, r = _load_statistics(
        mean, rstd, n, unit, first + tl.arange(0, CHANNELS), channels, units, NORM, GROUPED, ACC
    )
    t1 = tl.zeros([1 if GROUPED else CHANNELS], ACC)  # mean of the tangent
    t2 = tl.zeros([1 if GROUPED else CHANNELS], ACC)  # and of its product with xh
    if NORM:
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            for begin in range(0, span, CELLS):
                xh, t, pixel, inside, pooled, kept = _tangent_tile(
                    x, tangent, x_step, tangent_step, c, last, begin, height, across, m, r,
                    ODD, POOL, LAST, OFFSET, ACC, CELLS,
                )  # fmt: skip
                t1 += _over_unit(_over_pixels(t), GROUPED)
                t2 += _over_unit(_over_pixels(t * xh), GROUPED)
    t1 = (t1 / elements)[:, None, None]
    t2 = (t2 / elements)[:, None, None]
    for down in range(0, depth, CHANNELS):
        c = first + down + tl.arange(0, CHANNELS)
        w = _parameter(weight, c, last, HAS_WEIGHT, 1.0, ACC)[:, None, None]
        b = _parameter(bias, c, last, HAS_BIAS, 0.0, ACC)[:, None, None]
        wt = _parameter(weight_tangent, c, last, HAS_WEIGHT_TANGENT, 0.0, ACC)[:, None, None]
        bt = _parameter(bias_tangent, c, last, HAS_BIAS_TANGENT, 0.0, ACC)[:, None, None]
        for begin in range(0, span, CELLS):
            xh, t, pixel, inside, pooled, kept = _tangent_tile(
                x, tangent, x_step, tangent_step, c, last, begin, height, across, m, r,
                ODD, POOL, LAST, OFFSET, ACC, CELLS,
            )  # fmt: skip
            y = xh * w + b
            yt = w * (r * (t - t1 - xh * t2)) + wt * xh + bt
            at = _slope(y, ACTIVATION) * yt
            target = out + _at(c[:, None], pooled, out_step, LAST, OFFSET)
            tl.store(target, _pool(at, _activation(y, ACTIVATION), POOL), mask=kept)


# --- tangent backward -----------------------------------------------------------------------------


@triton.jit
def _second_tile(
    grad, grad_tangent, x, tangent, grad_step, grad_tangent_step, x_step, tangent_step,
    c, last, begin, height, across, m, r, t1, t2, w, b, wt, bt,
    HAS_GRAD_TANGENT: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr,
    ODD: tl.constexpr, LAST: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """xh, xh', gy, gy' of the formulas in ddfast/reference/norm_relu_pool.py; pixels, mask."""
    xh, t, pixel, inside, pooled, kept = _tangent_tile(
        x, tangent, x_step, tangent_step, c, last, begin, height, across, m, r,
        ODD, POOL, LAST, OFFSET, ACC, CELLS,
    )  # fmt: skip
    xht = tl.where(inside, r * (t - t1 - xh * t2), 0.0)
    w, b = w[:, None, None], b[:, None, None]
    y = xh * w + b
    a = _activation(y, ACTIVATION)
    slope = _slope(y, ACTIVATION)
    g = _load(grad, _at(c[:, None], pooled, grad_step, LAST, OFFSET), kept, ACC)
    spread = _unpool(g, a, POOL)
    gy = spread * slope
    gyt = tl.zeros(gy.shape, ACC)
    if HAS_GRAD_TANGENT:
        gt = _load(grad_tangent, _at(c[:, None], pooled, grad_tangent_step, LAST, OFFSET), kept, ACC)
        gyt += _unpool(gt, a, POOL) * slope
    if ACTIVATION == "sigmoid" or ACTIVATION == "swish":
        yt = w * xht + wt[:, None, None] * xh + bt[:, None, None]
        gyt += spread * _curvature(y, ACTIVATION) * yt
    return xh, xht, gy, gyt, pixel, inside


@triton.jit
def tangent_backward_kernel(
    grad,
    grad_tangent,
    x,
    tangent,
    weight,
    bias,
    weight_tangent,
    bias_tangent,
    mean,
    rstd,
    out,  # of grad_x
    out_weight,  # (images, channels), as is out_bias
    out_bias,
    grad_image,
    grad_step,
    grad_tangent_image,
    grad_tangent_step,
    x_image,
    x_step,
    tangent_image,
    tangent_step,
    out_image,
    out_step,
    weight_tangent_image,
    bias_tangent_image,
    channels,
    units,
    per_unit,
    height,
    across,
    cells,
    elements,
    HAS_GRAD_TANGENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT_TANGENT: tl.constexpr,
    HAS_BIAS_TANGENT: tl.constexpr,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    ODD: tl.constexpr,
    LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, unit = program // units, program % units
    grad += n * grad_image
    grad_tangent += n * grad_tangent_image
    x += n * x_image
    tangent += n * tangent_image
    out += n * out_image
    out_weight += n * channels
    out_bias += n * channels
    weight_tangent += n * weight_tangent_image
    bias_tangent += n * bias_tangent_image
    first = (unit * per_unit).to(tl.int32)
    last = tl.minimum(first + per_unit, channels)
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_unit if GROUPED else CHANNELS
    m, r = _load_statistics(
        mean, rstd, n, unit, first + tl.arange(0, CHANNELS), channels, units, NORM, GROUPED, ACC
    )
    t1 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    t2 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    if NORM:
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            for begin in range(0, span, CELLS):
                xh, t, pixel, inside, pooled, kept = _tangent_tile(
                    x, tangent, x_step, tangent_step, c, last, begin, height, across, m, r,
                    ODD, POOL, LAST, OFFSET, ACC, CELLS,
                )  # fmt: skip
                t1 += _over_unit(_over_pixels(t), GROUPED)
                t2 += _over_unit(_over_pixels(t * xh), GROUPED)
    t1 = (t1 / elements)[:, None, None]
    t2 = (t2 / elements)[:, None, None]

    m1 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    m2 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    m1t = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    m2t = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    by_bias = tl.zeros([CHANNELS], ACC)
    by_weight = tl.zeros([CHANNELS], ACC)
    for down in range(0, depth, CHANNELS):
        c = first + down + tl.arange(0, CHANNELS)
        w = _parameter(weight, c, last, HAS_WEIGHT, 1.0, ACC)
        b = _parameter(bias, c, last, HAS_BIAS, 0.0, ACC)
        wt = _parameter(weight_tangent, c, last, HAS_WEIGHT_TANGENT, 0.0, ACC)
        bt = _parameter(bias_tangent, c, last, HAS_BIAS_TANGENT, 0.0, ACC)
        sum_gy = tl.zeros([CHANNELS], ACC)
        sum_gy_xh = tl.zeros([CHANNELS], ACC)
        by_bias = tl.zeros([CHANNELS], ACC)
        by_weight = tl.zeros([CHANNELS], ACC)
        for begin in range(0, span, CELLS):
            xh, xht, gy, gyt, pixel, inside = _second_tile(
                grad, grad_tangent, x, tangent, grad_step, grad_tangent_step, x_step, tangent_step,
                c, last, begin, height, across, m, r, t1, t2, w, b, wt, bt,
                HAS_GRAD_TANGENT, ACTIVATION, POOL, ODD, LAST, OFFSET, ACC, CELLS,
            )  # fmt: skip
            sum_gy += _over_pixels(gy)
            sum_gy_xh += _over_pixels(gy * xh)
            by_bias += _over_pixels(gyt)
            by_weight += _over_pixels(gyt * xh + gy * xht)
            if not NORM:
                target = out + _at(c[:, None, None], pixel, out_step, LAST, OFFSET)
                tl.store(target, w[:, None, None] * gyt + wt[:, None, None] * gy, mask=inside)
        m1 += _over_unit(w * sum_gy, GROUPED)
        m2 += _over_unit(w * sum_gy_xh, GROUPED)
        m1t += _over_unit(w * by_bias + wt * sum_gy, GROUPED)
        m2t += _over_unit(w * by_weight + wt * sum_gy_xh, GROUPED)
        if not RESIDENT:
            tl.store(out_bias + c, by_bias, mask=c < last)
            tl.store(out_weight + c, by_weight, mask=c < last)
    if NORM:
        m1, m2 = (m1 / elements)[:, None, None], (m2 / elements)[:, None, None]
        m1t, m2t = (m1t / elements)[:, None, None], (m2t / elements)[:, None, None]
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            w = _parameter(weight, c, last, HAS_WEIGHT, 1.0, ACC)
            b = _parameter(bias, c, last, HAS_BIAS, 0.0, ACC)
            wt = _parameter(weight_tangent, c, last, HAS_WEIGHT_TANGENT, 0.0, ACC)
            bt = _parameter(bias_tangent, c, last, HAS_BIAS_TANGENT, 0.0, ACC)
            for begin in range(0, span, CELLS):
                xh, xht, gy, gyt, pixel, inside = _second_tile(
                    grad, grad_tangent, x, tangent, grad_step, grad_tangent_step, x_step,
                    tangent_step, c, last, begin, height, across, m, r, t1, t2, w, b, wt, bt,
                    HAS_GRAD_TANGENT, ACTIVATION, POOL, ODD, LAST, OFFSET, ACC, CELLS,
                )  # fmt: skip
                gxh = w[:, None, None] * gy
                gxht = w[:, None, None] * gyt + wt[:, None, None] * gy
                centred = gxh - m1 - xh * m2
                # rstd' = -rstd^2 t2
                result = r * (gxht - m1t - xht * m2 - xh * m2t) - r * r * t2 * centred
                target = out + _at(c[:, None, None], pixel, out_step, LAST, OFFSET)
                tl.store(target, result, mask=inside)
    if RESIDENT:
        c = first + tl.arange(0, CHANNELS)
        tl.store(out_bias + c, by_bias, mask=c < last)
        tl.store(out_weight + c, by_weight, mask=c < last)


# --- launches -------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a program works on: channels times cells, all of its unit at once if resident."""

    channels: int
    cells: int
    resident: bool
    warps: int


def choose_tile(
    channels: int, grouped: bool, cells: int, corners: int, last: bool, limit: int
) -> Tile:
    """Block sizes, all powers of two.

    Args:
        channels: of a group if grouped, else of the image.
        cells: of a plane.
        corners: pixels of a cell.
        last: whether the channels lie side by side (channels_last).
        limit: elements that fit into registers.
    """
    most, plane = triton.next_power_of_2(channels), triton.next_power_of_2(cells)
    # In channels_last eight channels make one sector of 32 bytes in float32.
    least = most if grouped else min(most, 8) if last else 1
    resident = least * plane * corners <= limit
    if resident:
        packed = 2 * PACKED if last else PACKED
        together = least if grouped else max(least, min(most, packed // (plane * corners)))
    else:
        together = min(most, 16) if last else 1
        plane = min(plane, max(1, TILE // (together * corners)))
        if grouped and not last:
            together = min(most, max(1, TILE // (plane * corners)))
    warps = min(16, max(1, together * plane * corners // 512))
    return Tile(together, plane, resident, warps)


def _readable(t: Tensor, last: bool) -> tuple[Tensor, int, int]:
    """t, copied only if the kernels cannot describe it; elements between images, and the step."""
    _, channels, height, width = t.shape
    _, by_channel, by_row, by_column = t.stride()
    by_pixel = by_column if width > 1 else by_row
    rows_follow = height == 1 or width == 1 or by_row == width * by_column
    if last:
        side_by_side = channels == 1 or by_channel == 1
    else:
        side_by_side = height * width == 1 or by_pixel == 1
    if not (rows_follow and side_by_side):
        return _readable(t.contiguous(memory_format=_format(last)), last)
    return t, t.stride(0), by_pixel if last else by_channel


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _launch(
    kernel: Any,
    inputs: dict[str, Tensor | None],
    parameters: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    groups: int,
    activation: str,
    pool: str,
    limit: int,
    **constants: Any,
) -> None:
    """Launch over all images and units.

    Args:
        inputs: x and what has its or the pooled size; None leaves the kernel's flag unset.
        parameters: weight and bias, and tangents of these, which may be one row per image.
        outputs: `out` or `grad_x`, then tensors of statistics.
        limit: elements of a resident tile.
    """
    x = inputs["x"]
    assert x is not None
    if x.numel() == 0:
        for tensor in outputs.values():
            tensor.zero_()
        return
    images, channels, height, width = x.shape
    last = memory_format(x) is torch.channels_last
    corners = 1 if pool == "none" else 4
    across = width if pool == "none" else (width + 1) // 2
    cells = across * (height if pool == "none" else (height + 1) // 2)
    grouped = 0 < groups < channels
    per_unit = channels // groups if grouped else channels
    tile = choose_tile(per_unit, grouped, cells, corners, last, limit)
    units = groups if grouped else triton.cdiv(channels, tile.channels)
    arguments: dict[str, Any] = dict(outputs)
    furthest = 0
    result = next(iter(outputs))
    for name, tensor in (inputs | {result: outputs[result]}).items():
        if tensor is None:
            arguments |= {name: x, f"{name}_image": 0, f"{name}_step": 0, f"HAS_{name.upper()}": 0}
            continue
        if name == "grad_tangent":
            arguments["HAS_GRAD_TANGENT"] = True
        arguments[name], image, step = _readable(tensor, last)
        short = "out" if name == result else name
        arguments |= {f"{short}_image": image, f"{short}_step": step}
        pixels = height * width
        furthest = max(furthest, pixels * step + channels if last else channels * step + pixels)
    for name, tensor in parameters.items():
        arguments[name] = x if tensor is None else tensor.contiguous()
        arguments[f"HAS_{name.upper()}"] = tensor is not None
        if name.endswith("tangent"):
            by_image = tensor is not None and tensor.dim() == 2
            arguments[f"{name}_image"] = channels if by_image else 0
    double = accumulator(x.dtype) == torch.float64
    kernel[(images * units,)](
        **arguments,
        channels=channels,
        units=units,
        per_unit=per_unit if grouped else tile.channels,
        height=height,
        across=across,
        cells=cells,
        elements=height * width * (per_unit if grouped else 1),
        NORM=groups > 0,
        GROUPED=grouped,
        RESIDENT=tile.resident,
        ACTIVATION=activation,
        POOL=pool,
        ODD=width % 2,
        LAST=last,
        OFFSET=tl.int32 if furthest < 2**31 else tl.int64,
        ACC=tl.float64 if double else tl.float32,
        CHANNELS=tile.channels,
        CELLS=tile.cells,
        num_warps=tile.warps,
        **constants,
    )


def _empty(x: Tensor, pool: str) -> Tensor:
    """Uninitialised, of the size of x, pooled, in its dtype and memory format."""
    images, channels, height, width = x.shape
    if pool != "none":
        height, width = height // 2, width // 2
    size = (images, channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def norm_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name; see ddfast/reference/norm_relu_pool.py, as for the others."""
    out = _empty(x, pool)
    mean = x.new_empty(x.shape[0], groups, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    parameters = {"weight": weight, "bias": bias}
    outputs = {"out": out, "mean": mean, "rstd": rstd}
    _launch(
        forward_kernel, {"x": x}, parameters, outputs, groups, activation, pool, FORWARD, EPS=eps
    )
    return out, mean, rstd


def norm_relu_pool_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name."""
    outputs = _outputs("grad_x", "grad_weight", "grad_bias", x)
    _launch(
        backward_kernel,
        {"grad": grad, "x": x},
        {"weight": weight, "bias": bias},
        outputs,
        groups,
        activation,
        pool,
        BACKWARD,
        mean=mean,
        rstd=rstd,
    )
    first, second, third = outputs.values()
    return first, second, third


def norm_relu_pool_tangent(
    x: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> Tensor:
    """The operator of the same name."""
    out = _empty(x, pool)
    _launch(
        tangent_kernel,
        {"x": x, "tangent": tangent},
        _parameters(weight, bias, weight_tangent, bias_tangent),
        {"out": out},
        groups,
        activation,
        pool,
        BACKWARD,
        mean=mean,
        rstd=rstd,
    )
    return out


def norm_relu_pool_tangent_bwd(
    grad: Tensor,
    grad_tangent: Tensor | None,
    x: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name."""
    outputs = _outputs("out", "out_weight", "out_bias", x)
    _launch(
        tangent_backward_kernel,
        {"grad": grad, "grad_tangent": grad_tangent, "x": x, "tangent": tangent},
        _parameters(weight, bias, weight_tangent, bias_tangent),
        outputs,
        groups,
        activation,
        pool,
        TANGENT_BACKWARD,
        mean=mean,
        rstd=rstd,
    )
    first, second, third = outputs.values()
    return first, second, third


def _outputs(by_x: str, by_weight: str, by_bias: str, x: Tensor) -> dict[str, Tensor]:
    sums = x.new_empty(2, *x.shape[:2], dtype=accumulator(x.dtype))
    return {by_x: _empty(x, "none"), by_weight: sums[0], by_bias: sums[1]}


def _parameters(
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "weight": weight,
        "bias": bias,
        "weight_tangent": weight_tangent,
        "bias_tangent": bias_tangent,
    }
