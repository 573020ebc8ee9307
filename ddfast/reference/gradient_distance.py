"""The definition of `gradient_distance` and of its derivatives, in plain torch.

Source: Zhao, Mopuri, Bilen, Dataset Condensation with Gradient Matching, ICLR 2021. With a = real,
b = syn, and for `row_cosine` one sum per output unit i of every tensor with two or more dimensions,

    row_cosine  sum_i 1 - <a_i, b_i> / (|a_i| |b_i| + eps)      1-D tensors contribute 0
    cosine      1 - <a, b> / (|a| |b| + eps)                    one vector over all tensors
    mse         |a - b|^2                                       over all tensors
    l1          |a - b|_1                                       over all tensors

`gradient_distance` may be differentiated any number of times; the two others are the closed forms
of its first and second derivative that the kernels compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

METRICS = ("row_cosine", "cosine", "mse", "l1")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of `dtype`: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_rows(tensor: Tensor, batched: bool) -> bool:
    """Whether `row_cosine` counts this tensor: two or more dimensions per class."""
    return tensor.dim() - int(batched) >= 2


def _rows(tensor: Tensor, metric: str, batched: bool) -> Tensor:
    """(classes, rows, length) in the accumulation dtype; one row per tensor unless row_cosine."""
    classes = tensor.shape[0] if batched else 1
    shape = tensor.shape[int(batched) :]
    by_row = metric == "row_cosine"
    rows = shape[0] if by_row else 1
    length = math.prod(shape[1:] if by_row else shape)
    return tensor.to(accumulator(tensor.dtype)).reshape(classes, rows, length)


def _counted(
    tensors: Sequence[Tensor], like: Sequence[Tensor], metric: str, batched: bool
) -> list[Tensor]:
    """Rows of the tensors that the metric counts, judged by the shapes of `like`."""
    return [
        _rows(t, metric, batched)
        for t, s in zip(tensors, like, strict=True)
        if metric != "row_cosine" or has_rows(s, batched)
    ]


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: the norm of a zero row has derivative zero, as in torch."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, torch.ones_like(x)), torch.zeros_like(x))


def _norm(squared: Tensor) -> Tensor:
    positive = squared > 0
    safe = torch.where(positive, squared, torch.ones_like(squared))
    # A NaN stays a NaN.
    return torch.where(positive | squared.isnan(), safe.sqrt() * squared / safe, squared * 0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def gradient_distance(
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    metric: str = "row_cosine",
    eps: float = 1e-6,
    batched: bool = False,
) -> Tensor:
    """Distance per class between two lists of weight gradients; every order of derivative.

    Args:
        syn, real: tensors in parameter shape, with a leading class dimension if `batched`.
        metric: one of METRICS.
        eps: added to the product of norms.

    Returns:
        (classes,), one class unless `batched`; float64 for float64 tensors, else float32.
    """
    classes = syn[0].shape[0] if batched else 1
    total = syn[0].new_zeros(classes, dtype=accumulator(syn[0].dtype))
    a, b = _counted(real, syn, metric, batched), _counted(syn, syn, metric, batched)
    if metric == "cosine":
        a, b = [torch.cat(a, -1)], [torch.cat(b, -1)]
    for x, y in zip(a, b, strict=True):
        if metric in ("row_cosine", "cosine"):
            value = 1 - _dot(x, y) / (_norm(_dot(x, x)) * _norm(_dot(y, y)) + eps)
        else:
            value = ((y - x) ** 2).sum(-1) if metric == "mse" else (y - x).abs().sum(-1)
        total = total + value.sum(-1)
    return total


def _combine(
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    cotangents: tuple[Sequence[Tensor], ...],
    metric: str,
    batched: bool,
    f: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Apply f(real, syn, *cotangents) -> (value, d syn, d real) by tensor, or to all as one row."""
    groups = [_counted(t, syn, metric, batched) for t in (real, syn, *cotangents)]
    lengths = [x.shape[-1] for x in groups[0]]
    if metric == "cosine":
        groups = [[torch.cat(rows, -1)] for rows in groups]
    value = syn[0].new_zeros(syn[0].shape[0] if batched else 1, dtype=accumulator(syn[0].dtype))
    by_syn: list[Tensor] = []
    by_real: list[Tensor] = []
    for rows in zip(*groups, strict=True):
        part, d_syn, d_real = f(*rows)
        value = value + part.sum(-1)
        by_syn.append(d_syn)
        by_real.append(d_real)
    if metric == "cosine":
        by_syn, by_real = list(by_syn[0].split(lengths, -1)), list(by_real[0].split(lengths, -1))

    def restore(parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        left = iter(parts)
        return [
            next(left).reshape(t.shape).to(t.dtype).contiguous()
            if metric != "row_cosine" or has_rows(t, batched)
            else torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t in like
        ]

    return value, restore(by_syn, syn), restore(by_real, real)


def gradient_distance_bwd(
    grad: Tensor,
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    metric: str,
    eps: float,
    batched: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """grad, (classes,), times the gradients of the distance with respect to syn and real.

    row_cosine and cosine, with m = |a|, n = |b|, D = m n + eps:
    d/db = -a/D + <a,b> m / (D^2 n) b, where 1/n is 0 for a zero row.
    """
    scale = grad.reshape(-1, 1, 1)

    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if metric == "mse":
            return (b - a).sum(-1), scale * 2 * (b - a), scale * 2 * (a - b)
        if metric == "l1":
            return (b - a).sum(-1), scale * (b - a).sign(), scale * (a - b).sign()
        s, m, n = _dot(a, b), _norm(_dot(a, a)), _norm(_dot(b, b))
        d = 1 / (m * n + eps)
        to_b, to_a = s * m * d * d * _inverse(n), s * n * d * d * _inverse(m)
        d, to_b, to_a = d[..., None], to_b[..., None], to_a[..., None]
        return s, scale * (to_b * b - d * a), scale * (to_a * a - d * b)

    _, by_syn, by_real = _combine(syn, real, (), metric, batched, f)
    return by_syn, by_real


def gradient_distance_bwd_bwd(
    u: Sequence[Tensor],
    w: Sequence[Tensor],
    grad: Tensor,
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    metric: str,
    eps: float,
    batched: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """phi = <u, d distance/d syn> + <w, d distance/d real>, and grad times its gradients.

    phi is (classes,).

    phi depends on a, b, u, w through the seven sums <a,b>, |a|, |b|, <u,a>, <u,b>, <w,b>, <w,a>.
    """
    scale = grad.reshape(-1, 1, 1)

    def f(a: Tensor, b: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if metric == "mse":
            return 2 * _dot(b - a, u - w), scale * 2 * (u - w), scale * 2 * (w - u)
        if metric == "l1":
            return _dot((b - a).sign(), u - w), torch.zeros_like(a), torch.zeros_like(a)
        s, m, n = _dot(a, b), _norm(_dot(a, a)), _norm(_dot(b, b))
        ua, ub, wb, wa = _dot(u, a), _dot(u, b), _dot(w, b), _dot(w, a)
        d, im, i_n = 1 / (m * n + eps), _inverse(m), _inverse(n)
        dd = d * d
        mixed = m * ub * i_n + n * wa * im
        phi = -(ua + wb) * d + s * mixed * dd
        by_d = (ua + wb) * dd - 2 * s * mixed * dd * d
        by_m = n * by_d + s * (ub * i_n - n * wa * im * im) * dd
        by_n = m * by_d + s * (wa * im - m * ub * i_n * i_n) * dd
        columns = (mixed * dd, s * m * i_n * dd, -d, by_n * i_n, s * n * im * dd, by_m * im)
        by_s, to_u, cross, to_b, to_w, to_a = (x[..., None] for x in columns)
        by_syn = by_s * a + to_u * u + cross * w + to_b * b
        by_real = by_s * b + cross * u + to_w * w + to_a * a
        return phi, scale * by_syn, scale * by_real

    return _combine(syn, real, (u, w), metric, batched, f)
