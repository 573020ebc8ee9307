"""Triton kernels of `characteristic_function` and its derivative.

A program computes the products <t, x> of a tile of frequencies with a chunk of one class's rows,
tile by tile, and adds up their cosines and sines; the chunks are added afterwards in a fixed order.
No atomics: the same bits in every run. Frequencies are loaded, or drawn where they are needed, see
kernels/frequencies.py. The backward turns products, kept or computed again by blocks of
frequencies, into weights; the products of these with given matrices are the vendor's library's.
float64 is left to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.kernels.class_weight_grad import tensor_float_allowed
from ddfast.kernels.frequencies import drawn
from ddfast.layout import readable
from ddfast.reference import characteristic_function as reference
from ddfast.reference.characteristic_function import wide_dtype

#: Sizes of a tile of products.
FREQUENCIES, ROWS = 64, 64
#: Frequencies of one step of a product with drawn ones.
STEP = 16
WARPS = 8
MAX_CHUNKS = 16
WEIGHTS_BYTES = 256 << 20
HALVES = (torch.float16, torch.bfloat16)


def chunk_size(rows: int) -> int:
    """Rows that one program adds up: tiles of a number that depends on nothing else."""
    return ROWS * max(1, -(-rows // (ROWS * MAX_CHUNKS)))


@triton.jit
def _features(x, r, end, x_row, j, width, DEPTH: tl.constexpr):
    """Features j to j + DEPTH of rows r, (DEPTH, rows)."""
    k = j + tl.arange(0, DEPTH)
    inside = (r < end)[None, :] & (k < width)[:, None]
    return tl.load(x + r[None, :] * x_row + k[:, None], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["seed", "stream", "scale"])
def wave_kernel(
    x,
    t,  # anything if DRAWN
    partial,  # (classes, chunks, count, 2)
    phase,  # (classes, rows, count), or anything if not KEEP
    x_class,
    x_row,
    t_class,
    t_row,
    rows,
    first,  # of the frequencies
    count,
    width,
    chunk,  # rows per program
    chunks,
    tiles,
    seed,
    stream,
    scale,
    DRAWN: tl.constexpr,
    KEEP: tl.constexpr,
    OPERAND: tl.constexpr,  # what the matrix units are given
    PRECISION: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    part = program // tiles % chunks
    c = program // tiles // chunks
    begin = part * chunk
    end = tl.minimum(begin + chunk, rows)
    x += c * x_class
    t += c * t_class
    m = tile * FREQUENCIES + tl.arange(0, FREQUENCIES)
    cosines = tl.zeros([FREQUENCIES], tl.float32)
    sines = tl.zeros([FREQUENCIES], tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        total = tl.zeros([FREQUENCIES, ROWS], tl.float32)
        if DRAWN:
            for j in range(0, width, 64):
                # Of features beyond the width, those of x are 0.
                words = drawn(first + m, j, seed, stream + c, scale, FREQUENCIES)
                for w in tl.static_range(4):
                    b = _features(x, r, end, x_row, j + 16 * w, width, 16).to(tl.float32)
                    total = tl.dot(words[w], b, total, input_precision=PRECISION)
        else:
            for j in range(0, width, DEPTH):
                b = _features(x, r, end, x_row, j, width, DEPTH).to(OPERAND)
                k = j + tl.arange(0, DEPTH)
                inside = (m < count)[:, None] & (k < width)[None, :]
                at = (first + m)[:, None] * t_row + k[None, :]
                a = tl.load(t + at, mask=inside, other=0.0).to(OPERAND)
                total = tl.dot(a, b, total, input_precision=PRECISION)
        if KEEP:
            inside = (m < count)[:, None] & (r < end)[None, :]
            tl.store(phase + (c * rows + r)[None, :] * count + m[:, None], total, mask=inside)
        cosines += tl.sum(tl.where((r < end)[None, :], tl.cos(total), 0.0), 1)
        sines += tl.sum(tl.where((r < end)[None, :], tl.sin(total), 0.0), 1)
    target = partial + ((c * chunks + part) * count + m) * 2
    tl.store(target, cosines, mask=m < count)
    tl.store(target + 1, sines, mask=m < count)


@triton.jit
def weigh_kernel(
    phase,  # (classes, rows, phase_count), from frequency `first` on
    grad,  # (classes, all_count, 2)
    out,  # (classes, rows, count)
    rows,
    first,  # of the frequencies in grad
    phase_first,  # of the frequencies in phase
    phase_count,
    all_count,
    count,
    tiles,
    FREQUENCIES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    m = (program % tiles) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    row = program // tiles  # of all classes
    c = row // rows
    inside = m < count
    angle = tl.load(phase + row * phase_count + phase_first + m, mask=inside, other=0.0)
    real = tl.load(grad + (c * all_count + first + m) * 2, mask=inside, other=0.0)
    imaginary = tl.load(grad + (c * all_count + first + m) * 2 + 1, mask=inside, other=0.0)
    value = imaginary / rows * tl.cos(angle) - real / rows * tl.sin(angle)
    tl.store(out + row * count + m, value, mask=inside)


@triton.jit(do_not_specialize=["seed", "stream", "scale"])
def drawn_product_kernel(
    weights,  # (classes, rows, count)
    out,  # (classes, rows, width)
    rows,
    first,
    count,
    width,
    row_tiles,
    tiles,
    seed,
    stream,
    scale,
    PRECISION: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = program % tiles * 64
    r = program // tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    c = program // tiles // row_tiles
    total = tl.zeros([ROWS, 16], tl.float32)
    total_b, total_c, total_d = total, total, total
    for start in range(0, count, FREQUENCIES):
        m = start + tl.arange(0, FREQUENCIES)
        inside = (r < rows)[:, None] & (m < count)[None, :]
        at = (c * rows + r)[:, None] * count + m[None, :]
        w = tl.load(weights + at, mask=inside, other=0.0)
        a, b, u, v = drawn(first + m, column, seed, stream + c, scale, FREQUENCIES)
        total = tl.dot(w, a, total, input_precision=PRECISION)
        total_b = tl.dot(w, b, total_b, input_precision=PRECISION)
        total_c = tl.dot(w, u, total_c, input_precision=PRECISION)
        total_d = tl.dot(w, v, total_d, input_precision=PRECISION)
    k = column + tl.arange(0, 16)
    inside = (r < rows)[:, None]
    target = out + (c * rows + r)[:, None] * width + k[None, :]
    tl.store(target, total, mask=inside & (k < width)[None, :])
    tl.store(target + 16, total_b, mask=inside & (k + 16 < width)[None, :])
    tl.store(target + 32, total_c, mask=inside & (k + 32 < width)[None, :])
    tl.store(target + 48, total_d, mask=inside & (k + 48 < width)[None, :])


def _precision() -> str:
    return "tf32" if tensor_float_allowed() else "ieee"


def _depth(operand: Any, precision: str) -> int:
    """Features of one step: few without matrix units, whose operands are then in registers."""
    return 16 if operand == tl.float32 and precision == "ieee" else 32


def _waves(
    x: Tensor,
    t: Tensor | None,
    drawn: tuple[int, float, int],
    first: int,
    count: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Means of cosines and sines for frequencies `first` to `first + count`, and the products."""
    classes, rows, width = x.shape
    x, t = readable(x), None if t is None else readable(t)
    halves = t is not None and t.dtype == x.dtype and x.dtype in HALVES
    # The interpreter multiplies bfloat16 as if it were integers.
    halves = halves and not triton.knobs.runtime.interpret
    operand = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype, tl.float32)
    chunk = chunk_size(rows)
    chunks, tiles = -(-rows // chunk), -(-count // FREQUENCIES)
    partial = torch.empty(classes, chunks, count, 2, dtype=torch.float32, device=x.device)
    phase = partial.new_empty((classes, rows, count) if keep else 0)
    if partial.numel():
        seed, scale, stream = drawn
        wave_kernel[(classes * chunks * tiles,)](
            x,
            x if t is None else t,
            partial,
            phase,
            x.stride(0),
            x.stride(1),
            0 if t is None or t.shape[0] == 1 else t.stride(0),
            0 if t is None else t.stride(1),
            rows,
            first,
            count,
            width,
            chunk,
            chunks,
            tiles,
            seed,
            stream,
            scale,
            DRAWN=t is None,
            KEEP=keep,
            OPERAND=operand if halves else tl.float32,
            PRECISION=_precision(),
            FREQUENCIES=FREQUENCIES,
            ROWS=ROWS,
            DEPTH=_depth(operand if halves else tl.float32, _precision()),
            num_warps=WARPS,
        )
    return partial.sum(1) / rows, phase


def characteristic_function(
    x: Tensor,
    t: Tensor | None,
    count: int,
    seed: int,
    scale: float,
    stream: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator of the same name; see ddfast/reference/characteristic_function.py."""
    if wide_dtype(x, t) == torch.float64:
        return reference.characteristic_function(x, t, count, seed, scale, stream, keep)
    count = count if t is None else t.shape[1]
    return _waves(x, t, (seed, scale, stream), 0, count, keep)


def characteristic_function_bwd(
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    phase: Tensor,
    count: int,
    seed: int,
    scale: float,
    stream: int,
    by_x: bool,
    by_t: bool,
) -> tuple[Tensor, Tensor]:
    """The operator of the same name."""
    if wide_dtype(x, t) == torch.float64:
        return reference.characteristic_function_bwd(
            grad, x, t, phase, count, seed, scale, stream, by_x, by_t
        )
    classes, rows, width = x.shape
    count = count if t is None else t.shape[1]
    grad = grad.contiguous()
    grad_x = torch.zeros(x.shape if by_x else 0, dtype=torch.float32, device=x.device)
    shape = t.shape if by_t and t is not None else (0,)
    grad_t = torch.zeros(shape, dtype=torch.float32, device=x.device)
    slab = max(1, WEIGHTS_BYTES // (4 * max(1, classes * rows)))
    slab = count if slab >= count else max(FREQUENCIES, slab // FREQUENCIES * FREQUENCIES)
    for first in range(0, count if classes else 0, slab):
        some = min(slab, count - first)
        kept, offset = phase, first
        if not phase.numel():
            kept, offset = _waves(x, t, (seed, scale, stream), first, some, True)[1], 0
        weights = kept if not phase.numel() else grad.new_empty(classes, rows, some)
        tiles = -(-some // 256)
        weigh_kernel[(classes * rows * tiles,)](
            kept,
            grad,
            weights,
            rows,
            first,
            offset,
            kept.shape[2],
            count,
            some,
            tiles,
            FREQUENCIES=256,
        )
        if by_x and t is not None:
            grad_x += weights @ t[:, first : first + some].float()
        elif by_x:
            part = grad_x if some == count else torch.empty_like(grad_x)
            _drawn_product(weights, part, first, seed, scale, stream)
            if part is not grad_x:
                grad_x += part
        if by_t and t is not None and t.shape[0] == 1:
            flat = weights.view(classes * rows, some).T @ x.reshape(classes * rows, width).float()
            grad_t[0, first : first + some] = flat
        elif by_t:
            grad_t[:, first : first + some] = weights.mT @ x.float()
    return grad_x.to(x.dtype), grad_t if t is None else grad_t.to(t.dtype)


def _drawn_product(
    weights: Tensor, out: Tensor, first: int, seed: int, scale: float, stream: int
) -> None:
    classes, rows, width = out.shape
    row_tiles, tiles = -(-rows // ROWS), -(-width // 64)
    if out.numel():
        drawn_product_kernel[(classes * row_tiles * tiles,)](
            weights,
            out,
            rows,
            first,
            weights.shape[2],
            width,
            row_tiles,
            tiles,
            seed,
            stream,
            scale,
            PRECISION=_precision(),
            FREQUENCIES=STEP,
            ROWS=ROWS,
            num_warps=WARPS,
        )


def ahead_of_time() -> list[tuple[Any, ...]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    variants: list[tuple[Any, ...]] = []
    integers = (
        "x_class x_row t_class t_row rows first count width chunk chunks tiles seed stream "
        "phase_first phase_count all_count row_tiles"
    )
    types = dict.fromkeys(integers.split(), "i64") | {"scale": "fp32"}
    types |= dict.fromkeys(("partial", "phase", "grad", "out", "weights"), "*fp32")
    tile: dict[str, Any] = {"FREQUENCIES": FREQUENCIES, "ROWS": ROWS}
    for dtype, precision in (("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee")):
        for own in (False, True):  # frequencies
            operand = tl.bfloat16 if dtype == "bf16" and not own else tl.float32
            constants = tile | {"DRAWN": own, "KEEP": own == (dtype == "bf16")}
            constants |= {"OPERAND": operand, "PRECISION": precision}
            constants["DEPTH"] = _depth(operand, precision)
            given = types | {"x": f"*{dtype}", "t": f"*{dtype}"}
            variants.append((wave_kernel, given, constants, {"num_warps": WARPS}))
        if dtype == "fp32":
            step = tile | {"PRECISION": precision, "FREQUENCIES": STEP}
            variants.append((drawn_product_kernel, types, step, {"num_warps": WARPS}))
    variants.append((weigh_kernel, types, {"FREQUENCIES": 256}))
    # A launch turns every size of one into a constant.
    sizes = set(integers.split()) - {"seed", "stream"}
    for kernel, given, constants, *rest in (*variants[:3], variants[-1]):
        ones = dict.fromkeys(sizes & set(kernel.arg_names), 1)
        variants.append((kernel, given, constants | ones, *rest))
    return variants
