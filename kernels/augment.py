"""Triton kernels of `augment` and `augment_adjoint`: the six operations, each output written once.

A program makes one block of pixels of one plane (color: of all planes of one image). What it needs
of its image's record it reads from a small table that the host prepares. The adjoint of scale and
rotate gathers, too: an input pixel collects from the few output pixels whose four neighbours
include it; how many those can be, at most, follows from the record. No atomics: the same bits in
every run.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.reference.augment import OPERATIONS, sampling_matrix
from ddfast.reference.gradient_distance import accumulator

BLOCK = 1024  # pixels of one program
ADJOINT_BLOCK = 512  # the same where registers are short
COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE = (tl.constexpr(k) for k in range(len(OPERATIONS)))
TABLE_WIDTH = 11  # columns of the table: the operation and what `_table` says
ENTRIES = tl.constexpr(TABLE_WIDTH)

#: Widening of the window of candidates, in pixels, so that rounding cannot lose one of weight > 0.
SLACK = 0.01


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _entry(table, row, k: tl.constexpr):
    return tl.load(table + row * ENTRIES + k)


@triton.jit
def mean_kernel(x, table, mean, one_row, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """mean[n] of image n, `count` elements long, if its operation is color."""
    n = tl.program_id(0).to(tl.int64)
    operation = _entry(table, n * (1 - one_row), 0)
    if operation == COLOR:
        total = tl.zeros([BLOCK], ACC)
        for begin in range(0, count, BLOCK):
            k = begin + tl.arange(0, BLOCK)
            total += tl.load(x + n * count + k, mask=k < count, other=0.0).to(ACC)
        tl.store(mean + n, tl.sum(total, 0) / count)


@triton.jit
def color_kernel(
    x,
    out,
    table,
    mean,
    one_row,  # 1: the table's only row is for all images
    channels,
    pixels,  # between planes
    blocks,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    row = n * (1 - one_row)
    if _entry(table, row, 0) == COLOR:
        own, others = _entry(table, row, 1), _entry(table, row, 2)
        constant = _entry(table, row, 3) * tl.load(mean + n) + _entry(table, row, 4)
        k = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        base = n * channels * pixels + k
        total = tl.zeros([BLOCK], ACC)
        for c in range(channels):
            total += tl.load(x + base + c * pixels, mask=k < pixels, other=0.0).to(ACC)
        for c in range(channels):
            value = tl.load(x + base + c * pixels, mask=k < pixels, other=0.0).to(ACC)
            tl.store(
                out + base + c * pixels, own * value + others * total + constant, mask=k < pixels
            )


@triton.jit
def copy_kernel(
    x,
    out,
    table,
    one_row,
    channels,
    height,
    width,
    stride,  # between planes
    blocks,
    BLOCK: tl.constexpr,
):
    """crop, cutout, flip: bits are moved as they are."""
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    row = plane // channels * (1 - one_row)
    operation = _entry(table, row, 0)
    if (operation == CROP) | (operation == CUTOUT) | (operation == FLIP):
        a, b = _entry(table, row, 1).to(tl.int32), _entry(table, row, 2).to(tl.int32)
        c, d = _entry(table, row, 3).to(tl.int32), _entry(table, row, 4).to(tl.int32)
        k = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        i, j = k // width, k % width
        from_i, from_j = i, j
        read = k < height * width
        if operation == CROP:
            from_i, from_j = i + a, j + b
            read &= (from_i >= 0) & (from_i < height) & (from_j >= 0) & (from_j < width)
        elif operation == CUTOUT:
            read &= (i < a) | (i >= b) | (j < c) | (j >= d)
        elif a == 1:
            from_j = width - 1 - j
        value = tl.load(x + plane * stride + from_i * width + from_j, mask=read, other=0.0)
        tl.store(out + plane * stride + k, value, mask=k < height * width)


@triton.jit
def resample_kernel(
    x,
    out,
    table,
    one_row,
    channels,
    height,
    width,
    stride,
    blocks,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale, rotate: four neighbours of the source point, zeros outside."""
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    row = plane // channels * (1 - one_row)
    operation = _entry(table, row, 0)
    if (operation == SCALE) | (operation == ROTATE):
        k = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        i, j = k // width, k % width
        v, u = i.to(ACC) - (height - 1) / 2.0, j.to(ACC) - (width - 1) / 2.0
        # How far the source point lies from the pixel itself: a small number keeps its digits.
        dx = _entry(table, row, 1) * u + _entry(table, row, 2) * v
        dy = _entry(table, row, 3) * u + _entry(table, row, 4) * v
        dx = tl.minimum(tl.maximum(dx, -width - 2.0), width + 2.0)
        dy = tl.minimum(tl.maximum(dy, -height - 2.0), height + 2.0)
        left, top = j + tl.floor(dx).to(tl.int32), i + tl.floor(dy).to(tl.int32)
        fx, fy = dx - tl.floor(dx), dy - tl.floor(dy)
        base = x + plane * stride
        total = tl.zeros([BLOCK], ACC)
        for below in tl.static_range(2):
            for right in tl.static_range(2):
                r, c = top + below, left + right
                inside = (k < height * width) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
                weight = (fy if below else 1 - fy) * (fx if right else 1 - fx)
                total += weight * tl.load(base + r * width + c, mask=inside, other=0.0).to(ACC)
        tl.store(out + plane * stride + k, total, mask=k < height * width)


