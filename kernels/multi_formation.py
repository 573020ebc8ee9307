"""Triton kernels of `multi_formation` and its adjoint: a program writes a tile of one plane.

Both only read: an output pixel of the enlargement mixes four pixels, one of the adjoint sums over
the pixels that read it. So there are no atomics, and the bits are the same in every run. Which rows
an output row mixes is found in whole numbers, as in ddfast/reference/multi_formation.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.reference.multi_formation import crop_side

TILE = 1024  # pixels of a tile, in the enlargement
ADJOINT_TILE = 256  # fewer: each is a sum over some 4 factor^2 pixels
INT32_SIDE = 32767  # up to here 2 side^2 fits into 32 bits


def tile_shape(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows of small images, 64 columns or more of larger ones."""
    rows, columns = (triton.next_power_of_2(side) for side in (height, width))
    columns = min(columns, max(64, pixels // rows))
    return min(rows, pixels // columns), columns


@triton.jit
def _reads(number, crop, side, ACC: tl.constexpr):
    """First and second source row (or column) of output rows, and the share of the second."""
    unit = 2 * side
    place = tl.maximum((2 * number + 1) * crop - side, 0)
    low = place // unit
    rest = tl.where(low < crop - 1, place - low * unit, 0)
    return low, tl.where(rest > 0, low + 1, low), rest.to(ACC) / unit


@triton.jit
def _weight(number, source, crop, side, ACC: tl.constexpr):
    """With what weight output rows read the source rows; 0 outside the image."""
    low, high, share = _reads(number, crop, side, ACC)
    weight = tl.where(low == source, 1 - share, 0.0) + tl.where(high == source, share, 0.0)
    return tl.where(number < side, weight, 0.0)


@triton.jit
def _first_reader(source, crop, side):
    """The first output row that reads the source row, in whole numbers: the first beyond k - 1."""
    return tl.where(source > 0, ((2 * source - 1) * side - crop) // (2 * crop) + 1, 0)


@triton.jit
def _image(m, images, factor, BY_IMAGE: tl.constexpr):
    """Image and crop of the m-th image of the larger set."""
    crops = factor * factor
    if BY_IMAGE:
        image = m // crops
        crop = m % crops
    else:
        image = m % images
        crop = m // images
    return image, crop


@triton.jit
def form_kernel(
    x,  # (images, channels, height, width)
    out,  # (images factor^2, channels, height, width)
    fill,
    images,
    channels,
    height,
    width,
    tall,  # rows of a crop
    broad,  # columns of a crop
    factor,
    BY_IMAGE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    tile = program % tiles
    plane = program // tiles
    image, crop = _image(plane // channels, images, factor, BY_IMAGE)
    i = (tile // across * ROWS).to(INDEX) + tl.arange(0, ROWS).to(INDEX)
    j = (tile % across * COLUMNS).to(INDEX) + tl.arange(0, COLUMNS).to(INDEX)
    top, bottom, down = _reads(i, tall, height, ACC)
    left, right, along = _reads(j, broad, width, ACC)
    source = x + (image * channels + plane % channels) * height * width
    inside = (i < height)[:, None] & (j < width)[None, :]
    value = tl.zeros([ROWS, COLUMNS], ACC)
    for k in tl.static_range(4):
        if k < 2:
            row = crop // factor * tall + top
            of_row = 1 - down
        else:
            row = crop // factor * tall + bottom
            of_row = down
        if k % 2 == 0:
            column = crop % factor * broad + left
            of_column = 1 - along
        else:
            column = crop % factor * broad + right
            of_column = along
        exists = inside & (row < height)[:, None] & (column < width)[None, :]
        pixel = tl.load(source + row[:, None] * width + column[None, :], mask=exists, other=0.0)
        pixel = tl.where(exists, pixel.to(ACC), fill)
        value += of_row[:, None] * of_column[None, :] * pixel
    target = out + plane * height * width + i.to(tl.int64)[:, None] * width + j[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def adjoint_kernel(
    grad,  # (images factor^2, channels, height, width)
    out,  # (images, channels, height, width)
    images,
    channels,
    height,
    width,
    tall,
    broad,
    factor,
    row_taps,  # as many output rows as may read a source row
    column_taps,
    BY_IMAGE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    tile = program % tiles
    plane = program // tiles
    image = plane // channels
    y = (tile // across * ROWS).to(INDEX) + tl.arange(0, ROWS).to(INDEX)
    x = (tile % across * COLUMNS).to(INDEX) + tl.arange(0, COLUMNS).to(INDEX)
    inside = (y < height)[:, None] & (x < width)[None, :]
    row, column = y % tall, x % broad
    crop = (y // tall)[:, None].to(tl.int64) * factor + (x // broad)[None, :]
    if BY_IMAGE:
        m = image * factor * factor + crop
    else:
        m = crop * images + image
    source = grad + (m * channels + plane % channels) * height * width
    first_row = _first_reader(row, tall, height)
    first_column = _first_reader(column, broad, width)
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for s in range(row_taps):
        i = first_row + s
        of_row = _weight(i, row, tall, height, ACC)
        line = tl.zeros([ROWS, COLUMNS], ACC)
        for t in range(column_taps):
            j = first_column + t
            of_column = _weight(j, column, broad, width, ACC)
            read = inside & (of_row != 0)[:, None] & (of_column != 0)[None, :]
            place = i.to(tl.int64)[:, None] * width + j[None, :]
            line += of_column[None, :] * tl.load(source + place, mask=read, other=0.0).to(ACC)
        total += of_row[:, None] * line
    target = out + plane * height * width + y.to(tl.int64)[:, None] * width + x[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


def _constants(x: Tensor, order: str, pixels: int) -> dict[str, object]:
    height, width = x.shape[2:]
    rows, columns = tile_shape(height, width, pixels)
    return {
        "BY_IMAGE": order == "image",
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "INDEX": tl.int32 if max(height, width) <= INT32_SIDE else tl.int64,
        "ROWS": rows,
        "COLUMNS": columns,
    }


def _programs(planes: int, x: Tensor, constants: dict[str, object]) -> tuple[int]:
    down = triton.cdiv(x.shape[2], constants["ROWS"])
    return (planes * down * triton.cdiv(x.shape[3], constants["COLUMNS"]),)


def multi_formation(x: Tensor, factor: int, order: str, fill: float) -> Tensor:
    """The operator of the same name; see ddfast/ops/multi_formation.py."""
    x = x.contiguous()
    images, channels, height, width = x.shape
    out = x.new_empty(images * factor**2, channels, height, width)
    constants = _constants(x, order, TILE)
    if out.numel():
        form_kernel[_programs(out.shape[0] * channels, x, constants)](
            x,
            out,
            fill,
            images,
            channels,
            height,
            width,
            crop_side(height, factor),
            crop_side(width, factor),
            factor,
            **constants,
        )
    return out


def multi_formation_adjoint(grad: Tensor, factor: int, order: str) -> Tensor:
    """The operator of the same name."""
    grad = grad.contiguous()
    images, (channels, height, width) = grad.shape[0] // factor**2, grad.shape[1:]
    out = grad.new_empty(images, channels, height, width)
    constants = _constants(grad, order, ADJOINT_TILE)
    if out.numel():
        tall, broad = crop_side(height, factor), crop_side(width, factor)
        adjoint_kernel[_programs(images * channels, grad, constants)](
            grad,
            out,
            images,
            channels,
            height,
            width,
            tall,
            broad,
            factor,
            most_readers(height, tall),
            most_readers(width, broad),
            **constants,
        )
    return out


def most_readers(side: int, crop: int) -> int:
    """How many output rows may read a source row: those within a row of it, both ways."""
    return triton.cdiv(2 * side, crop)


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    sizes = ["images", "channels", "height", "width", "tall", "broad", "factor"]
    sizes += ["row_taps", "column_taps"]
    variants: list[tuple[object, dict[str, str], dict[str, object]]] = []
    for dtype, by_image in (("fp32", False), ("fp32", True), ("bf16", False), ("fp64", True)):
        types = dict.fromkeys(sizes, "i32") | dict.fromkeys(("x", "grad", "out"), f"*{dtype}")
        types["fill"] = "fp32"  # of a Python number
        common = {"BY_IMAGE": by_image, "ACC": tl.float64 if dtype == "fp64" else tl.float32}
        for kernel, rows in ((form_kernel, 16), (adjoint_kernel, 4)):
            tile = {"INDEX": tl.int32, "ROWS": rows, "COLUMNS": 64}
            variants.append((kernel, types, common | tile))
    # Sides beyond 32 bits' reach; and a launch turns every size of one into a constant.
    for kernel, types, constants in variants[:2]:
        variants.append((kernel, types | {"height": "i64"}, constants | {"INDEX": tl.int64}))
        ones = dict.fromkeys(("images", "channels", "height", "width", "tall", "broad"), 1)
        variants.append((kernel, types, constants | ones))
    return variants
