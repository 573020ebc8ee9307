"""The definition of `krr`, kernel ridge regression, in plain torch.

Source: Nguyen, Chen and Lee, Dataset Meta-Learning from Kernel Ridge-Regression, ICLR 2021.
`predict` and `label_solve` are the formulas and may be differentiated any number of times; `krr`
and `krr_bwd` are what the operators compute: one factorisation that serves the solve of the
prediction and, in closed form, that of its gradient,

    A = K_ss + reg tr(K_ss)/n I,  alpha = A^-1 Y_s,  P = K_ts alpha,  B = A^-1 K_ts' dL/dP:
    dL/dK_ts = dL/dP alpha',  dL/dY_s = B,  G = -(B alpha' + alpha B')/2,
    dL/dK_ss = G + reg tr(G)/n I.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

#: How A was decomposed, in the order in which the ways are tried.
CHOLESKY, LU, EIGH = range(3)


def ridge(k_ss: Tensor, reg: float) -> Tensor:
    """A: the symmetric part of k_ss, (n, n), plus reg times its mean diagonal element."""
    ridge = reg * k_ss.diagonal().mean()
    return (k_ss + k_ss.mT) / 2 + ridge * torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)


def predict(k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float) -> Tensor:
    """K_ts (K_ss + reg tr(K_ss)/n I)^-1 Y_s, (m, C), of tensors of one dtype; A invertible."""
    return k_ts @ torch.linalg.solve(ridge(k_ss, reg), y_s)


# --- one factorisation ----------------------------------------------------------------------------


def factorise(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `solve` needs of a symmetric matrix: Cholesky's factor, else LU, else eigenvectors.

    A pivot below twice the machine epsilon of the largest is rounding and no longer information.
    Then LU answers, which an indefinite matrix has, with a RuntimeWarning, and eigenvectors, with
    the inverse of what is left of the eigenvalues, where the matrix is singular.

    Args:
        a: (n, n), n >= 1. One that is not finite gives NaN.

    Returns:
        (n, n) factor; (n,) pivots or inverse eigenvalues, zero for Cholesky; and which of the three
        ways it is, 0-d int64 on the CPU. This reads one number from the device.
    """
    n, eps = len(a), torch.finfo(a.dtype).eps
    factor, info = torch.linalg.cholesky_ex(a)
    pivots = factor.diagonal().square()
    sound = (info == 0) & (pivots.min() > 2 * eps * pivots.max())
    if sound.item():
        return factor, a.new_zeros(n), torch.tensor(CHOLESKY)
    if not a.isfinite().all().item():
        return torch.full_like(a, torch.nan), a.new_zeros(n), torch.tensor(CHOLESKY)
    at = int(info.item())
    why = f"its leading {at} x {at} part" if at else "a pivot of Cholesky's factor"
    factor, order, info = torch.linalg.lu_factor_ex(a)
    pivots = factor.diagonal().abs()
    sound = (info == 0) & (pivots.min() > 2 * eps * pivots.max())
    regular = bool(sound.item())
    warnings.warn(
        f"krr: K_ss + reg tr(K_ss)/n I ({n} x {n}) is not positive definite in {a.dtype} ({why}); "
        + ("LU" if regular else "it is singular too, so the pseudo-inverse by eigenvectors")
        + " answers. Near-duplicate rows of the support set, a small reg or a kernel computed in "
        "too low a precision do this.",
        RuntimeWarning,
        stacklevel=2,
    )
    if regular:
        return factor, order.to(a.dtype), torch.tensor(LU)
    values, vectors = torch.linalg.eigh(a)
    small = values.abs() <= n * eps * values.abs().max()
    inverse = torch.where(small, 0, 1 / torch.where(small, 1, values))
    return vectors, inverse, torch.tensor(EIGH)


def solve(factor: Tensor, extra: Tensor, how: Tensor, b: Tensor) -> Tensor:
    """A^-1 b of (n, k), from what `factorise` returned."""
    way = int(how.item())
    if way == CHOLESKY:
        return torch.cholesky_solve(b, factor)
    if way == LU:
        return torch.linalg.lu_solve(factor, extra.to(torch.int32), b)
    return factor @ (extra.unsqueeze(1) * (factor.mT @ b))


