"""The definition of `dense_kernel`, in plain torch.

Source: the arc-cosine kernels of Cho and Saul, NeurIPS 2009; the neural tangent kernel of Jacot et
al., NeurIPS 2018, for networks of Dense, then `depth` times ReLU and Dense, in NTK parametrisation:
weights of variance `weight_var` / fan-in, biases of variance `bias_var`. With q = K(x, x) and
p = sqrt(q(x) q(y)),

    K = weight_var <x, y> / d + bias_var,  T = K                   the first Dense layer
    K <- weight_var p kappa1(K / p) / 2 + bias_var                 ReLU and Dense, `depth` times
    T <- K_new + weight_var kappa0(K / p) T / 2

    kappa1(c) = (sqrt(1 - c^2) + (pi - arccos c) c) / pi,   kappa0(c) = (pi - arccos c) / pi

K is the NNGP kernel, T the NTK. kappa0 has no derivative at c = 1: a pair of equal rows has c = 1
exactly, and there kappa0 is a constant. Everything but `dense_kernel_bwd` may be differentiated any
number of times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator

KINDS = ("nngp", "ntk")


def common_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    """What is computed and returned in: float64 if either set is, else float32."""
    return accumulator(x.dtype if y is None else torch.promote_types(x.dtype, y.dtype))


def symmetric(k: Tensor) -> Tensor:
    """The lower triangle, mirrored: rounding need not be, in products and in torch's sines."""
    return k.tril() + k.tril(-1).mT


def variances(x: Tensor, weight_var: float, bias_var: float) -> Tensor:
    """K(x, x) behind the first Dense layer, (n,)."""
    return weight_var / x.shape[1] * (x * x).sum(1) + bias_var


def equal_rows(x: Tensor, y: Tensor | None, k: Tensor, p: Tensor) -> Tensor:
    """Which pairs have equal rows, (n, m): those with c near 1 are looked at."""
    with torch.no_grad():
        near = p - k <= math.sqrt(torch.finfo(k.dtype).eps) * p
        if y is None:
            near = near.fill_diagonal_(False)
        i, j = near.nonzero(as_tuple=True)
        other = x if y is None else y
        same = torch.zeros_like(near).index_put_((i, j), (x[i] == other[j]).all(1))
        return same if y is not None else same.fill_diagonal_(True)


