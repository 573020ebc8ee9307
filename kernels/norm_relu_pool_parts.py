"""What the Triton kernels of `norm_relu_pool` have in common: a tile and what is done to it."""

from __future__ import annotations

import triton
import triton.language as tl


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
def _chosen(a):
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
        pooled = tl.sum(tl.where(_chosen(a), v, 0.0), 2)
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
        g = tl.where(_chosen(a), g, 0.0)
    elif POOL == "average":
        g = g * 0.25
    return g


@triton.jit
def _cells(
    begin, height, across, cells, ODD: tl.constexpr, POOL: tl.constexpr, CELLS: tl.constexpr
):  # -> pixels (1, CELLS, corners) and which exist; pooled pixels (1, CELLS) and which exist
    """The cells from `begin` on. A width is given as cells across, so that even ones are known."""
    cell = begin + tl.arange(0, CELLS)
    if POOL == "none":
        pixel = cell[None, :, None]
        exists = pixel < cells
        pooled, kept = cell[None, :], cell[None, :] < cells
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
def _parameter(pointer, c, last, GIVEN: tl.constexpr, missing: tl.constexpr, ACC: tl.constexpr):
    """One number per channel of the tile, (CHANNELS,)."""
    if GIVEN:
        p = tl.load(pointer + c, mask=c < last, other=0.0).to(ACC)
    else:
        p = tl.full(c.shape, missing, ACC)
    return p


@triton.jit
def _channels(unit, per_group, channels, GROUPED: tl.constexpr, CHANNELS: tl.constexpr):
    """The unit's first channel and the end; not a minimum, which would hide what divides it."""
    if GROUPED:
        first = (unit * per_group).to(tl.int32)
        last = first + per_group
    else:
        first = (unit * CHANNELS).to(tl.int32)
        last = channels
    return first, last


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
    mean,
    rstd,
    n,
    unit,
    c,
    channels,
    units,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    ACC: tl.constexpr,
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