# --- the operators --------------------------------------------------------------------------------


def krr(
    k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, (m, C), and alpha, (n, C), in `dtype`; and what `factorise` found, packed.

    The factor and below it the pivots are handed on as bytes, (n + 1, n size of an element): they
    have no derivative here, and bytes cannot ask for one.
    """
    factor, extra, how = factorise(ridge(k_ss.to(dtype), reg))
    alpha = solve(factor, extra, how, y_s.to(dtype))
    packed = torch.cat([factor, extra.unsqueeze(0)]).contiguous().view(torch.uint8)
    return k_ts.to(dtype) @ alpha, alpha.contiguous(), packed, how


def krr_bwd(
    by_prediction: Tensor | None,
    by_alpha: Tensor | None,
    k_ts: Tensor,
    alpha: Tensor,
    packed: Tensor,
    how: Tensor,
    reg: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by k_ss, k_ts (in its dtype) and y_s, from those by prediction and alpha.

    `needed` says which; of the others an empty tensor is returned.
    """
    by_k_ss, by_k_ts, by_y_s = (alpha.new_empty(0) for _ in range(3))
    if needed[1]:
        if by_prediction is None:
            by_k_ts = torch.zeros_like(k_ts, memory_format=torch.contiguous_format)
        else:
            by_k_ts = (by_prediction @ alpha.mT).to(k_ts.dtype)
    if needed[0] or needed[2]:
        right = torch.zeros_like(alpha) if by_alpha is None else by_alpha
        if by_prediction is not None:
            # In this order, K_ts being read along its rows, it took a quarter of the time.
            right = right + (by_prediction.mT @ k_ts.to(alpha.dtype)).mT
        factors = packed.view(alpha.dtype)
        solved = solve(factors[:-1], factors[-1], how, right).contiguous()
        if needed[0]:
            by_k_ss = by_ridge(solved, alpha, reg)
        if needed[2]:
            by_y_s = solved
    return by_k_ss, by_k_ts, by_y_s


def by_ridge(by_y_s: Tensor, alpha: Tensor, reg: float) -> Tensor:
    """The gradient by k_ss from that by y_s: -(B alpha' + alpha B')/2, and the trace's share."""
    outer = by_y_s @ alpha.mT
    gradient = (outer + outer.mT) / -2
    gradient.diagonal().add_(reg / len(outer) * gradient.diagonal().sum())
    return gradient


# --- label solve ----------------------------------------------------------------------------------


def label_solve(k_ss: Tensor, k_ts: Tensor, y_t: Tensor, reg: float) -> Tensor:
    """(K_ts A^-1)^+ Y_t, (n, C): of the labels whose prediction is nearest to y_t the shortest."""
    return torch.linalg.pinv(torch.linalg.solve(ridge(k_ss, reg), k_ts.mT).mT) @ y_t


def triangle(rows: Tensor) -> Tensor:
    """R of QR: fewer rows with the same sums of products, so the same least-squares problem."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def condition(a: Tensor) -> float:
    """Ratio of the largest to the smallest eigenvalue of a symmetric matrix that is no rounding."""
    values = torch.linalg.eigvalsh(a).abs()
    largest = values.max()
    kept = values[values > len(a) * torch.finfo(a.dtype).eps * largest]
    return (largest / kept.min()).item() if len(kept) else 1.0


def least_squares(rows: Tensor, columns: int, digits: float) -> Tensor:
    """The shortest X with M X nearest to Y, [M Y] being `rows`, or `triangle` of them.

    Args:
        rows: (r, columns + C).
        columns: of M.
        digits: singular values below this many machine epsilons of the largest count as zero.
    """
    rows = triangle(rows)
    left, values, right = torch.linalg.svd(rows[:, :columns], full_matrices=False)
    small = values <= digits * torch.finfo(rows.dtype).eps * values.max()
    inverse = torch.where(small, 0, 1 / torch.where(small, 1, values))
    return right.mT @ (inverse.unsqueeze(1) * (left.mT @ rows[:, columns:]))