@triton.jit
def resample_adjoint_kernel(
    grad,
    out,
    table,
    one_row,
    channels,
    height,
    width,
    stride,
    blocks,
    window_i,  # candidates per input pixel: rows
    window_j,  # and columns
    SLACK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The transpose: input pixel (i, j) collects from the output pixels that read it."""
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    row = plane // channels * (1 - one_row)
    operation = _entry(table, row, 0)
    if (operation == SCALE) | (operation == ROTATE):
        xx, xy, yx, yy = (
            _entry(table, row, 1),
            _entry(table, row, 2),
            _entry(table, row, 3),
            _entry(table, row, 4),
        )
        k = ((program % blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        i, j = k // width, k % width
        centre_i, centre_j = (height - 1) / 2.0, (width - 1) / 2.0
        v, u = i.to(ACC) - centre_i, j.to(ACC) - centre_j
        # The first candidate: the source of (i, j) under the inverse map, less the half-width.
        first_j = centre_j + _entry(table, row, 5) * u + _entry(table, row, 6) * v
        first_i = centre_i + _entry(table, row, 7) * u + _entry(table, row, 8) * v
        first_j = tl.ceil(first_j - _entry(table, row, 9) - SLACK).to(tl.int32)
        first_i = tl.ceil(first_i - _entry(table, row, 10) - SLACK).to(tl.int32)
        total = tl.zeros([BLOCK], ACC)
        for at_i in range(window_i):
            for at_j in range(window_j):
                r, c = first_i + at_i, first_j + at_j
                v, u = r.to(ACC) - centre_i, c.to(ACC) - centre_j
                # From (i, j) to where candidate (r, c) reads; beyond one pixel it does not see it.
                dx = (c - j).to(ACC) + (xx * u + xy * v)
                dy = (r - i).to(ACC) + (yx * u + yy * v)
                weight = tl.maximum(1 - tl.abs(dx), 0.0) * tl.maximum(1 - tl.abs(dy), 0.0)
                inside = (k < height * width) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
                inside &= weight > 0
                offset = plane * stride + r * width + c
                total += weight * tl.load(grad + offset, mask=inside, other=0.0).to(ACC)
        tl.store(out + plane * stride + k, total, mask=k < height * width)


# --- launches -----------------------------------------------------------------------------------


def _window(matrix: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Inverse maps and half-widths for the table, and the numbers of candidate rows and columns.

    The output pixels that read input pixel p are those whose image under the matrix is within one
    pixel of p in both axes: a parallelogram around the inverse image of p, of which we search the
    bounding box. A box larger than the image is replaced by all pixels around the centre.
    """
    xx, xy, yx, yy = matrix
    determinant = xx * yy - xy * yx
    regular = np.abs(determinant) > 1e-12
    inverse = np.stack([yy, -xy, -yx, xx]) / np.where(regular, determinant, 1.0)
    halves = []
    for pair, length in ((inverse[:2], size[1]), (inverse[2:], size[0])):
        all_pixels = (length + 1) / 2
        half = np.abs(pair).sum(0)
        local = regular & (half < all_pixels)
        pair *= local
        halves.append(np.where(local, half, all_pixels))
    columns, rows = (int(2 * (half.max() + SLACK)) + 1 for half in halves)
    return np.stack([*inverse, *halves]), rows, columns


def _covered(size: int, centre: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the square that cutout erases begins and ends."""
    side = np.floor(size * ratio + 0.5)
    start = centre - np.floor(side / 2)
    return np.maximum(start, 0), np.minimum(start + side, size)


def _table(
    rows: np.ndarray, shape: torch.Size, align_corners: bool, offset: bool, adjoint: bool
) -> tuple[np.ndarray, set[str], tuple[int, int]]:
    """What the kernels read, (rows, TABLE_WIDTH), the operations in it and the adjoint's window."""
    table = np.zeros((len(rows), TABLE_WIDTH))
    table[:, 0] = rows[:, 0]
    names, window = set(), (0, 0)
    size = (shape[2], shape[3])
    for operation in np.unique(rows[:, 0]):
        where = rows[:, 0] == operation
        _, first, second, third = rows[where].T
        name = OPERATIONS[int(operation)]
        names.add(name)
        if name == "color":
            brightness = first if offset else 0 * first
            others = third * (1 - second) / shape[1]
            columns = np.stack([third * second, others, 1 - third, brightness])
        elif name == "crop":
            # A shift by more than the image leaves nothing, however much more.
            down, right = np.clip(first, -size[0], size[0]), np.clip(second, -size[1], size[1])
            columns = np.stack([-down, -right] if adjoint else [down, right])
        elif name == "cutout":
            columns = np.stack(
                [*_covered(size[0], first, third), *_covered(size[1], second, third)]
            )
        elif name == "flip":
            columns = first[None]
        else:
            matrix = sampling_matrix(name, rows[where], size, align_corners)
            inverse, *counts = _window(matrix, size)
            window = (max(window[0], counts[0]), max(window[1], counts[1]))
            columns = np.concatenate([matrix - np.array([[1], [0], [0], [1]]), inverse])
        table[where, 1 : 1 + len(columns)] = columns.T
    return table, names, window


def _run(x: Tensor, record: Tensor, align_corners: bool, offset: bool, adjoint: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    images, channels, height, width = x.shape
    rows = record.detach().numpy()
    filled, names, window = _table(rows, x.shape, align_corners, offset, adjoint)
    dtype = accumulator(x.dtype)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    table = torch.from_numpy(filled).to(dtype).to(x.device, non_blocking=True)
    one_row, pixels = int(len(rows) == 1), height * width
    if "color" in names:
        mean = torch.empty(images, dtype=dtype, device=x.device)
        mean_kernel[(images,)](x, table, mean, one_row, channels * pixels, ACC=acc, BLOCK=BLOCK)
    adjoint_resample = adjoint and bool(names & {"scale", "rotate"})
    block = min(ADJOINT_BLOCK if adjoint_resample else BLOCK, triton.next_power_of_2(pixels))
    blocks = triton.cdiv(pixels, block)
    arguments = (one_row, channels, height, width, pixels, blocks)
    grid = (images * channels * blocks,)
    if "color" in names:
        color_kernel[(images * blocks,)](
            x, out, table, mean, one_row, channels, pixels, blocks, ACC=acc, BLOCK=block
        )
    if names & {"crop", "cutout", "flip"}:
        copy_kernel[grid](x, out, table, *arguments, BLOCK=block)
    if adjoint_resample:
        resample_adjoint_kernel[grid](
            x, out, table, *arguments, *window, SLACK=SLACK, ACC=acc, BLOCK=block
        )
    elif names & {"scale", "rotate"}:
        resample_kernel[grid](x, out, table, *arguments, ACC=acc, BLOCK=block)
    return out


def augment(x: Tensor, record: Tensor, align_corners: bool, offset: bool) -> Tensor:
    """Launch `augment`: see ddfast/reference/augment.py. The record stays on the CPU."""
    return _run(x, record, align_corners, offset, adjoint=False)


def augment_adjoint(grad: Tensor, record: Tensor, align_corners: bool) -> Tensor:
    """Launch the transpose of the linear part of `augment`."""
    return _run(grad, record, align_corners, offset=False, adjoint=True)


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    variants: list[tuple[object, dict[str, str], dict[str, object]]] = []
    integers = dict.fromkeys(
        ("one_row", "channels", "height", "width", "blocks", "window_i", "window_j"), "i32"
    ) | dict.fromkeys(("stride", "pixels", "count"), "i64")
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        wide, acc = ("fp64", tl.float64) if dtype == "fp64" else ("fp32", tl.float32)
        types = dict.fromkeys(("x", "grad", "out"), f"*{dtype}")
        types |= dict.fromkeys(("table", "mean"), f"*{wide}") | integers
        constants = {"ACC": acc, "BLOCK": BLOCK}
        for kernel in (mean_kernel, color_kernel, resample_kernel):
            variants.append((kernel, types, constants))
        variants.append((copy_kernel, types, {"BLOCK": BLOCK}))
        variants.append(
            (resample_adjoint_kernel, types, constants | {"SLACK": SLACK, "BLOCK": ADJOINT_BLOCK})
        )
    return variants
