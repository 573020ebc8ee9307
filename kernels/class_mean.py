"""Triton kernels of `class_mean` and `class_mean_distance`: partial sums of rows, then the means.

A program of the first pass adds up a chunk of one class's rows over a tile of columns; a program of
the second adds the chunks of one class and tile, divides, subtracts and squares. No atomics: the
same bits in every run. Rows may have any stride; classes of unequal size are found by the index of
their first row.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator

TILE_COLUMNS = 128
TILE_ROWS = 16
MAX_CHUNKS = 64


def chunk_size(rows: int) -> int:
    """Rows that one program adds up: a power of two from 64 on, at most MAX_CHUNKS chunks."""
    return max(64, triton.next_power_of_2(-(-rows // MAX_CHUNKS)))


@triton.jit
def sum_kernel(
    x,
    partial,  # (classes, chunks, width)
    first_row,  # (classes + 1,) int64, or anything if not RAGGED
    class_stride,
    row_stride,
    rows,  # of every class if not RAGGED
    width,
    chunk,  # rows per program
    chunks,
    tiles,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    part = (program // tiles) % chunks
    c = program // tiles // chunks
    begin = part * chunk
    if RAGGED:
        base = tl.load(first_row + c) * row_stride
        end = tl.minimum(begin + chunk, tl.load(first_row + c + 1) - tl.load(first_row + c))
    else:
        base = c * class_stride
        end = tl.minimum(begin + chunk, rows)
    columns = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], ACC)
    for start in range(begin, end, TILE_ROWS):
        r = start + tl.arange(0, TILE_ROWS)
        inside = (r < end)[:, None] & (columns < width)[None, :]
        offsets = base + r[:, None] * row_stride + columns[None, :]
        total += tl.load(x + offsets, mask=inside, other=0.0).to(ACC)
    target = partial + (c * chunks + part) * width + columns
    tl.store(target, tl.sum(total, 0), mask=columns < width)


@triton.jit
def _mean(
    partial,
    first_row,
    c,
    columns,
    rows,
    width,
    chunks,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    total = tl.zeros([TILE_COLUMNS], ACC)
    for part in range(chunks):
        source = partial + (c * chunks + part) * width + columns
        total += tl.load(source, mask=columns < width, other=0.0)
    if RAGGED:
        count = (tl.load(first_row + c + 1) - tl.load(first_row + c)).to(ACC)
        mean = total / count
    else:
        mean = total / rows
    return mean


@triton.jit
def mean_kernel(
    syn_partial,
    real_partial,  # this, the next two and the real sizes: anything if not HAS_REAL
    real_first_row,
    squares,  # (classes, tiles)
    out,  # (classes, width)
    syn_first_row,
    syn_rows,
    real_rows,
    syn_chunks,
    real_chunks,
    width,
    tiles,
    HAS_REAL: tl.constexpr,
    SYN_RAGGED: tl.constexpr,
    REAL_RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = program // tiles
    columns = (program % tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < width
    mean = _mean(
        syn_partial,
        syn_first_row,
        c,
        columns,
        syn_rows,
        width,
        syn_chunks,
        SYN_RAGGED,
        ACC,
        TILE_COLUMNS,
    )
    if HAS_REAL:
        mean -= _mean(
            real_partial,
            real_first_row,
            c,
            columns,
            real_rows,
            width,
            real_chunks,
            REAL_RAGGED,
            ACC,
            TILE_COLUMNS,
        )
        tl.store(squares + program, tl.sum(tl.where(inside, mean * mean, 0.0), 0))
    tl.store(out + c * width + columns, mean, mask=inside)


def _partial_sums(
    x: Tensor, counts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, int, int, bool]:
    """First pass: (sums of chunks, first row of each class, rows, chunks, classes are ragged)."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    ragged = x.dim() == 2
    width = x.shape[-1]
    if ragged:
        starts = list(itertools.accumulate(counts, initial=0))
        first_row = torch.tensor(starts, dtype=torch.int64, device=x.device)
        classes, rows = len(counts), max(counts, default=0)
    else:
        first_row, classes, rows = x, x.shape[0], x.shape[1]
    chunk = chunk_size(rows)
    chunks = max(1, -(-rows // chunk))
    tiles = -(-width // TILE_COLUMNS)
    partial = torch.empty(classes, chunks, width, dtype=dtype, device=x.device)
    if partial.numel():
        sum_kernel[(classes * chunks * tiles,)](
            x,
            partial,
            first_row,
            x.stride(0),
            x.stride(-2),
            rows,
            width,
            chunk,
            chunks,
            tiles,
            RAGGED=ragged,
            ACC=_acc(dtype),
            TILE_ROWS=TILE_ROWS,
            TILE_COLUMNS=TILE_COLUMNS,
        )
    return partial, first_row, rows, chunks, ragged


def _acc(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _means(
    syn: Tensor, real: Tensor | None, syn_counts: list[int], real_counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Both passes: (sums of squares per tile, mean of syn less that of real if given)."""
    both = syn.dtype if real is None else torch.promote_types(syn.dtype, real.dtype)
    dtype = accumulator(both)
    partial, first, rows, chunks, ragged = _partial_sums(syn, syn_counts, dtype)
    other = (partial, first, rows, chunks, ragged)
    if real is not None:
        other = _partial_sums(real, real_counts, dtype)
    classes, _, width = partial.shape
    tiles = -(-width // TILE_COLUMNS)
    out = partial.new_empty(classes, width)
    squares = partial.new_empty(classes, tiles if real is not None else 0)
    if out.numel():
        mean_kernel[(classes * tiles,)](
            partial,
            other[0],
            other[1],
            squares,
            out,
            first,
            rows,
            other[2],
            chunks,
            other[3],
            width,
            tiles,
            HAS_REAL=real is not None,
            SYN_RAGGED=ragged,
            REAL_RAGGED=other[4],
            ACC=_acc(dtype),
            TILE_COLUMNS=TILE_COLUMNS,
        )
    return squares, out


def class_mean(x: Tensor, counts: list[int]) -> Tensor:
    """The operator of the same name; see ddfast/ops/class_mean.py."""
    return _means(x, None, counts, [])[1]


def class_mean_distance(
    syn: Tensor, real: Tensor, syn_counts: list[int], real_counts: list[int]
) -> tuple[Tensor, Tensor]:
    """The operator of the same name."""
    squares, difference = _means(syn, real, syn_counts, real_counts)
    return squares.sum(1), difference


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    variants: list[tuple[object, dict[str, str], dict[str, object]]] = []
    sizes = {
        sum_kernel: ("class_stride", "row_stride", "rows", "width", "chunk", "chunks", "tiles"),
        mean_kernel: ("syn_rows", "real_rows", "syn_chunks", "real_chunks", "width", "tiles"),
    }
    integers = dict.fromkeys(itertools.chain(*sizes.values()), "i64")
    firsts = dict.fromkeys(("first_row", "syn_first_row", "real_first_row"), "*i64")
    sums = ("partial", "syn_partial", "real_partial", "squares", "out")
    for dtype, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        types = integers | firsts | dict.fromkeys(sums, f"*{wide}") | {"x": f"*{dtype}"}
        acc = tl.float64 if wide == "fp64" else tl.float32
        tile = {"ACC": acc, "TILE_COLUMNS": TILE_COLUMNS}
        for ragged in (False, True):
            variants.append((sum_kernel, types, tile | {"RAGGED": ragged, "TILE_ROWS": TILE_ROWS}))
            flags = {"HAS_REAL": ragged, "SYN_RAGGED": ragged, "REAL_RAGGED": ragged}
            if dtype == wide:
                variants.append((mean_kernel, types, tile | flags))
    # A launch turns every size of one into a constant.
    return variants + [(k, types, c | dict.fromkeys(sizes[k], 1)) for k, types, c in variants]
