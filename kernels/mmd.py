"""Triton kernels of `mmd`: sums of the kernel over tiles of pairs, and the gradient of rows.

A program of the first kernel takes one tile of pairs and writes one sum; of two equal sets only the
upper half. A program of the second takes a tile of rows and a chunk of the tiles that meet it, and
adds up the rows' gradient in memory of its own; chunks are added afterwards in a fixed order. No
n x m matrix and no atomics: the same bits in every run. Rows may have any stride.

Squared distances come from inner products of centred rows; pairs that are close are computed from
differences (all pairs, in float64), as in the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.kernels.mmd_parts import POLYNOMIAL, inner, kernel_of, pairs
from ddfast.layout import readable
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.mmd import KERNELS, rates_of

DEPTH = 16
#: Programs that fill any GPU; a constant, so that results do not depend on it.
PROGRAMS = 512
MAX_CHUNKS = 4


#: Largest tiles, in rows, and options of the compiler: without tensor cores a product keeps its
#: operands in registers, and two products in one kernel need smaller tiles to fit.
SUM_TILE, SUM_OPTIONS = 32, {"num_warps": 8}
GRADIENT_TILE, GRADIENT_OPTIONS = 32, {"num_warps": 8}


def tile_size(rows: int, largest: int) -> int:
    """Rows of a tile."""
    return max(16, min(largest, triton.next_power_of_2(rows)))


@triton.jit
def sum_kernel(
    a,
    b,
    centre,  # (classes, width), anything if not DISTANCE
    rates,  # (classes, BANDWIDTHS)
    partial,  # (classes, tiles of a, tiles of b)
    n,
    m,
    width,
    a_class,
    a_row,
    b_class,
    b_row,
    a_tiles,
    b_tiles,
    SELF: tl.constexpr,  # a and b are one set: the upper half, counted twice
    DIAGONAL: tl.constexpr,  # with the pairs of a row with itself
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    right_tile = program % b_tiles
    left_tile = program // b_tiles % a_tiles
    c = program // b_tiles // a_tiles
    total = tl.sum(tl.zeros([TILE], ACC), 0)
    if (not SELF) or (right_tile >= left_tile):
        i = left_tile * TILE + tl.arange(0, TILE)
        j = right_tile * TILE + tl.arange(0, TILE)
        s, _, _ = pairs(
            a + c * a_class,
            b + c * b_class,
            centre + c * width,
            i,
            j,
            n,
            m,
            width,
            a_row,
            b_row,
            SELF,
            KIND != POLYNOMIAL,
            DOT,
            ACC,
            TILE,
            DEPTH,
        )
        value, _ = kernel_of(s, rates + c * BANDWIDTHS, KIND, DEGREE, BANDWIDTHS)
        inside = (i < n)[:, None] & (j < m)[None, :]
        if SELF and not DIAGONAL:
            inside = inside & (i[:, None] != j[None, :])
        total = tl.sum(tl.sum(tl.where(inside, value, 0.0), 1), 0)
        if SELF:
            total = tl.where(right_tile > left_tile, 2 * total, total)
    tl.store(partial + program, total)


@triton.jit
def gradient_kernel(
    a,
    b,
    centre,
    rates,
    out,  # (classes, chunks, n, width), zeros
    n,
    m,
    width,
    a_class,
    a_row,
    b_class,
    b_row,
    a_tiles,
    b_tiles,
    chunk,  # tiles of b per program
    chunks,
    SELF: tl.constexpr,
    DIAGONAL: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = program % chunks
    left_tile = program // chunks % a_tiles
    c = program // chunks // a_tiles
    a += c * a_class
    b += c * b_class
    centre += c * width
    DISTANCE: tl.constexpr = KIND != POLYNOMIAL
    i = left_tile * TILE + tl.arange(0, TILE)
    target = out + (c * chunks + part) * n * width + i * width
    for right_tile in range(part * chunk, tl.minimum((part + 1) * chunk, b_tiles)):
        j = right_tile * TILE + tl.arange(0, TILE).to(tl.int64)
        s, near, some = pairs(
            a, b, centre, i, j, n, m, width, a_row, b_row, SELF, DISTANCE, DOT, ACC, TILE, DEPTH
        )
        _, slope = kernel_of(s, rates + c * BANDWIDTHS, KIND, DEGREE, BANDWIDTHS)
        inside = (i < n)[:, None] & (j < m)[None, :]
        if SELF and not DIAGONAL:
            inside = inside & (i[:, None] != j[None, :])
        slope = tl.where(inside, slope, 0.0)
        if DOT:
            far = slope
            if DISTANCE:
                far = tl.where(near, 0.0, slope)
                own = tl.sum(far, 1)
            for start in range(0, width, DEPTH):
                k = start + tl.arange(0, DEPTH)
                of_left = (i < n)[:, None] & (k < width)[None, :]
                of_right = (j < m)[:, None] & (k < width)[None, :]
                right = tl.load(b + j[:, None] * b_row + k[None, :], mask=of_right, other=0.0)
                right = right.to(ACC)
                if DISTANCE:
                    middle = tl.load(centre + k, mask=k < width, other=0.0)
                    right = tl.where(of_right, right - middle[None, :], 0.0)
                step = inner(far, right, tl.zeros([TILE, DEPTH], ACC), "ieee")
                if DISTANCE:
                    left = tl.load(a + i[:, None] * a_row + k[None, :], mask=of_left, other=0.0)
                    step -= own[:, None] * (left.to(ACC) - middle[None, :])
                at = target[:, None] + k[None, :]
                tl.store(at, tl.load(at, mask=of_left, other=0.0) + step, mask=of_left)
            # What follows reads what other threads of this program wrote.
            tl.debug_barrier()
        if DISTANCE or not DOT:  # noqa: SIM102 - known when the kernel is compiled, unlike the next
            if some > 0:
                close = tl.where(near, slope, 0.0)
                for k in range(width):
                    right = tl.load(b + j * b_row + k, mask=j < m, other=0.0).to(ACC)
                    if DISTANCE:
                        left = tl.load(a + i * a_row + k, mask=i < n, other=0.0).to(ACC)
                        step = tl.sum(close * (right[None, :] - left[:, None]), 1)
                    else:
                        step = tl.sum(close * right[None, :], 1)
                    at = target + k
                    tl.store(at, tl.load(at, mask=i < n, other=0.0) + step, mask=i < n)
                tl.debug_barrier()


def _centre(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The pooled mean, (classes, width)."""
    rows = x.shape[1] + y.shape[1]
    total = x.sum(1, dtype=dtype) + y.sum(1, dtype=dtype)
    return (total / rows).contiguous()


