"""The definition of `mmd`, in plain torch.

Source: Gretton et al., A Kernel Two-Sample Test, JMLR 2012; the kernels and the bandwidth are those
of M3D (Zhang et al., AAAI 2024). Per batch element, with n rows x and m rows y,

    MMD^2 = mean K(x, x') - 2 mean K(x, y) + mean K(y, y')

over all pairs (biased), or without the pairs of a row with itself (unbiased). With D = |a - b|:

* gaussian: sum over h of exp(-D^2 / h);  laplace: sum over h of exp(-D / h);  energy: -D;
* polynomial: (<a, b> + 1)^degree;  linear: <a, b>.

Squared distances come from inner products of centred rows, and from differences where little would
be left of the rows' norms: so equal rows are at distance zero, where the kernels of D have slope
zero here. Everything here may be differentiated any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = ("gaussian", "laplace", "energy", "polynomial", "linear")

#: Below this part of the rows' norms a squared distance is computed from their difference.
NEAR = 2**-10


def near_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """|a_i - b_j|^2 by inner products, (C, n, m), and the indices of pairs that need better."""
    norms = (a * a).sum(2).unsqueeze(2) + (b * b).sum(2).unsqueeze(1)
    squared = norms - 2 * a @ b.mT
    return squared, (squared < NEAR * norms).nonzero(as_tuple=True)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 for (C, n, d) and (C, m, d): (C, n, m)."""
    squared, (c, i, j) = near_pairs(a, b)
    # A difference for every near pair: exact, and its gradient too.
    near = ((a[c, i] - b[c, j]) ** 2).sum(1)
    return squared.masked_fill(squared < 0, 0.0).index_put((c, i, j), near)


def pooled_centre(x: Tensor, y: Tensor) -> Tensor:
    """The mean of all rows, (C, 1, d), equal to them where they are all equal; no derivative."""
    with torch.no_grad():
        origin = x[:, :1]
        rows = torch.cat([x - origin, y - origin], 1)
        return origin + rows.mean(1, keepdim=True)


def bandwidth(x: Tensor, y: Tensor, how: str) -> Tensor:
    """The mean or the lower median of |z_i - z_j|^2 over all pairs of pooled rows i < j, (C,)."""
    with torch.no_grad():
        centre = pooled_centre(x, y)
        rows = torch.cat([x, y], 1) - centre
        count = rows.shape[1]
        if how == "mean":
            first = rows[:, :1]  # equal rows cancel exactly
            rows = (rows - first).double()
            total = 2 * count * (rows**2).sum((1, 2)) - 2 * (rows.sum(1) ** 2).sum(1)
            return (total.clamp_min(0) / (count * count - count)).to(x.dtype)
        upper = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        return squared_distances(rows, rows)[:, upper].median(1).values


def rates_of(bandwidths: Tensor) -> Tensor:
    """1 / bandwidth, zero for a bandwidth of zero, NaN for a negative one: (C, k, 1, 1)."""
    rates = torch.where(bandwidths == 0, 0.0, 1 / bandwidths)
    return torch.where(bandwidths >= 0, rates, float("nan"))[:, :, None, None]


def root(squared: Tensor) -> Tensor:
    """The square root, with slope zero at zero."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def kernel_values(a: Tensor, b: Tensor, bandwidths: Tensor, kernel: str, degree: int) -> Tensor:
    """K of every pair of rows, (C, n, m)."""
    if kernel == "linear":
        return a @ b.mT
    if kernel == "polynomial":
        return (a @ b.mT + 1) ** degree
    squared = squared_distances(a, b)
    if kernel == "energy":
        return -root(squared)
    at = squared if kernel == "gaussian" else root(squared)
    rates = rates_of(bandwidths)
    # A bandwidth of zero leaves its term out.
    return sum(
        (torch.exp(-at * rates[:, b]) * (rates[:, b] != 0) for b in range(rates.shape[1])),
        torch.zeros_like(at),
    )


def kernel_slopes(a: Tensor, b: Tensor, bandwidths: Tensor, kernel: str, degree: int) -> Tensor:
    """The derivative of K by the inner product, or half of that by D^2 with the sign turned.

    Both are what the gradient of K(a_i, b_j) by a_i multiplies: b_j, or b_j - a_i.
    """
    if kernel == "linear":
        return torch.ones_like(a @ b.mT)
    if kernel == "polynomial":
        return degree * (a @ b.mT + 1) ** (degree - 1)
    squared = squared_distances(a, b)
    positive = squared > 0
    inverse = positive / torch.where(positive, squared, 1.0).sqrt()
    if kernel == "energy":
        return inverse
    at = squared if kernel == "gaussian" else root(squared)
    rates, total = rates_of(bandwidths), torch.zeros_like(squared)
    for r in range(rates.shape[1]):
        total = total + torch.exp(-at * rates[:, r]) * rates[:, r]
    return total * (2 * positive if kernel == "gaussian" else inverse)


def mmd(
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str = "gaussian",
    degree: int = 2,
    unbiased: bool = False,
) -> Tensor:
    """MMD^2 of (C, n, d) and (C, m, d), (C,); bandwidths (C, k), which have no derivative."""
    bandwidths = bandwidths.detach()
    if kernel not in ("linear", "polynomial"):
        centre = pooled_centre(x, y)
        x, y = x - centre, y - centre

    def within(z: Tensor) -> Tensor:
        values = kernel_values(z, z, bandwidths, kernel, degree)
        if not unbiased:
            return values.mean((1, 2))
        rows = z.shape[1]
        off = ~torch.eye(rows, dtype=torch.bool, device=z.device)
        return (values * off).sum((1, 2)) / (rows * (rows - 1))

    between = kernel_values(x, y, bandwidths, kernel, degree).mean((1, 2))
    return within(x) - 2 * between + within(y)


def sums_of_slopes(
    a: Tensor, b: Tensor, bandwidths: Tensor, kernel: str, degree: int, diagonal: bool
) -> Tensor:
    """Sum over j of the gradient of K(a_i, b_j) by a_i, (C, n, d)."""
    slopes = kernel_slopes(a, b, bandwidths, kernel, degree)
    if not diagonal:
        slopes = slopes * ~torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
    if kernel in ("linear", "polynomial"):
        return slopes @ b
    _, (c, i, j) = near_pairs(a, b)
    near = slopes[c, i, j].unsqueeze(1) * (b[c, j] - a[c, i])
    slopes = slopes.index_put((c, i, j), torch.zeros_like(near[:, 0]))
    far = slopes @ b - slopes.sum(2, keepdim=True) * a
    return far.index_put((c, i), near, accumulate=True)


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
    """The gradients that are needed, times the cotangent `grad`, (C,)."""
    if kernel not in ("linear", "polynomial"):
        centre = pooled_centre(x, y)
        x, y = x - centre, y - centre
    results = []
    for needed, a, b in ((need_x, x, y), (need_y, y, x)):
        if not needed:
            continue
        rows, others = a.shape[1], b.shape[1]
        own = sums_of_slopes(a, a, bandwidths, kernel, degree, diagonal=not unbiased)
        between = sums_of_slopes(a, b, bandwidths, kernel, degree, diagonal=True)
        total = own / (rows * (rows - unbiased)) - between / (rows * others)
        results.append(2 * grad.to(a.dtype)[:, None, None] * total)
    return results
