"""Kernel ridge regression on the synthetic set: KIP, RFAD, FRePo."""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.losses.dtypes import FLOATS
from ddfast.ops import krr as ops
from ddfast.ops.registry import refuse_transforms
from ddfast.reference import krr as reference
from ddfast.reference.gradient_distance import accumulator

LOSSES = ("mse", "cross_entropy")
REDUCTIONS = ("mean", "class_sum")


def krr_loss(
    k_ss: Tensor,
    k_ts: Tensor,
    y_s: Tensor,
    y_t: Tensor,
    reg: float = 1e-6,
    loss: str = "mse",
    scale: Tensor | float | None = None,
    solve_dtype: torch.dtype | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How badly kernel ridge regression on the support set predicts the target set.

    P = K_ts (K_ss + reg tr(K_ss)/n I)^-1 Y_s (Nguyen et al., ICLR 2021), and of it

    * `mse`: the mean of (P - Y_t)^2 / 2 over all m C elements (KIP; Loo et al., RFAD, NeurIPS
      2022), or with reduction `class_sum` its sum over C and mean over m (Zhou et al., FRePo,
      NeurIPS 2022);
    * `cross_entropy`: the mean cross-entropy of e^scale P, RFAD's loss with Platt scaling.

    The trace is differentiated. One Cholesky factorisation serves the prediction and the gradient,
    which is a closed form; where it fails, LU and then eigenvectors answer, with a RuntimeWarning
    that says why. First derivatives, with respect to all tensors but integer labels; a second one
    raises NotImplementedError. The slow equivalent is `ddfast.reference.krr.predict` and a loss.

    Args:
        k_ss: (n, n), the kernel matrix of the support (synthetic) set. Only its symmetric part is
            read, and its gradient is symmetric. float32, float64, bfloat16 or float16.
        k_ts: (m, n), that of the target (real) with the support set, on the same device; any n, m,
            and any of those dtypes.
        y_s: (n, C), the support set's labels, of any of those dtypes.
        y_t: (m, C), the targets, of any of those dtypes; for `cross_entropy` their argmax counts,
            or (m,) integer labels.
        reg: the ridge in units of the mean diagonal element of k_ss. At 1e-6, near-duplicates in
            the support set ask for a kernel in float64, not only a solve.
        loss: one of the above.
        scale: of `cross_entropy`, 0-d and floating, or a number; None is 0.
        solve_dtype: float32 or float64, in which all is computed. None: float64, as KIP and RFAD;
            FRePo has float32.
        reduction: of `mse`, "mean" or "class_sum".

    Returns:
        0-d; float64 if a kernel matrix is or the labels are, else float32.

    Raises:
        TypeError: not tensors, or not of a dtype as above.
        ValueError: shapes or devices that do not fit, an empty set, reg negative or not finite, an
            unknown loss or reduction, or a scale or reduction that the loss does not have.
    """
    _check(k_ss, k_ts, y_s, reg, solve_dtype)
    targets = _checked_targets(k_ts, y_s, y_t, loss)
    if loss == "mse" and scale is not None:
        raise ValueError(f"scale: got {scale!r}, expected None because loss is 'mse'")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if loss != "mse" and reduction != "mean":
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' because loss is {loss!r}")
    if isinstance(scale, Tensor):
        if scale.dim() or not scale.is_floating_point():
            raise ValueError(
                f"scale: got shape {tuple(scale.shape)} of {scale.dtype}, expected a 0-d float"
            )
        refuse_transforms(scale)
    wide = _result_dtype(k_ss, k_ts, y_s, *([targets] if loss == "mse" else []))
    prediction = _predict(k_ss, k_ts, y_s, reg, solve_dtype)
    if loss == "cross_entropy":
        logits = prediction
        if isinstance(scale, Tensor):
            logits = logits * scale.to(logits.device, logits.dtype).exp()
        elif scale is not None:
            logits = logits * torch.tensor(scale, dtype=logits.dtype).exp().to(logits.device)
        return torch.nn.functional.cross_entropy(logits, targets).to(wide)
    squares = (prediction - targets.to(prediction.dtype)).square()
    return (squares.mean() if reduction == "mean" else squares.sum(1).mean()).to(wide) / 2


def krr_predict(
    k_ss: Tensor,
    k_ts: Tensor,
    y_s: Tensor,
    reg: float = 1e-6,
    solve_dtype: torch.dtype | None = None,
) -> Tensor:
    """(m, C): what kernel ridge regression on the support set predicts for the target set.

    Arguments, derivatives and errors as `krr_loss`.
    """
    _check(k_ss, k_ts, y_s, reg, solve_dtype)
    return _predict(k_ss, k_ts, y_s, reg, solve_dtype).to(_result_dtype(k_ss, k_ts, y_s))


def label_solve(k_ss: Tensor, k_ts: Tensor, y_t: Tensor, reg: float = 1e-6) -> Tensor:
    """(n, C): the labels with which the support set predicts y_t best (Nguyen et al., Label Solve).

    Y_s = (K_ts A^-1)^+ Y_t, A = K_ss + reg tr(K_ss)/n I: least squares, of many solutions the
    shortest. Always in float64: the rows are reduced to a triangle by QR, which loses no digits, as
    normal equations would, and singular values below what rounding in A^-1 leaves of the largest
    (machine epsilon times the greatest of m, n and A's condition) count as zero. Outside autograd.
    Arguments and errors as `krr_loss`, y_t (m, C) and floating.
    """
    _check(k_ss, k_ts, k_ss[:, :1] if isinstance(k_ss, Tensor) and k_ss.dim() else k_ss, reg, None)
    _checked_targets(k_ts, None, y_t, "mse")
    with torch.no_grad():
        system = reference.ridge(k_ss.double(), float(reg))
        rows = reference.solve(*reference.factorise(system), k_ts.double().mT).mT
        digits = max(*k_ts.shape, reference.condition(system))
        labels = reference.least_squares(torch.cat([rows, y_t.double()], 1), len(k_ss), digits)
    return labels.to(_result_dtype(k_ss, k_ts, y_t))


def _predict(
    k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float, solve_dtype: torch.dtype | None
) -> Tensor:
    prediction: Tensor = ops.krr(k_ss, k_ts, y_s, float(reg), solve_dtype or torch.float64)[0]
    return prediction


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return accumulator(dtype)


def _check(
    k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float, solve_dtype: torch.dtype | None
) -> None:
    for name, tensor in (("k_ss", k_ss), ("k_ts", k_ts), ("y_s", y_s)):
        _check_matrix(name, tensor)
        if tensor.device != k_ss.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {k_ss.device}, where k_ss is")
    n = k_ss.shape[0]
    for name, tensor, expected in (
        ("k_ss", k_ss, (n, n)),
        ("k_ts", k_ts, (k_ts.shape[0], n)),
        ("y_s", y_s, (n, y_s.shape[1])),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {expected}, k_ss being "
                f"{tuple(k_ss.shape)}"
            )
    if not 0 <= reg < float("inf"):
        raise ValueError(f"reg: got {reg}, expected a finite number >= 0")
    if solve_dtype not in (None, torch.float32, torch.float64):
        raise TypeError(
            f"solve_dtype: got {solve_dtype}, expected torch.float32, torch.float64 or None"
        )


def _check_matrix(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
    refuse_transforms(tensor)
    if tensor.dim() != 2 or not tensor.numel():
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected a matrix, not empty")


def _checked_targets(k_ts: Tensor, y_s: Tensor | None, y_t: Tensor, loss: str) -> Tensor:
    """y_t, or for cross-entropy the integer labels it stands for."""
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}, expected one of {', '.join(LOSSES)}")
    if not isinstance(y_t, Tensor):
        raise TypeError(f"y_t: got {type(y_t).__name__}, expected a tensor")
    rows = k_ts.shape[0]
    integers = loss == "cross_entropy" and y_t.dim() == 1
    if integers:
        if y_t.is_floating_point() or y_t.is_complex() or y_t.dtype == torch.bool:
            raise TypeError(f"y_t: got {y_t.dtype}, expected integer labels or (m, C) floats")
        expected: tuple[int, ...] = (rows,)
        refuse_transforms(y_t)
    else:
        _check_matrix("y_t", y_t)
        expected = (rows, y_t.shape[1] if y_s is None else y_s.shape[1])
    if tuple(y_t.shape) != expected:
        raise ValueError(
            f"y_t: got shape {tuple(y_t.shape)}, expected {expected}, the rows of k_ts"
            + ("" if len(expected) == 1 or y_s is None else " and the columns of y_s")
        )
    if y_t.device != k_ts.device:
        raise ValueError(f"y_t: on {y_t.device}, expected {k_ts.device}, where k_ts is")
    if loss == "mse":
        return y_t
    return y_t.long() if integers else y_t.argmax(1)