class _Pass:
    """What all launches of one call share."""

    def __init__(
        self, x: Tensor, y: Tensor, bandwidths: Tensor, kernel: str, degree: int, unbiased: bool
    ) -> None:
        self.dtype = accumulator(torch.promote_types(x.dtype, y.dtype))
        self.rates = rates_of(bandwidths.to(self.dtype)).flatten(1).contiguous()
        self.centre = self.rates if kernel == "polynomial" else _centre(x, y, self.dtype)
        self.constants = {
            "KIND": KERNELS.index(kernel),
            "DEGREE": degree if kernel == "polynomial" else 1,
            "BANDWIDTHS": self.rates.shape[1],
            "DOT": self.dtype == torch.float32,
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "DEPTH": DEPTH,
            # Equal rows have no slope, and the kernel's largest value, which is added without
            # rounding.
            "DIAGONAL": kernel == "polynomial" and not unbiased,
        }

    @staticmethod
    def _arguments(a: Tensor, b: Tensor, tile: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        tiles = triton.cdiv(a.shape[1], tile), triton.cdiv(b.shape[1], tile)
        sizes = (a.shape[1], b.shape[1], a.shape[2])
        strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
        return (*sizes, *strides, *tiles), tiles

    def sum(self, a: Tensor, b: Tensor, same: bool) -> Tensor:
        """Sum of the kernel over all pairs, (classes,), in float64; same: both are one set."""
        tile = tile_size(max(a.shape[1], b.shape[1]), SUM_TILE)
        sizes, tiles = self._arguments(a, b, tile)
        partial = torch.empty(a.shape[0], *tiles, dtype=self.dtype, device=a.device)
        grid = (partial.numel(),)
        sum_kernel[grid](
            a,
            b,
            self.centre,
            self.rates,
            partial,
            *sizes,
            SELF=same,
            TILE=tile,
            **self.constants,
            **SUM_OPTIONS,
        )
        return partial.flatten(1).sum(1, dtype=torch.float64)

    def gradient(self, a: Tensor, b: Tensor, same: bool) -> Tensor:
        """Sum over the rows of b of the gradient of K by each row of a."""
        tile = tile_size(max(a.shape[1], b.shape[1]), GRADIENT_TILE)
        sizes, tiles = self._arguments(a, b, tile)
        classes = a.shape[0]
        chunks = max(1, min(MAX_CHUNKS, tiles[1], PROGRAMS // (classes * tiles[0])))
        chunk = triton.cdiv(tiles[1], chunks)
        chunks = triton.cdiv(tiles[1], chunk)
        out = torch.zeros(classes, chunks, *a.shape[1:], dtype=self.dtype, device=a.device)
        gradient_kernel[(classes * tiles[0] * chunks,)](
            a,
            b,
            self.centre,
            self.rates,
            out,
            *sizes,
            chunk,
            chunks,
            SELF=same,
            TILE=tile,
            **self.constants,
            **GRADIENT_OPTIONS,
        )
        return out.sum(1) if chunks > 1 else out[:, 0]


def _linear(
    x: Tensor, y: Tensor, unbiased: bool, grad: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor]]:
    """The linear kernel in closed form: means, less their variances if unbiased."""
    dtype = accumulator(torch.promote_types(x.dtype, y.dtype))
    origin = x[:, :1].to(dtype)
    centred = [t.to(dtype) - origin for t in (x, y)]
    means = [t.mean(1, keepdim=True) for t in centred]
    difference = means[0] - means[1]
    value, gradients = (difference**2).sum((1, 2)), []
    for rows, mean, sign, need in zip(centred, means, (1, -1), needed, strict=True):
        n = rows.shape[1]
        by = (2 * sign / n) * difference
        if unbiased:
            apart = rows - mean
            value = value - (apart**2).sum((1, 2)) / (n * (n - 1))
            by = by - (2 / (n * (n - 1))) * apart
        if need:
            gradients.append((grad.to(dtype)[:, None, None] * by).expand(rows.shape).contiguous())
    return value, gradients


def mmd(
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The operator of the same name; see ddfast/ops/mmd.py."""
    ones = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    if kernel == "linear":
        return _linear(x, y, unbiased, ones, (need_x, need_y))
    x, y = readable(x), readable(y)
    work = _Pass(x, y, bandwidths, kernel, degree, unbiased)
    if x.shape[0] == 0:
        return ones.to(work.dtype), _gradients(work, ones, x, y, unbiased, need_x, need_y)
    # The pairs of a row with itself are added without rounding.
    alone = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    if not unbiased and kernel in ("gaussian", "laplace"):
        alone = (work.rates != 0).sum(1, dtype=torch.float64)
    value = -2 * work.sum(x, y, same=False) / (x.shape[1] * y.shape[1])
    for z in (x, y):
        rows = z.shape[1]
        value = value + (work.sum(z, z, same=True) + rows * alone) / (rows * (rows - int(unbiased)))
    gradients = _gradients(work, ones, x, y, unbiased, need_x, need_y)
    return value.to(work.dtype), gradients


def _gradients(
    work: _Pass, grad: Tensor, x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool
) -> list[Tensor]:
    results = []
    for need, a, b in ((need_x, x, y), (need_y, y, x)):
        if not need:
            continue
        if a.numel() == 0:
            results.append(a.new_zeros(a.shape, dtype=work.dtype))
            continue
        n, m = a.shape[1], b.shape[1]
        total = work.gradient(a, a, same=True) / (n * (n - int(unbiased)))
        total -= work.gradient(a, b, same=False) / (n * m)
        results.append(total.mul_(2 * grad.to(work.dtype)[:, None, None]))
    return results


def mmd_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    degree: int,
    unbiased: bool,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    """The operator of the same name."""
    if kernel == "linear":
        return _linear(x, y, unbiased, grad, (need_x, need_y))[1]
    x, y = readable(x), readable(y)
    work = _Pass(x, y, bandwidths, kernel, degree, unbiased)
    return _gradients(work, grad, x, y, unbiased, need_x, need_y)


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """(kernel, argument types, constants, options) of representative variants."""
    variants: list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]] = []
    for dtype, kernel, self, bandwidths in (
        ("fp32", "gaussian", False, 5),
        ("fp32", "gaussian", True, 5),
        ("fp32", "laplace", False, 1),
        ("fp32", "energy", True, 0),
        ("fp32", "polynomial", True, 0),
        ("bf16", "gaussian", False, 5),
        ("fp64", "gaussian", True, 5),
        ("fp64", "polynomial", False, 0),
    ):
        wide = "fp64" if dtype == "fp64" else "fp32"
        for function, tile, options in (
            (sum_kernel, SUM_TILE, SUM_OPTIONS),
            (gradient_kernel, GRADIENT_TILE, GRADIENT_OPTIONS),
        ):
            types = dict.fromkeys(function.arg_names, "i64")
            types |= {"a": f"*{dtype}", "b": f"*{dtype}"}
            types |= dict.fromkeys(("centre", "rates", "partial", "out"), f"*{wide}")
            constants: dict[str, object] = {
                "SELF": self,
                "DIAGONAL": kernel == "polynomial",
                "KIND": KERNELS.index(kernel),
                "DEGREE": 2,
                "BANDWIDTHS": bandwidths,
                "DOT": wide == "fp32",
                "ACC": tl.float64 if wide == "fp64" else tl.float32,
                "TILE": tile,
                "DEPTH": DEPTH,
            }
            variants.append((function, types, constants, options))
            if len(variants) == 2:  # a launch turns every size of one into a constant
                names = [name for name, kind in types.items() if kind == "i64"]
                ones = {name: 1 for name in names if name not in constants}
                variants.append((function, types, ones | constants, options))
    return variants
