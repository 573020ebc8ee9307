"""Triton kernel of `class_weight_grad`, and `class_conv` and `class_input_grad` on CUDA.

The weight gradient is a matrix product per class, of (O, positions) and (positions, I kh kw), where
positions are the pixels of all images of the class and the second factor is read from the images as
it is needed. A program computes one tile of one class's product over a chunk of its images; sums
over chunks are added afterwards in a fixed order. No atomics: the same bits in every run.

The two others are ordinary convolutions with groups, for which the vendor's library is there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ddfast.reference.class_weight_grad import (
    conv_shape,
    input_grad_shape,
    memory_format,
    weight_grad_shape,
)
from ddfast.reference.gradient_distance import accumulator

#: Programs that fill any GPU several times over; a constant, so that results do not depend on it.
PROGRAMS = 2048
#: Positions below which a program writes more partial sums than its work is worth.
FEWEST = 512


class Tile(NamedTuple):
    """Rows (O), columns (I kh kw) and positions of one step of a program."""

    rows: int
    columns: int
    positions: int
    warps: int


def choose_tile(outputs: int, columns: int, positions: int, kind: str) -> Tile:
    """Block sizes.

    Args:
        outputs, columns: sizes of the product.
        positions: over which it sums.
        kind: "float64", "float32" (no tensor cores), "tf32" or "half".
    """
    if kind == "float64":
        return Tile(16, 16, 8, 4)
    # Without tensor cores a program must not be too large for many to run side by side.
    rows = max(16, min(64 if kind == "float32" else 128, triton.next_power_of_2(outputs)))
    across = max(16, min(64, triton.next_power_of_2(columns)))
    most = 16 if kind == "float32" else 32
    deep = max(16, min(most, triton.next_power_of_2(positions)))
    return Tile(rows, across, deep, 8 if rows > 64 and across > 32 else 4)


def chunk_size(images: int, programs: int, pixels: int) -> int:
    """Images of one chunk, where one chunk per class makes `programs` programs."""
    chunks = max(1, min(images, -(-PROGRAMS // programs), images * pixels // FEWEST))
    return max(1, min(-(-images // chunks), (2**31 - 1) // pixels))


@triton.jit
def weight_grad_kernel(
    x,
    grad,
    first_image,  # (classes + 1,) int64, or anything if not RAGGED
    partial,  # (classes, chunks, O, I kh kw)
    images,  # of every class if not RAGGED
    chunk,  # images per program
    chunks,
    row_tiles,
    column_tiles,
    inputs,
    outputs,
    height,
    width,
    x_image,  # elements between images
    x_channel,
    x_row,
    x_column,
    grad_height,
    grad_width,
    grad_image,
    grad_channel,
    grad_row,
    grad_column,
    padding,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,  # what the matrix units are given
    PRECISION: tl.constexpr,  # tl.dot's, or "double": no matrix units
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # Neighbours share the tile of grad, or that of x, in the cache.
    column_tile = program % column_tiles
    row_tile = program // column_tiles % row_tiles
    part = program // column_tiles // row_tiles % chunks
    c = program // column_tiles // row_tiles // chunks
    begin = part * chunk
    if RAGGED:
        first = tl.load(first_image + c)
        images = tl.load(first_image + c + 1) - first
    else:
        first = c * images
    pixels = grad_height * grad_width
    x += (first + begin) * x_image
    grad += (first + begin) * grad_image
    # A chunk has fewer than 2^31 positions: divisions in 32 bits.
    end = (tl.maximum(tl.minimum(images - begin, chunk), 0) * pixels).to(tl.int32)

    taps: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    o = row_tile * ROWS + tl.arange(0, ROWS)
    # Within a tap the input channels follow each other, as they do in channels_last memory.
    column = (column_tile * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)
    tap, i = column // inputs, column % inputs
    dy, dx = tap // KERNEL_WIDTH - padding, tap % KERNEL_WIDTH - padding
    by_row = o * grad_channel
    by_column = i.to(tl.int64) * x_channel + dy.to(tl.int64) * x_row + dx.to(tl.int64) * x_column
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for start in range(0, end, POSITIONS):
        k = start + tl.arange(0, POSITIONS)
        n, pixel = k // pixels, k % pixels
        h, w = pixel // grad_width, pixel % grad_width
        n, h, w = n.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
        at = n * grad_image + h * grad_row + w * grad_column
        inside = (o < outputs)[:, None] & (k < end)[None, :]
        g = tl.load(grad + by_row[:, None] + at[None, :], mask=inside, other=0.0)
        at = n * x_image + h * x_row + w * x_column
        y, z = h.to(tl.int32)[:, None] + dy[None, :], w.to(tl.int32)[:, None] + dx[None, :]
        inside = (k < end)[:, None] & (tap < taps)[None, :]
        inside &= (y >= 0) & (y < height) & (z >= 0) & (z < width)
        v = tl.load(x + at[:, None] + by_column[None, :], mask=inside, other=0.0)
        if PRECISION == "double":
            total += tl.sum(g.to(ACC)[:, :, None] * v.to(ACC)[None, :, :], 1)
        else:
            total = tl.dot(g.to(OPERAND), v.to(OPERAND), total, input_precision=PRECISION)
    target = (c * chunks + part) * outputs * inputs * taps
    target += o[:, None] * inputs * taps + (i * taps + tap)[None, :]
    tl.store(partial + target, total, mask=(o < outputs)[:, None] & (tap < taps)[None, :])


def tensor_float_allowed() -> bool:
    """Whether the user lets float32 matrix products be computed in TF32 (off by default)."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set through torch's newer name for it, with which the older one refuses
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _precision(dtype: torch.dtype) -> tuple[str, str]:
    """(kind of `choose_tile`, how the kernel multiplies)."""
    if dtype == torch.float64:
        return "float64", "double"
    if dtype != torch.float32:
        return "half", "ieee"
    return ("tf32", "tf32") if tensor_float_allowed() else ("float32", "ieee")


