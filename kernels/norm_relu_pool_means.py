"""Triton kernel of `norm_relu_pool_means`: class means of the activation, which is never stored.

After `norm_relu_pool`, whose mean and rstd it reads. A program serves a tile of channels and pixels
of one class: it activates the tile image after image and adds it up with its rounding errors. x is
read once more than in a kernel that did both, but the pooled result keeps its own best tiles. No
atomics: the same bits in every run.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.kernels.norm_relu_pool import _readable, norm_relu_pool
from ddfast.kernels.norm_relu_pool_parts import _activation
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import memory_format

TILE = 1024  # elements


@triton.jit
def means_kernel(
    x,
    weight,
    bias,
    mean,  # (N, groups), as rstd
    rstd,
    means,  # (classes, channels, H, W) in x's memory format
    first_image,  # (classes + 1,) int64
    x_image,  # elements between images
    x_channel,  # between channels
    x_pixel,
    means_channel,
    means_pixel,
    channels,
    pixels,
    groups,
    per_group,  # channels
    channel_tiles,
    pixel_tiles,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    p = (program % pixel_tiles) * PIXELS + tl.arange(0, PIXELS)
    channel = (program // pixel_tiles % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    c = program // pixel_tiles // channel_tiles
    exists = channel < channels
    inside = exists[:, None] & (p < pixels)[None, :]
    at = channel[:, None] * x_channel + p[None, :] * x_pixel
    w = tl.full([CHANNELS], 1.0, ACC)
    b = tl.zeros([CHANNELS], ACC)
    if HAS_WEIGHT:
        w = tl.load(weight + channel, mask=exists, other=0.0).to(ACC)
    if HAS_BIAS:
        b = tl.load(bias + channel, mask=exists, other=0.0).to(ACC)
    begin, end = tl.load(first_image + c), tl.load(first_image + c + 1)
    total = tl.zeros([CHANNELS, PIXELS], ACC)
    low = tl.zeros([CHANNELS, PIXELS], ACC)  # what rounding takes from the total
    for n in range(begin, end):
        y = tl.load(x + n * x_image + at, mask=inside, other=0.0).to(ACC)
        if NORM:
            group = n * groups + channel // per_group
            m = tl.load(mean + group, mask=exists, other=0.0)
            r = tl.load(rstd + group, mask=exists, other=0.0)
            y = (y - m[:, None]) * r[:, None] * w[:, None] + b[:, None]
        a = _activation(y, ACTIVATION)
        after = total + a
        added = after - total
        low += (total - (after - added)) + (a - added)
        total = after
    total += tl.where(low == low, low, 0.0)  # NaN beside an infinite total
    count = tl.maximum(end - begin, 1).to(ACC)
    target = c * channels * pixels + channel[:, None] * means_channel + p[None, :] * means_pixel
    tl.store(means + target, total / count, mask=inside)


def choose_tile(channels: int, pixels: int, last: bool, double: bool) -> tuple[int, int]:
    """Channels and pixels of a tile, powers of two; the axis that is contiguous comes first."""
    size = TILE >> double
    most_channels, most_pixels = (triton.next_power_of_2(n) for n in (channels, pixels))
    if last:
        along = min(most_channels, 128)
        return along, min(most_pixels, size // along)
    along = min(most_pixels, 256)
    return min(most_channels, size // along), along


def norm_relu_pool_means(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    counts: list[int],
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of the same name; see ddfast/reference/norm_relu_pool_means.py."""
    out, mean, rstd = norm_relu_pool(x, weight, bias, groups, eps, activation, pool)
    last = memory_format(x) is torch.channels_last
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    double = accumulator(x.dtype) == torch.float64
    means = torch.empty(
        (len(counts), *x.shape[1:]),
        dtype=accumulator(x.dtype),
        device=x.device,
        memory_format=memory_format(x),
    )
    if not means.numel() or not x.numel():
        return out, mean, rstd, means.zero_()
    tile = choose_tile(channels, pixels, last, double)
    channel_tiles, pixel_tiles = -(-channels // tile[0]), -(-pixels // tile[1])
    first_image = torch.tensor(list(itertools.accumulate(counts, initial=0)), device=x.device)
    readable, image, step = _readable(x, last)
    means_kernel[(len(counts) * channel_tiles * pixel_tiles,)](
        readable,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        mean,
        rstd,
        means,
        first_image,
        image,
        1 if last else step,
        step if last else 1,
        1 if last else pixels,
        channels if last else 1,
        channels,
        pixels,
        groups,
        channels // groups if groups else channels,
        channel_tiles,
        pixel_tiles,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        NORM=groups > 0,
        ACTIVATION=activation,
        ACC=tl.float64 if double else tl.float32,
        CHANNELS=tile[0],
        PIXELS=tile[1],
    )
    return out, mean, rstd, means


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    sizes: tuple[str, ...] = (
        "x_image",
        "x_channel",
        "x_pixel",
        "means_channel",
        "means_pixel",
        "channels",
    )
    sizes += ("pixels", "groups", "per_group", "channel_tiles", "pixel_tiles")
    variants: list[tuple[object, dict[str, str], dict[str, object]]] = []
    for dtype, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        types = dict.fromkeys(sizes, "i64") | {"first_image": "*i64"}
        types |= dict.fromkeys(("x", "weight", "bias"), f"*{dtype}")
        types |= dict.fromkeys(("mean", "rstd", "means"), f"*{wide}")
        for last, activation in ((True, "relu"), (False, "swish")):
            channels, pixels = choose_tile(128, 1024, last, dtype == "fp64")
            constants: dict[str, object] = {
                "HAS_WEIGHT": True,
                "HAS_BIAS": True,
                "NORM": last,
                "ACTIVATION": activation,
                "ACC": tl.float64 if wide == "fp64" else tl.float32,
                "CHANNELS": channels,
                "PIXELS": pixels,
                "x_channel" if last else "x_pixel": 1,
                "means_channel" if last else "means_pixel": 1,
            }
            variants.append((means_kernel, types, constants))
    return variants
