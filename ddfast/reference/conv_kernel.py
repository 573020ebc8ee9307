"""The definition of `conv_kernel`, in plain torch: NNGP and NTK of convolutional ReLU networks.

Sources: Arora et al., On Exact Computation with an Infinitely Wide Neural Net, NeurIPS 2019,
section 4; Nguyen et al., Dataset Distillation with Infinitely Wide Convolutional Networks (KIP),
NeurIPS 2021. Every layer is a 3x3 convolution with zero padding, a ReLU and, where `pools` says so,
a 2x2 average pool; then the readout (flatten, or the mean over all positions) and a Dense layer, in
the NTK parametrisation with variances weight_var / fan-in and bias_var. The state of two images is
K and T over all pairs of positions u of one and u' of the other:

    input        K = <x(u), x'(u')> / channels                 T = 0
    convolution  K = weight_var * mean of K over the 9 shifts of both positions + bias_var
                 T = weight_var * the same mean of T + K
    ReLU         K = (q + (pi - theta) K) / (2 pi)             T = T (pi - theta) / (2 pi)
                 q = sqrt(V(u) V'(u') - K^2),  theta = atan2(q, K)
    pool         means over the 2x2 positions of both
    flatten, gap mean over u = u', or over all pairs of positions
    Dense        K = weight_var * K + bias_var                 T = weight_var * T + K

with V, V' the diagonals of the images' own K before that ReLU. Shifts beyond an image count as
zero; the last row or column of an odd size is left out of the pool.

At parallel and antiparallel positions theta has no derivative by K: there it is 0 or pi exactly and
counts as constant, which is the mean of its one-sided slopes. Positions where V or V' is zero count
as orthogonal, for the same reason, and V as constant. Everything may be differentiated any number
of times. The full band of position pairs is formed, for as many image pairs at once as BUDGET
allows; `conv_kernel_bwd` has the first derivative in as little memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Bytes that the position pairs of one block of image pairs may take, temporaries included.
BUDGET = 256 << 20

#: Tensors of the size of K that are alive at once, roughly.
TEMPORARIES = 12


def near(dtype: torch.dtype) -> float:
    """Positions with a correlation closer than this to 1 or -1 are parallel or antiparallel."""
    return 4 * torch.finfo(dtype).eps


def products(x: Tensor, y: Tensor) -> Tensor:
    """<x(u), y(u')> / channels for broadcasting (..., C, H, W): (..., H, W, H, W)."""
    total = x[..., 0, :, :, None, None] * y[..., 0, None, None, :, :]
    for c in range(1, x.shape[-3]):
        total = total + x[..., c, :, :, None, None] * y[..., c, None, None, :, :]
    return total / x.shape[-3]


def shifted_mean(k: Tensor) -> Tensor:
    """The mean over the nine common shifts of both positions, zero outside; (..., H, W, H, W)."""
    height, width = k.shape[-2:]
    padded = F.pad(k, (0, 0, 1, 1, 0, 0, 1, 1))
    k = sum((padded[..., a : a + height, :, a : a + height, :] for a in range(3)), start=0 * k)
    padded = F.pad(k, (1, 1, 0, 0, 1, 1, 0, 0))
    k = sum((padded[..., b : b + width, :, b : b + width] for b in range(3)), start=0 * k)
    return k / 9


def relu(k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ReLU's K, P(both are positive) = (pi - theta) / (2 pi), and q, zero at constant theta.

    Args:
        k: covariance of two Gaussians, (..., H, W, H, W).
        v, w: their variances, which broadcast with it.
    """
    alive = (v > 0) & (w > 0)
    p = torch.where(v > 0, v, 1.0).sqrt() * torch.where(w > 0, w, 1.0).sqrt()
    c = (k / p).detach()
    close = near(k.dtype)
    ahead, behind = alive & (c > 1 - close), alive & (c < close - 1)
    regular = alive & ~ahead & ~behind
    # What is not regular goes another way before the root and the angle see it.
    k_safe = torch.where(regular, k, 0.0)
    q = ((p - k_safe) * (p + k_safe)).sqrt()
    theta = torch.where(regular, torch.atan2(q, k_safe), math.pi / 2)
    theta = theta.masked_fill(ahead, 0.0).masked_fill(behind, math.pi)
    q = torch.where(regular, q, 0.0)
    # NaN is in none of the three, and stays NaN.
    lost = torch.where(c.isnan(), c, 0.0)
    both = (math.pi - theta) / (2 * math.pi) + lost
    return q / (2 * math.pi) + both * k, both, q


def pool(k: Tensor) -> Tensor:
    """Means over the 2x2 positions of both images; (..., H, W, H, W), odd sizes cropped."""
    height, width = (s // 2 for s in k.shape[-2:])
    k = k[..., : 2 * height, : 2 * width, : 2 * height, : 2 * width]
    k = k.reshape(*k.shape[:-4], height, 2, width, 2, height, 2, width, 2)
    return k.mean((-7, -5, -3, -1))


def own(k: Tensor) -> Tensor:
    """The entries of equal positions: (..., H, W, H, W) to (..., H, W)."""
    return k.diagonal(0, -4, -2).diagonal(0, -3, -2)


def blocks(n: int, m: int, x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of an n x m matrix in blocks that BUDGET allows, at least one pair each."""
    positions = x.shape[-2] * x.shape[-1]
    pairs = max(BUDGET // (TEMPORARIES * x.element_size() * positions * positions), 1)
    columns = min(m, pairs)
    rows = max(pairs // max(columns, 1), 1)
    for i in range(0, n, rows):
        for j in range(0, m, max(columns, 1)):
            yield slice(i, min(i + rows, n)), slice(j, min(j + columns, m))


def variances_of_block(
    x: Tensor,
    pools: Sequence[bool],
    weight_var: float,
    bias_var: float,
    saved: list[Tensor] | None = None,
) -> list[Tensor]:
    """V before each ReLU, (n, H, W) of that layer, of images (n, C, H, W); saved: gets each K."""
    found, k = [], products(x, x)
    for pooled in pools:
        k = weight_var * shifted_mean(k) + bias_var
        v = own(k)
        found.append(v)
        if saved is not None:
            saved.append(k)
        k, _, _ = relu(k, v[:, :, :, None, None], v[:, None, None])
        if pooled:
            k = pool(k)
    return found


def variances(x: Tensor, pools: Sequence[bool], weight_var: float, bias_var: float) -> list[Tensor]:
    """`variances_of_block` of all images, block by block."""
    parts = [
        variances_of_block(x[rows], pools, weight_var, bias_var) for rows, _ in blocks(len(x), 1, x)
    ]
    if not parts:
        return variances_of_block(x, pools, weight_var, bias_var)
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def kernel_of_block(
    x: Tensor,
    y: Tensor,
    vx: Sequence[Tensor],
    vy: Sequence[Tensor],
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
    saved: list[tuple[Tensor, Tensor | None]] | None = None,
) -> Tensor:
    """The kernel of (n, C, H, W) and (m, C, H, W) with their variances before each ReLU: (n, m).

    saved: gets K and T before each ReLU and before the readout.
    """
    saved = [] if saved is None else saved
    k = products(x[:, None], y[None])
    t = torch.zeros_like(k) if kind == "ntk" else None
    for layer, pooled in enumerate(pools):
        k = weight_var * shifted_mean(k) + bias_var
        t = None if t is None else weight_var * shifted_mean(t) + k
        saved.append((k, t))
        k, both, _ = relu(k, vx[layer][:, None, :, :, None, None], vy[layer][None, :, None, None])
        t = None if t is None else t * both
        if pooled:
            k, t = pool(k), None if t is None else pool(t)
    saved.append((k, t))

    def read(state: Tensor) -> Tensor:
        return own(state).mean((-2, -1)) if readout == "flatten" else state.mean((-4, -3, -2, -1))

    out = weight_var * read(k) + bias_var
    return out if t is None else weight_var * read(t) + out


def conv_kernel(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
) -> Tensor:
    """The NNGP or NTK matrix of two sets of images.

    Args:
        x: (n, C, H, W).
        y: (m, C, H, W) of the same dtype; None: x, and the result is symmetric.
        kind: "ntk" or "nngp".
        pools: one entry per ReLU layer: whether a 2x2 average pool follows it.
        readout: "flatten" or "gap"; a Dense layer follows.
        weight_var, bias_var: variances of the parametrisation.

    Returns:
        (n, m) of the same dtype.
    """
    network = kind, pools, readout, weight_var, bias_var
    other = x if y is None else y
    vx = variances(x, pools, weight_var, bias_var)
    vy = vx if y is None else variances(y, pools, weight_var, bias_var)
    parts: dict[int, list[Tensor]] = {}
    for i, j in blocks(len(x), len(other), x):
        if y is None and j.stop <= i.start:
            part = x.new_zeros(i.stop - i.start, j.stop - j.start)
        else:
            a, b = [v[i] for v in vx], [v[j] for v in vy]
            part = kernel_of_block(x[i], other[j], a, b, *network)
        parts.setdefault(i.start, []).append(part)
    if not parts:
        return x.new_zeros(len(x), len(other))
    matrix = torch.cat([torch.cat(row, 1) for row in parts.values()])
    return matrix if y is not None else matrix.triu() + matrix.triu(1).mT
