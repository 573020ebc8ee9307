"""Triton kernels of `norm_relu_pool`: forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from ddfast.kernels.norm_relu_pool_parts import (
    _activation,
    _at,
    _cells,
    _channels,
    _load,
    _load_statistics,
    _over_pixels,
    _over_unit,
    _parameter,
    _pool,
    _slope,
    _unpool,
)

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
    per_group,  # channels
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
    first, last = _channels(unit, per_group, channels, GROUPED, CHANNELS)
    # A loop over a single tile has constant bounds: it dissolves, and what it loads is kept.
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_group if GROUPED else CHANNELS
    if NORM:
        m = tl.zeros([1 if GROUPED else CHANNELS], ACC)
        squares = tl.zeros([1 if GROUPED else CHANNELS], ACC)
        total = tl.zeros([1], ACC)
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            for begin in range(0, span, CELLS):
                pixel, exists, pooled, kept = _cells(begin, height, across, cells, ODD, POOL, CELLS)
                inside = exists & (c < last)[:, None, None]
                v = _load(x, _at(c[:, None, None], pixel, x_step, LAST, OFFSET), inside, ACC)
                size = _over_pixels(exists.to(ACC))
                if GROUPED:
                    size *= tl.sum((c < last).to(ACC), 0)
                tile_mean = _over_unit(_over_pixels(v), GROUPED) / size
                d = tl.where(inside, v - tile_mean[:, None, None], 0.0)
                # What is left of the mean after rounding: it counts where the mean is large.
                rest = _over_unit(_over_pixels(d), GROUPED) / size
                tile_squares = _over_unit(_over_pixels(d * d), GROUPED) - size * rest * rest
                tile_mean += rest
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
            pixel, exists, pooled, kept = _cells(begin, height, across, cells, ODD, POOL, CELLS)
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
    grad, x, grad_step, x_step, c, last, begin, height, across, cells, m, r, w, b,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, ODD: tl.constexpr, LAST: tl.constexpr,
    OFFSET: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Normalised values, the gradient of what goes into the activation, offsets of pixels, mask."""
    pixel, exists, pooled, kept = _cells(begin, height, across, cells, ODD, POOL, CELLS)
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
    per_group,
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
    first, last = _channels(unit, per_group, channels, GROUPED, CHANNELS)
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_group if GROUPED else CHANNELS
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
                grad, x, grad_step, x_step, c, last, begin, height, across, cells, m, r, w, b,
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
                    grad, x, grad_step, x_step, c, last, begin, height, across, cells, m, r, w, b,
                    ACTIVATION, POOL, ODD, LAST, OFFSET, ACC, CELLS,
                )  # fmt: skip
                target = grad_x + _at(c[:, None, None], pixel, out_step, LAST, OFFSET)
                tl.store(target, r * (gy * w[:, None, None] - m1 - xh * m2), mask=inside)
    if RESIDENT:
        # Last of all, so that no store stands between the loads above that are one.
        c = first + tl.arange(0, CHANNELS)
        tl.store(grad_bias + c, by_bias, mask=c < last)
        tl.store(grad_weight + c, by_weight, mask=c < last)