def gram(
    x: Tensor, y: Tensor | None, weight_var: float, bias_var: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Behind the first Dense layer: K (n, m), the variances (n,) and (m,), and the equal rows."""
    scale = weight_var / x.shape[1]
    qx = variances(x, weight_var, bias_var)
    qy = qx if y is None else variances(y, weight_var, bias_var)
    if y is None:
        k = symmetric(scale * (x @ x.mT) + bias_var)
    else:
        k = scale * (x @ y.mT) + bias_var
    p = geometric_mean(qx, qy)
    same = equal_rows(x, y, k, p)
    return torch.where(same, 0.5 * (qx[:, None] + qy[None, :]), k), qx, qy, same


def geometric_mean(qx: Tensor, qy: Tensor) -> Tensor:
    """sqrt(q(x) q(y)) of every pair, (n, m); zero, with slope zero, where either is."""
    rx, ry = (torch.where(q > 0, torch.where(q > 0, q, 1.0).sqrt(), q) for q in (qx, qy))
    return rx[:, None] * ry[None, :]


def angle(k: Tensor, p: Tensor, same: Tensor) -> Tensor:
    """arccos(k / p), without a derivative where it is 0 or pi."""
    gap = (p - k) * (p + k)
    inside = ~same & ((gap > 0) | gap.isnan())
    root = torch.where(inside, gap, 1.0).sqrt()
    flat = torch.where((k < 0) & ~same, math.pi, 0.0).to(k.dtype)
    return torch.where(inside, torch.atan2(root, torch.where(inside, k, 1.0)), flat)


def arc_cosine(k: Tensor, p: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """p kappa1(k / p) and kappa0(k / p)."""
    a = angle(k, p, same)
    # In terms of the angle, so that what is singular in the derivative cancels before it is added.
    order1 = p * (a.sin() + (math.pi - a) * a.cos()) / math.pi
    # A row of zeros without a bias counts as equal to any other.
    return torch.where(same | (p == 0), k, order1), 1 - a / math.pi


def dense_kernel(
    x: Tensor,
    y: Tensor | None = None,
    kind: str = "ntk",
    depth: int = 3,
    weight_var: float = 2.0,
    bias_var: float = 0.01,
) -> Tensor:
    """The kernel of every row of x with every row of y, (n, m).

    Args:
        x: (n, d); y: (m, d), or None for x itself: then the result is exactly symmetric.
        kind: "nngp" or "ntk".
        depth: ReLU layers; 0 is the linear kernel.
    """
    k, qx, qy, same = gram(x, y, weight_var, bias_var)
    tangent = k
    for _ in range(depth):
        order1, order0 = arc_cosine(k, geometric_mean(qx, qy), same)
        k = 0.5 * weight_var * order1 + bias_var
        qx, qy = (0.5 * weight_var * q + bias_var for q in (qx, qy))
        tangent = k + 0.5 * weight_var * order0 * tangent
    result = tangent if kind == "ntk" else k
    return symmetric(result) if y is None else result


def dense_kernel_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    """The gradients by x and by y that are needed, for the cotangent `grad`, (n, m).

    With b = weight_var / 2 and a bar over cotangents, backwards through each layer,

        Kbar <- b (Kbar kappa0 + Tbar T kappa0' / p),   Tbar <- b kappa0 Tbar,  then Kbar += Tbar
        qbar(x) += sum over y of b (Kbar p (kappa1 - c kappa0) - Tbar T c kappa0') / 2 q(x)
    """
    k, qx, qy, same = gram(x, y, weight_var, bias_var)
    half, tangent, layers = 0.5 * weight_var, k, []
    for _ in range(depth):
        p = geometric_mean(qx, qy)
        order1, order0 = arc_cosine(k, p, same)
        layers.append((k, tangent, p, order0, qx, qy))
        k = half * order1 + bias_var
        qx, qy = half * qx + bias_var, half * qy + bias_var
        tangent = k + half * order0 * tangent
    by_k, by_tangent = torch.zeros_like(grad), grad
    if kind == "nngp":
        by_k, by_tangent = grad, torch.zeros_like(grad)
    by_qx, by_qy = torch.zeros_like(qx), torch.zeros_like(qy)
    for k, tangent, p, order0, qx, qy in reversed(layers):
        gap = (p - k) * (p + k)
        inside = ~same & ((gap > 0) | gap.isnan())
        root = torch.where(inside, gap, 1.0).sqrt()
        sine, slope = (torch.where(inside, t / math.pi, 0.0) for t in (root, 1 / root))
        by_k = by_k + by_tangent
        across = by_tangent * tangent * slope
        by_p = half * (by_k * sine - across * k)
        by_qx, by_qy = (
            half * by_q + torch.where(q > 0, by_p.sum(dim) / (2 * q), 0.0)
            for by_q, q, dim in ((by_qx, qx, 1), (by_qy, qy, 0))
        )
        by_k, by_tangent = half * (by_k * order0 + across), half * order0 * by_tangent
    by_k = by_k + by_tangent
    scale = weight_var / x.shape[1]
    if y is None:
        whole = by_k + by_k.mT
        return [scale * (whole @ x + 2 * (by_qx + by_qy)[:, None] * x)] if need_x else []
    results = []
    if need_x:
        results.append(scale * (by_k @ y + 2 * by_qx[:, None] * x))
    if need_y:
        results.append(scale * (by_k.mT @ x + 2 * by_qy[:, None] * y))
    return results
