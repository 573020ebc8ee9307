"""Triton kernels of `dense_kernel`: a tile of pairs, all layers in registers, and its gradient.

A program of the first kernel makes one tile of covariances (by a matrix product, in float64 by
torch's) and passes all layers over it before it is written. Of a set with itself the upper tiles
are computed and mirrored. A program of the second turns a tile of the cotangent into one by the
covariances of the first layer, recomputing the layers instead of keeping them, and adds up what
goes through the variances; two products of torch finish. No atomics: the same bits in every run.

The first product is in full float32 whatever torch allows for matrix products: an NTK loses half
the digits that its covariances lose. Pairs that are close are compared value by value, because
equal rows have a correlation of exactly one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.kernels.arc_cosine import order0_of, order1_of, part_of, slopes_of
from ddfast.kernels.dense_kernel_parts import covariances, equal_rows, pair, variances_of
from ddfast.layout import readable
from ddfast.reference.dense_kernel import common_dtype, variances

#: Sides of a tile that leave everything in registers.
FORWARD_TILE, FORWARD_OPTIONS = {torch.float32: 64, torch.float64: 32}, {"num_warps": 8}
BACKWARD_TILE, BACKWARD_OPTIONS = {torch.float32: 32, torch.float64: 16}, {"num_warps": 4}
DEPTH = 16  # columns of a product at once


@triton.jit
def forward_kernel(
    x,
    y,
    qx,  # (n,), variances behind the first layer
    qy,
    roots_x,  # (depth, n), their roots at each layer
    roots_y,
    inverses_x,  # (depth, n), the inverse roots
    inverses_y,
    gram,  # (n, m), read if not DOT, written if KEEP
    out,  # (n, m)
    n,
    m,
    width,
    x_row,
    y_row,
    right_tiles,
    scale,
    half,
    bias,
    NTK: tl.constexpr,
    LAYERS: tl.constexpr,
    SELF: tl.constexpr,
    DOT: tl.constexpr,
    KEEP: tl.constexpr,
    CLOSE: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    right_tile = program % right_tiles
    left_tile = program // right_tiles
    if (not SELF) or (right_tile >= left_tile):
        i = left_tile * TILE + tl.arange(0, TILE)
        j = right_tile * TILE + tl.arange(0, TILE)
        inside = (i < n)[:, None] & (j < m)[None, :]
        at = i[:, None] * m + j[None, :]
        mirrored = j[None, :] * m + i[:, None]
        upper = inside
        if SELF:
            upper = inside & (i[:, None] <= j[None, :])
        factor = tl.load(scale)
        slope = tl.load(half)
        constant = tl.load(bias)
        if DOT:
            k = covariances(x, y, i, j, n, m, width, x_row, y_row, ACC, TILE, COLUMNS)
        else:
            k = tl.load(gram + at, mask=inside, other=0.0)
        k = factor * k + constant
        p = pair(roots_x, roots_y, 0, i, j, n, m)
        same = equal_rows(x, y, k, p, i, j, n, m, width, x_row, y_row, CLOSE, SELF)
        k = tl.where(same, variances_of(qx, qy, i, j, n, m), k)
        if KEEP:
            tl.store(gram + at, k, mask=upper)
            if SELF:
                tl.store(gram + mirrored, k, mask=upper)
        tangent = k
        for layer in range(LAYERS):
            p = pair(roots_x, roots_y, layer, i, j, n, m)
            inverse = pair(inverses_x, inverses_y, layer, i, j, n, m)
            gap, t, root = part_of(k, p, inverse, same)
            order0 = order0_of(k, t, root)
            k = slope * order1_of(k, gap, t, root) + constant
            if NTK:
                tangent = k + slope * order0 * tangent
        result = tangent if NTK else k
        tl.store(out + at, result, mask=upper)
        if SELF:
            tl.store(out + mirrored, result, mask=upper)


@triton.jit
def backward_kernel(
    x,
    y,
    roots_x,
    roots_y,
    inverses_x,
    inverses_y,
    shares_x,  # (depth, n): half^layer / 2 q
    shares_y,
    gram,  # (n, m)
    grad,  # (n, m)
    by_gram,  # (n, m)
    by_qx,  # (tiles of y, n)
    by_qy,  # (tiles of x, m), not written if SELF
    n,
    m,
    width,
    x_row,
    y_row,
    right_tiles,
    half,
    bias,
    NTK: tl.constexpr,
    LAYERS: tl.constexpr,
    SELF: tl.constexpr,
    CLOSE: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    right_tile = program % right_tiles
    left_tile = program // right_tiles
    i = left_tile * TILE + tl.arange(0, TILE)
    j = right_tile * TILE + tl.arange(0, TILE)
    inside = (i < n)[:, None] & (j < m)[None, :]
    at = i[:, None] * m + j[None, :]
    slope = tl.load(half)
    constant = tl.load(bias)
    first = tl.load(gram + at, mask=inside, other=0.0)
    cotangent = tl.load(grad + at, mask=inside, other=0.0)
    if SELF:
        cotangent += tl.load(grad + j[None, :] * m + i[:, None], mask=inside, other=0.0)
    p = pair(roots_x, roots_y, 0, i, j, n, m)
    same = equal_rows(x, y, first, p, i, j, n, m, width, x_row, y_row, CLOSE, SELF)
    by_k = tl.zeros([TILE, TILE], ACC) if NTK else cotangent
    by_tangent = cotangent if NTK else tl.zeros([TILE, TILE], ACC)
    rows = tl.zeros([TILE], ACC)
    columns = tl.zeros([TILE], ACC)
    for back in range(LAYERS):
        # The layers in front of this one, again: cheaper than keeping them.
        k = first
        tangent = first
        for layer in range(LAYERS - 1 - back):
            p = pair(roots_x, roots_y, layer, i, j, n, m)
            inverse = pair(inverses_x, inverses_y, layer, i, j, n, m)
            gap, t, root = part_of(k, p, inverse, same)
            order0 = order0_of(k, t, root)
            k = slope * order1_of(k, gap, t, root) + constant
            tangent = k + slope * order0 * tangent
        p = pair(roots_x, roots_y, LAYERS - 1 - back, i, j, n, m)
        inverse = pair(inverses_x, inverses_y, LAYERS - 1 - back, i, j, n, m)
        gap, t, root = part_of(k, p, inverse, same)
        order0 = order0_of(k, t, root)
        sine, steep = slopes_of(p, inverse, t, root)
        by_k += by_tangent
        across = by_tangent * tangent * steep
        by_p = slope * (by_k * sine - across * k)
        of_x = tl.load(shares_x + (LAYERS - 1 - back) * n + i, mask=i < n, other=0.0)
        of_y = tl.load(shares_y + (LAYERS - 1 - back) * m + j, mask=j < m, other=0.0)
        rows += tl.sum(by_p, 1) * of_x
        columns += tl.sum(by_p, 0) * of_y
        by_k = slope * (by_k * order0 + across)
        by_tangent = slope * order0 * by_tangent
    tl.store(by_gram + at, by_k + by_tangent, mask=inside)
    tl.store(by_qx + right_tile * n + i, rows, mask=i < n)
    if not SELF:
        tl.store(by_qy + left_tile * m + j, columns, mask=j < m)


#: Below these a variance counts as zero: the inverses of two must have a product.
LEAST = {torch.float32: 1e-30, torch.float64: 1e-280}


class _Set:
    """The variances of the rows of one set at every layer."""

    def __init__(
        self, x: Tensor, dtype: torch.dtype, depth: int, weight: float, bias: float
    ) -> None:
        self.q = variances(x.to(dtype), weight, bias).contiguous()
        half, q, layers = 0.5 * weight, self.q, []
        for _ in range(max(depth, 1)):
            layers.append(q)
            q = half * q + bias
        stacked = torch.stack(layers)
        small = stacked < LEAST[dtype]
        powers = half ** torch.arange(len(layers), dtype=dtype, device=x.device)
        self.roots = stacked.sqrt()
        self.inverses = (1 / self.roots).masked_fill(small, 0)
        self.shares = (0.5 * powers[:, None] / stacked).masked_fill(small, 0)


def _constants(dtype: torch.dtype, kind: str, depth: int, alone: bool) -> dict[str, object]:
    return {
        "NTK": kind == "ntk",
        "LAYERS": depth,
        "SELF": alone,
        "CLOSE": math.sqrt(torch.finfo(dtype).eps),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _scalars(x: Tensor, dtype: torch.dtype, *values: float) -> list[Tensor]:
    """Numbers in memory: as arguments Triton would round them to float32."""
    return [torch.full((1,), v, dtype=dtype, device=x.device) for v in values]


def dense_kernel(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator of the same name; see ddfast/ops/dense_kernel.py."""
    dtype, alone = common_dtype(x, y), y is None
    x = readable(x)
    other = x if y is None else readable(y)
    n, m = x.shape[0], other.shape[0]
    out = torch.empty(n, m, dtype=dtype, device=x.device)
    product = dtype == torch.float32
    gram = out.new_empty((n, m) if keep else (0, 0))
    if out.numel() == 0:
        return out, gram
    given = gram if product else (gram if keep else torch.empty_like(out))
    if not product:
        torch.mm(x.to(dtype), other.to(dtype).mT, out=given)
    left = _Set(x, dtype, depth, weight_var, bias_var)
    right = left if y is None else _Set(other, dtype, depth, weight_var, bias_var)
    tiles = [triton.cdiv(rows, FORWARD_TILE[dtype]) for rows in (n, m)]
    forward_kernel[(tiles[0] * tiles[1],)](
        x,
        other,
        left.q,
        right.q,
        left.roots,
        right.roots,
        left.inverses,
        right.inverses,
        given,
        out,
        n,
        m,
        x.shape[1],
        x.stride(0),
        other.stride(0),
        tiles[1],
        *_scalars(x, dtype, weight_var / x.shape[1], 0.5 * weight_var, bias_var),
        DOT=product,
        KEEP=keep,
        TILE=FORWARD_TILE[dtype],
        COLUMNS=DEPTH,
        **_constants(dtype, kind, depth, alone),
        **FORWARD_OPTIONS,
    )
    return out, gram


