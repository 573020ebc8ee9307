"""Triton kernels of `gradient_distance`: one program per row or chunk, all classes in the grid.

For row cosine a program reads its row for the sums and again for the gradient, so loss and gradient
leave in one launch per tensor. For the one-vector cosine the sums are reduced first. Sums over rows
are a second step without atomics: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.kernels.gradient_distance_programs import first_kernel, second_kernel
from ddfast.reference.gradient_distance import METRICS, accumulator, has_rows

ROW_COSINE, COSINE, MSE, L1 = range(4)
CHUNK = 8192  # elements per program where a tensor is not cut into rows


def block_size(length: int) -> int:
    """Lanes per program: the next power of two, between one warp's width and 1024."""
    return min(1024, max(32, triton.next_power_of_2(length)))


def _cut(tensor: Tensor, metric: int, batched: bool) -> tuple[int, int, int, int]:
    """(classes, elements per class, elements per program, programs per class)."""
    classes = tensor.shape[0] if batched else 1
    share = tensor.numel() // max(classes, 1)
    if metric == ROW_COSINE:
        rows = tensor.shape[int(batched)]
        return classes, share, share // max(rows, 1), rows
    return classes, share, CHUNK, -(-share // CHUNK)


def _acc(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


Launch = Callable[[int, Tensor, Tensor, int], None]


def _reduce(
    syn: Sequence[Tensor],
    kind: int,
    batched: bool,
    outputs: Sequence[Sequence[Tensor] | None],
    width: int,
    launch: Launch,
) -> tuple[Tensor, list[int]]:
    """Phase 0 over all tensors; outputs of tensors that do not count become zero.

    Returns:
        The value per class, (classes,), or for the cosine the sums, (classes, width); and which
        tensors the cosine's phase 1 has to visit.
    """
    classes = syn[0].shape[0] if batched else 1
    shape = (classes, width) if kind == COSINE else (classes,)
    total = syn[0].new_zeros(shape, dtype=accumulator(syn[0].dtype))
    active = []
    for i, s in enumerate(syn):
        counted = kind != ROW_COSINE or has_rows(s, batched)
        if not (counted and s.numel()):
            for out in outputs:
                if out is not None:
                    out[i].zero_()
            if counted and kind == ROW_COSINE and width == 3:
                total += s.shape[int(batched)]  # rows of no elements have distance 1
            continue
        active.append(i)
        per_class = _cut(s, kind, batched)[3]
        part = total.new_empty(classes, per_class, *shape[1:])
        launch(i, part, total, 0)
        total += part.sum(1)
    return total, active


def _launch_first(
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    out_syn: Sequence[Tensor] | None,
    out_real: Sequence[Tensor] | None,
    grad: Tensor | None,
    metric: str,
    eps: float,
    batched: bool,
) -> Tensor:
    """Run over all tensors; returns the distance per class."""
    kind = METRICS.index(metric)

    def launch(i: int, value: Tensor, coefficients: Tensor, phase: int) -> None:
        s, r = syn[i].contiguous(), real[i].contiguous()
        classes, share, length, per_class = _cut(s, kind, batched)
        write = kind != COSINE or phase == 1
        first_kernel[(classes * per_class,)](
            s,
            r,
            out_syn[i] if out_syn is not None else s,
            out_real[i] if out_real is not None else s,
            value if grad is None else grad.contiguous(),
            value,
            coefficients,
            share,
            length,
            per_class,
            METRIC=kind,
            PHASE=phase,
            EPS=eps,
            HAS_SCALE=grad is not None,
            HAS_SYN=out_syn is not None and write,
            HAS_REAL=out_real is not None and write,
            ACC=_acc(s.dtype),
            BLOCK=block_size(length),
        )

    total, active = _reduce(syn, kind, batched, (out_syn, out_real), 3, launch)
    if kind != COSINE:
        return total
    ab, m, n = total[:, 0], total[:, 1].sqrt(), total[:, 2].sqrt()
    d = 1 / (m * n + eps)
    if out_syn is not None or out_real is not None:
        zero = torch.zeros_like(d)
        by_b = torch.where(n > 0, ab * m * d * d / n, zero)
        by_a = torch.where(m > 0, ab * n * d * d / m, zero)
        coefficients = torch.stack([-d, by_b, by_a], 1)
        for i in active:
            launch(i, total, coefficients, 1)
    return 1 - ab * d


def gradient_distance(
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The operator of the same name; see ddfast/ops/gradient_distance.py."""
    out = _empty_like(syn) if with_gradient else None
    value = _launch_first(syn, real, out, None, None, metric, eps, batched)
    return value, out or []


def gradient_distance_bwd(
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    need_syn: bool,
    need_real: bool,
) -> list[Tensor]:
    """The operator of the same name."""
    out_syn = _empty_like(syn) if need_syn else None
    out_real = _empty_like(real) if need_real else None
    _launch_first(syn, real, out_syn, out_real, grad, metric, eps, batched)
    return (out_syn or []) + (out_real or [])


def gradient_distance_bwd_bwd(
    u: list[Tensor],
    w: list[Tensor],
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
) -> list[Tensor]:
    """The operator of the same name."""
    kind = METRICS.index(metric)
    out_syn, out_real = _empty_like(syn), _empty_like(real)

    def launch(i: int, value: Tensor, coefficients: Tensor, phase: int) -> None:
        classes, share, length, per_class = _cut(syn[i], kind, batched)
        second_kernel[(classes * per_class,)](
            *(t[i].contiguous() for t in (syn, real, u, w)),
            out_syn[i],
            out_real[i],
            grad.contiguous(),
            value,
            coefficients,
            share,
            length,
            per_class,
            METRIC=kind,
            PHASE=phase,
            EPS=eps,
            ACC=_acc(syn[i].dtype),
            BLOCK=block_size(length),
        )

    total, active = _reduce(syn, kind, batched, (out_syn, out_real), 7, launch)
    if kind != COSINE:
        return [total, *out_syn, *out_real]
    s, m, n, ua, ub, wb, wa = total.unbind(1)
    m, n = m.sqrt(), n.sqrt()
    zero = torch.zeros_like(m)
    im, i_n = torch.where(m > 0, 1 / m, zero), torch.where(n > 0, 1 / n, zero)
    d = 1 / (m * n + eps)
    dd, mixed = d * d, m * ub * i_n + n * wa * im
    by_d = (ua + wb) * dd - 2 * s * mixed * dd * d
    by_m = n * by_d + s * (ub * i_n - n * wa * im * im) * dd
    by_n = m * by_d + s * (wa * im - m * ub * i_n * i_n) * dd
    columns = [mixed * dd, s * m * i_n * dd, -d, by_n * i_n, s * n * im * dd, by_m * im]
    coefficients = torch.stack(columns, 1)
    for i in active:
        launch(i, total, coefficients, 1)
    return [-(ua + wb) * d + s * mixed * dd, *out_syn, *out_real]


def _empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object]]]:
    """(kernel, argument types, constants) of representative variants, to compile without a GPU."""
    variants: list[tuple[object, dict[str, str], dict[str, object]]] = []
    integers = {"share": "i64", "length": "i64", "per_class": "i64"}
    for dtype, acc, wide in (("fp32", tl.float32, "fp32"), ("bf16", tl.float32, "fp32")):
        tensors = dict.fromkeys(("syn", "real", "out_syn", "out_real"), f"*{dtype}")
        sums = dict.fromkeys(("scale", "value", "coefficients"), f"*{wide}")
        cotangents = dict.fromkeys(("u", "w"), f"*{dtype}")
        for kind in (ROW_COSINE, COSINE, MSE, L1):
            for phase in (0, 1) if kind == COSINE else (0,):
                common = {"METRIC": kind, "PHASE": phase, "EPS": 1e-6, "ACC": acc, "BLOCK": 1024}
                flags = {"HAS_SCALE": True, "HAS_SYN": True, "HAS_REAL": True}
                variants.append((first_kernel, tensors | sums | integers, common | flags))
                variants.append((second_kernel, tensors | cotangents | sums | integers, common))
    return variants
