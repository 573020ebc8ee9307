"""Triton kernels of `norm_relu_pool`: the derivatives along a tangent of forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from ddfast.kernels.norm_relu_pool_parts import (
    _activation,
    _at,
    _cells,
    _channels,
    _curvature,
    _load,
    _load_statistics,
    _over_pixels,
    _over_unit,
    _parameter,
    _pool,
    _slope,
    _unpool,
)

# --- tangent --------------------------------------------------------------------------------------


@triton.jit
def _tangent_tile(
    x, tangent, x_step, tangent_step, c, last, begin, height, across, cells, m, r,
    ODD: tl.constexpr, POOL: tl.constexpr, LAST: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Normalised values and the tangent of x, zero outside; the cells."""
    pixel, exists, pooled, kept = _cells(begin, height, across, cells, ODD, POOL, CELLS)
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
    per_group,
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
    first, last = _channels(unit, per_group, channels, GROUPED, CHANNELS)
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_group if GROUPED else CHANNELS
    m, r = _load_statistics(
        mean, rstd, n, unit, first + tl.arange(0, CHANNELS), channels, units, NORM, GROUPED, ACC
    )
    t1 = tl.zeros([1 if GROUPED else CHANNELS], ACC)  # mean of the tangent
    t2 = tl.zeros([1 if GROUPED else CHANNELS], ACC)  # and of its product with xh
    if NORM:
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            for begin in range(0, span, CELLS):
                xh, t, _, _, _, _ = _tangent_tile(
                    x, tangent, x_step, tangent_step, c, last, begin, height, across, cells, m, r,
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
            xh, t, _, _, pooled, kept = _tangent_tile(
                x, tangent, x_step, tangent_step, c, last, begin, height, across, cells, m, r,
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
    c, last, begin, height, across, cells, m, r, t1, t2, w, b, wt, bt,
    HAS_GRAD_TANGENT: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr,
    ODD: tl.constexpr, LAST: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """xh, xh', gy, gy' of the formulas in ddfast/reference/norm_relu_pool.py; pixels, mask."""
    xh, t, pixel, inside, pooled, kept = _tangent_tile(
        x, tangent, x_step, tangent_step, c, last, begin, height, across, cells, m, r,
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
        gt = _load(
            grad_tangent, _at(c[:, None], pooled, grad_tangent_step, LAST, OFFSET), kept, ACC
        )
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
    per_group,
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
    first, last = _channels(unit, per_group, channels, GROUPED, CHANNELS)
    if RESIDENT:
        span, depth = CELLS, CHANNELS
    else:
        span = cells
        depth = per_group if GROUPED else CHANNELS
    m, r = _load_statistics(
        mean, rstd, n, unit, first + tl.arange(0, CHANNELS), channels, units, NORM, GROUPED, ACC
    )
    t1 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    t2 = tl.zeros([1 if GROUPED else CHANNELS], ACC)
    if NORM:
        for down in range(0, depth, CHANNELS):
            c = first + down + tl.arange(0, CHANNELS)
            for begin in range(0, span, CELLS):
                xh, t, _, _, _, _ = _tangent_tile(
                    x, tangent, x_step, tangent_step, c, last, begin, height, across, cells, m, r,
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
                c, last, begin, height, across, cells, m, r, t1, t2, w, b, wt, bt,
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
                    tangent_step, c, last, begin, height, across, cells, m, r, t1, t2, w, b, wt, bt,
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