def dense_kernel_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    gram: Tensor,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    """The operator of the same name."""
    dtype, alone = common_dtype(x, y), y is None
    x = readable(x)
    other = x if y is None else readable(y)
    n, m = x.shape[0], other.shape[0]
    if grad.numel() == 0:
        needed = ((x, need_x), (other, need_y and not alone))
        return [t.new_zeros(t.shape, dtype=dtype) for t, need in needed if need]
    left = _Set(x, dtype, depth, weight_var, bias_var)
    right = left if y is None else _Set(other, dtype, depth, weight_var, bias_var)
    tiles = [triton.cdiv(rows, BACKWARD_TILE[dtype]) for rows in (n, m)]
    by_gram = torch.empty(n, m, dtype=dtype, device=x.device)
    by_qx, by_qy = by_gram.new_empty(tiles[1], n), by_gram.new_empty(tiles[0], m)
    backward_kernel[(tiles[0] * tiles[1],)](
        x,
        other,
        left.roots,
        right.roots,
        left.inverses,
        right.inverses,
        left.shares,
        right.shares,
        gram.contiguous(),
        grad.to(dtype).contiguous(),
        by_gram,
        by_qx,
        by_qy,
        n,
        m,
        x.shape[1],
        x.stride(0),
        other.stride(0),
        tiles[1],
        *_scalars(x, dtype, 0.5 * weight_var, bias_var),
        TILE=BACKWARD_TILE[dtype],
        **_constants(dtype, kind, depth, alone),
        **BACKWARD_OPTIONS,
    )
    scale, results = weight_var / x.shape[1], []
    wide = x.to(dtype), other.to(dtype)
    if need_x:
        own = by_qx.sum(0)[:, None] * wide[0]
        results.append(scale * torch.addmm(2 * own, by_gram, wide[1]))
    if need_y and not alone:
        own = by_qy.sum(0)[:, None] * wide[1]
        results.append(scale * torch.addmm(2 * own, by_gram.mT, wide[0]))
    return results


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """(kernel, argument types, constants, options) of representative variants."""
    variants: list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]] = []
    for given, kind, depth, alone, keep in (
        ("fp32", "ntk", 3, False, True),
        ("fp32", "ntk", 3, True, False),
        ("fp32", "nngp", 1, False, False),
        ("fp32", "ntk", 0, True, True),
        ("bf16", "ntk", 2, False, True),
        ("fp64", "ntk", 3, False, True),
        ("fp64", "nngp", 2, True, False),
    ):
        dtype = torch.float64 if given == "fp64" else torch.float32
        wide = "fp64" if given == "fp64" else "fp32"
        for function, tile, options in (
            (forward_kernel, FORWARD_TILE, FORWARD_OPTIONS),
            (backward_kernel, BACKWARD_TILE, BACKWARD_OPTIONS),
        ):
            sizes = ("n", "m", "width", "x_row", "y_row", "right_tiles")
            types = dict.fromkeys(function.arg_names, f"*{wide}")
            types |= dict.fromkeys(sizes, "i64") | {"x": f"*{given}", "y": f"*{given}"}
            constants: dict[str, object] = {
                **_constants(dtype, kind, depth, alone),
                "TILE": tile[dtype],
            }
            if function is forward_kernel:
                constants |= {"DOT": dtype == torch.float32, "KEEP": keep, "COLUMNS": DEPTH}
            variants.append((function, types, constants, options))
            if len(variants) <= 2:  # a launch turns every size of one into a constant
                variants.append((function, types, dict.fromkeys(sizes, 1) | constants, options))
    return variants