@functools.lru_cache(maxsize=256)
def _first_images(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Index of each class's first image and the end; kept, because a copy to the GPU waits."""
    starts = list(itertools.accumulate(counts, initial=0))
    return torch.tensor(starts, dtype=torch.int64, device=device)


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def class_weight_grad(
    x: Tensor,
    grad: Tensor,
    counts: Sequence[int],
    kernel: Sequence[int],
    padding: int = 0,
    algorithm: str = "auto",
) -> Tensor:
    """The operator of the same name; see ddfast/reference/class_weight_grad.py.

    float32 is multiplied in float32, or in TF32 where torch.backends.cuda.matmul allows it; half
    types as they are; sums are float32 (float64 for float64). `algorithm` is checked, and of no
    influence.
    """
    shape = weight_grad_shape(x, grad, counts, kernel, padding, algorithm)
    if 0 in (*shape, *x.shape):
        return x.new_zeros(shape)
    classes, outputs, inputs = shape[:3]
    if not kernel:
        x, grad, kernel = x[:, :, None, None], grad[:, :, None, None], (1, 1)
    dtype = accumulator(x.dtype)
    columns = inputs * kernel[0] * kernel[1]
    pixels = grad.shape[2] * grad.shape[3]
    ragged = len(set(counts)) > 1
    images = max(counts)
    kind, precision = _precision(x.dtype)
    tile = choose_tile(outputs, columns, images * pixels, kind)
    tiles = (triton.cdiv(outputs, tile.rows), triton.cdiv(columns, tile.columns))
    chunk = chunk_size(images, classes * tiles[0] * tiles[1], pixels)
    chunks = triton.cdiv(images, chunk)
    partial = torch.empty(classes, chunks, outputs, columns, dtype=dtype, device=x.device)
    first_image = x
    if ragged:
        first_image = _first_images(tuple(counts), x.device)
    # The interpreter multiplies bfloat16 as if it were integers.
    half = kind == "half" and not triton.knobs.runtime.interpret
    weight_grad_kernel[(classes * chunks * tiles[0] * tiles[1],)](
        x,
        grad,
        first_image,
        partial,
        images,
        chunk,
        chunks,
        *tiles,
        inputs,
        outputs,
        *x.shape[2:],
        *x.stride(),
        *grad.shape[2:],
        *grad.stride(),
        padding,
        KERNEL_HEIGHT=kernel[0],
        KERNEL_WIDTH=kernel[1],
        RAGGED=ragged,
        ACC=tl.float64 if kind == "float64" else tl.float32,
        OPERAND=_TYPES[x.dtype] if half else tl.float32,
        PRECISION=precision,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        POSITIONS=tile.positions,
        num_warps=tile.warps,
    )
    total = partial.sum(1) if chunks > 1 else partial
    return total.to(x.dtype).view(shape)


# --- convolutions with a weight for each class --------------------------------------------------


def _by_class(
    images: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    shape: Sequence[int],
    linear: Callable[[Tensor, Tensor], Tensor],
    convolution: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """The classes' results one after the other.

    Args:
        linear: (C, n, width) and (C, O, I) to (C, n, width).
        convolution: of images whose channels are in so many groups.
    """
    if 0 in (*shape, *images.shape):
        return images.new_zeros(list(shape)).contiguous(memory_format=memory_format(images))
    classes = len(counts)
    if len(set(counts)) > 1:
        parts = [
            _by_class(part, weight[c : c + 1], [count], (count, *shape[1:]), linear, convolution)
            for c, (part, count) in enumerate(zip(images.split(list(counts)), counts, strict=True))
            if count
        ]
        return torch.cat(parts).contiguous(memory_format=memory_format(images))
    if images.dim() == 2:
        return linear(images.reshape(classes, counts[0], -1), weight).reshape(shape)
    # The classes side by side, as groups of channels.
    folded = _moved(images, classes, counts[0])
    stacked = weight.reshape(-1, *weight.shape[2:])
    result = convolution(folded, stacked, classes)
    return _moved_back(result, classes).contiguous(memory_format=memory_format(images))


def _moved(x: Tensor, classes: int, count: int) -> Tensor:
    """(classes count, channels, H, W) to (count, classes channels, H, W), in the format of x."""
    if classes == 1:
        return x
    _, channels, height, width = x.shape
    if memory_format(x) is torch.channels_last:
        split = x.permute(0, 2, 3, 1).reshape(classes, count, height, width, channels)
        return split.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)
    return x.reshape(classes, count, channels, height, width).transpose(0, 1).flatten(1, 2)


def _moved_back(x: Tensor, classes: int) -> Tensor:
    """The inverse of `_moved`."""
    if classes == 1:
        return x
    split = x.unflatten(1, (classes, -1))
    return split.transpose(0, 1).flatten(0, 1)


def class_conv(
    x: Tensor, weight: Tensor, counts: Sequence[int], padding: int = 0, algorithm: str = "auto"
) -> Tensor:
    """The operator of the same name, by grouped convolution where the classes are equal in size."""
    shape = conv_shape(x, weight, counts, padding, algorithm)
    return _by_class(
        x,
        weight,
        counts,
        shape,
        lambda images, w: torch.bmm(images, w.transpose(1, 2)),
        lambda images, w, groups: functional.conv2d(images, w, padding=padding, groups=groups),
    )


def class_input_grad(
    grad: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    size: Sequence[int],
    padding: int = 0,
    algorithm: str = "auto",
) -> Tensor:
    """The operator of the same name, by grouped convolution where the classes are equal in size."""
    shape = input_grad_shape(grad, weight, counts, size, padding, algorithm)
    return _by_class(
        grad,
        weight,
        counts,
        shape,
        torch.bmm,
        lambda images, w, groups: functional.conv_transpose2d(
            images, w, padding=padding, groups=groups
        ),
    )


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """(kernel, argument types, constants, options) of representative variants."""
    variants: list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]] = []
    integers = dict.fromkeys(weight_grad_kernel.arg_names, "i32")
    integers |= dict.fromkeys(("x_image", "grad_image", "images"), "i64")
    for dtype, kind, outputs, columns, ragged in (
        ("fp32", "float32", 128, 1152, False),
        ("fp32", "float32", 128, 27, True),
        ("fp32", "tf32", 128, 1152, True),
        ("bf16", "half", 128, 1152, False),
        ("fp16", "half", 10, 2048, False),
        ("fp64", "float64", 128, 1152, False),
    ):
        tile = choose_tile(outputs, columns, 1 << 16, kind)
        wide = "fp64" if kind == "float64" else "fp32"
        types = integers | {"x": f"*{dtype}", "grad": f"*{dtype}", "partial": f"*{wide}"}
        types["first_image"] = "*i64"
        operand = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(dtype, tl.float32)
        size = 1 if columns == 2048 else 3
        constants: dict[str, object] = {
            "KERNEL_HEIGHT": size,
            "KERNEL_WIDTH": size,
            "RAGGED": ragged,
            "ACC": tl.float64 if kind == "float64" else tl.float32,
            "OPERAND": operand,
            "PRECISION": {"tf32": "tf32", "float64": "double"}.get(kind, "ieee"),
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "POSITIONS": tile.positions,
        }
        variants.append((weight_grad_kernel, types, constants, {"num_warps": tile.warps}))
    # A launch turns every size of one into a constant.
    kernel, types, constants, options = variants[1]
    ones = {name: 1 for name, kind in types.items() if kind in ("i32", "i64")}
    return [*variants, (kernel, types, ones | constants, options)]
