"""The first derivative of `conv_kernel`, in plain torch and little memory.

Each block of image pairs is recomputed with the variances V as constants of their own, whose
gradients are summed over all pairs and go back through each image's own covariance once. With
q = sqrt(V V' - K^2), B = (pi - theta) / (2 pi) and cotangents g of the ReLU's K and h of its T,

    by K    g B + h T / (2 pi q)
    by T    h B
    by V    sum over u' of (g q - h T K / q) / (4 pi V)

where the terms in 1 / q vanish wherever theta counts as constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.reference.conv_kernel import (
    blocks,
    kernel_of_block,
    own,
    relu,
    shifted_mean,
    variances,
    variances_of_block,
)


def relu_bwd(
    g: Tensor, h: Tensor | None, k: Tensor, t: Tensor | None, v: Tensor, w: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients by K, by T, and by V and V' alike, times V or V' and not summed over positions."""
    _, both, q = relu(k, v, w)
    by_k, by_v = g * both, g * q
    if h is not None and t is not None:
        slope = h * t * torch.where(q > 0, 1 / torch.where(q > 0, q, 1.0), 0.0)
        by_k = by_k + slope / (2 * math.pi)
        by_v = by_v - slope * k
        h = h * both
    return by_k, h, by_v / (4 * math.pi)


def pool_bwd(g: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of `pool` from a tensor of `shape`."""
    height, width = (2 * s for s in g.shape[-2:])
    for axis in (-4, -3, -2, -1):
        g = g.repeat_interleave(2, axis)
    out = g.new_zeros(shape)
    out[..., :height, :width, :height, :width] = g / 16
    return out


def over(total: Tensor, v: Tensor) -> Tensor:
    """total / v, and zero where v is."""
    return torch.where(v > 0, total / torch.where(v > 0, v, 1.0), 0.0)


def readout_bwd(grad: Tensor, state: Tensor, readout: str) -> Tensor:
    """The adjoint of the readout of a state (n, m, H, W, H, W) for grad (n, m)."""
    height, width = state.shape[-2:]
    if readout == "gap":
        return (grad / (height * width) ** 2)[..., None, None, None, None].expand_as(state)
    out = torch.zeros_like(state)
    own(out).copy_((grad / (height * width))[..., None, None].expand(*grad.shape, height, width))
    return out


def block_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    vx: Sequence[Tensor],
    vy: Sequence[Tensor],
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of one block of pairs by (x, *vx) and by (y, *vy), grad of shape (n, m)."""
    saved: list[tuple[Tensor, Tensor | None]] = []
    kernel_of_block(x, y, vx, vy, kind, pools, readout, weight_var, bias_var, saved)
    g = readout_bwd(weight_var * grad, saved[-1][0], readout)
    h = g if kind == "ntk" else None
    by_v, by_w = [], []
    for layer in reversed(range(len(pools))):
        k, t = saved[layer]
        if pools[layer]:
            g, h = pool_bwd(g, k.shape), None if h is None else pool_bwd(h, k.shape)
        v, w = vx[layer], vy[layer]
        g, h, share = relu_bwd(g, h, k, t, v[:, None, :, :, None, None], w[None, :, None, None])
        by_v.append(over(share.sum((1, 4, 5)), v))
        by_w.append(over(share.sum((0, 2, 3)), w))
        if h is not None:
            g, h = g + h, weight_var * shifted_mean(h)
        g = weight_var * shifted_mean(g)
    g = g / x.shape[1]
    by_x = torch.einsum("nmhwij,mcij->nchw", g, y)
    by_y = torch.einsum("nmhwij,nchw->mcij", g, x)
    return [by_x, *reversed(by_v)], [by_y, *reversed(by_w)]


def variances_bwd(
    grads: Sequence[Tensor],
    x: Tensor,
    pools: Sequence[bool],
    weight_var: float,
    bias_var: float,
) -> Tensor:
    """The gradient by x of `variances_of_block` for cotangents of its results."""
    saved: list[Tensor] = []
    found = variances_of_block(x, pools, weight_var, bias_var, saved)
    g = torch.zeros_like(saved[-1])
    for layer in reversed(range(len(pools))):
        k, v = saved[layer], found[layer]
        if layer + 1 < len(pools):
            if pools[layer]:
                g = pool_bwd(g, k.shape)
            g, _, share = relu_bwd(g, None, k, None, v[:, :, :, None, None], v[:, None, None])
            by_v = grads[layer] + over(share.sum((3, 4)) + share.sum((1, 2)), v)
        else:
            by_v = grads[layer]
        own(g).add_(by_v)
        g = weight_var * shifted_mean(g)
    g = g / x.shape[1]
    return torch.einsum("nhwij,ncij->nchw", g, x) + torch.einsum("nhwij,nchw->ncij", g, x)


def conv_kernel_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
    by_x: bool,
    by_y: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients by x and y for the cotangent `grad`, (n, m); empty where not wanted.

    With y=None, `grad` need not be symmetric and all of the gradient is the one by x.
    """
    other = x if y is None else y
    network = kind, pools, readout, weight_var, bias_var
    if y is None:
        grad = grad.triu() + grad.tril(-1).mT
    vx = variances(x, pools, weight_var, bias_var)
    vy = vx if y is None else variances(other, pools, weight_var, bias_var)
    sums_x, sums_y = ([torch.zeros_like(t) for t in (s, *v)] for s, v in ((x, vx), (other, vy)))
    for i, j in blocks(len(x), len(other), x):
        if y is None and j.stop <= i.start:
            continue
        a, b = [v[i] for v in vx], [v[j] for v in vy]
        of_x, of_y = block_bwd(grad[i, j], x[i], other[j], a, b, *network)
        for total, share in zip(sums_x, of_x, strict=True):
            total[i] += share
        for total, share in zip(sums_y, of_y, strict=True):
            total[j] += share
    if y is None:
        sums_x = [a + b for a, b in zip(sums_x, sums_y, strict=True)]

    def with_variances(images: Tensor, sums: list[Tensor]) -> Tensor:
        total, *by_v = sums
        for rows, _ in blocks(len(images), 1, images):
            if pools:
                part = [v[rows] for v in by_v]
                total[rows] += variances_bwd(part, images[rows], pools, weight_var, bias_var)
        return total

    return (
        with_variances(x, sums_x) if by_x else x.new_empty(0),
        with_variances(other, sums_y) if by_y and y is not None else x.new_empty(0),
    )
