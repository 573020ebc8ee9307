"""The characteristic function distance of NCFM: what `ddfast.losses` offers of it."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from ddfast.ops import characteristic_function as ops
from ddfast.ops.registry import TYPES, refuse_transforms
from ddfast.reference import characteristic_function as reference
from ddfast.reference.frequencies import WORD, Frequencies

#: Products <x, t> of so many bytes are kept for the backward: it then need not repeat the forward.
KEPT_BYTES = 64 << 20


def characteristic_function(x: Tensor, t: Tensor | Frequencies) -> Tensor:
    """Empirical characteristic function: the mean of exp(j <t, x>) over the rows of x.

    What NCFM compares (Wang et al., CVPR 2025, see `characteristic_function_distance`).

    One matrix product whose sines, cosines and sums are taken while a tile is in the cache; the
    matrix of rows x frequencies is stored for a backward only, and only up to 64 MiB. Rows may come
    in parts: the function of all is the mean of those of the parts, weighted by their rows. The
    slow equivalent is `(x @ t.mT).cos().mean(-2)` and the same with `sin`. First derivatives, with
    respect to x and t; a second raises NotImplementedError.

    Args:
        x: (n, d), or (classes, n, d). float32, float64, bfloat16 or float16. Any strides; only the
            last one must be 1 to be read without a copy.
        t: (k, d), for 3-D x also (classes, k, d), of any of those dtypes; or `Frequencies`, drawn
            inside the kernel for each class and never stored.

    Returns:
        (k, 2) or (classes, k, 2): real and imaginary parts. float64 if x or t is, else float32.

    Raises:
        TypeError: x or t not floating, or numbers of the frequencies that are not integers.
        ValueError: shapes or devices that do not fit, no rows, no frequencies, or `Frequencies`
            out of range.
    """
    _check_features("x", x)
    _check_frequencies(x, t)
    return _value(x, t)


def characteristic_function_distance(
    x: Tensor,
    y: Tensor | None,
    t: Tensor | Frequencies,
    alpha: float = 0.5,
    beta: float = 0.5,
    phi_y: Tensor | None = None,
) -> Tensor:
    """Distance between the characteristic functions of two sets (Wang et al., CVPR 2025, eq. 8).

    With a and b the functions of x and y at a frequency, the mean over the frequencies of

        sqrt(alpha (|a| - |b|)^2 + beta max(2 (|a| |b| - Re a Re b - Im a Im b), 1e-12))

    which for alpha = beta is sqrt(alpha) |a - b| where nothing is clamped. NCFM's loss is 300 times
    that, on features of norm 1. Equal sets have the distance sqrt(beta) * 1e-6 and gradient 0. The
    slow equivalent is in `ddfast.reference.characteristic_function`. First derivatives, with
    respect to x, y, t and phi_y; a second raises NotImplementedError.

    Args:
        x, y: (n, d) and (m, d), or (classes, n, d) and (classes, m, d). float32, float64, bfloat16
            or float16. Any strides; only the last one must be 1 to be read without a copy.
        t: the same frequencies for both, as for `characteristic_function`.
        alpha, beta: weights of amplitudes and phases; they need not add up to 1.
        phi_y: instead of y, which is then None: `characteristic_function(y, t)`, (k, 2) or
            (classes, k, 2), of any of those dtypes.

    Returns:
        Scalar, or (classes,). float64 if any tensor is, else float32.

    Raises:
        TypeError, ValueError: as `characteristic_function`; y and phi_y both or neither given, sets
            that differ in classes, d or device, or weights that are negative or not finite.
    """
    phi_y = _check_pair(x, y, t, alpha, beta, phi_y)
    return reference.distance(_value(x, t), phi_y, float(alpha), float(beta))


def characteristic_function_distance_and_gradient(
    x: Tensor,
    y: Tensor | None,
    t: Tensor | Frequencies,
    alpha: float = 0.5,
    beta: float = 0.5,
    phi_y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The distance and its gradient with respect to x, outside autograd.

    Arguments and errors as `characteristic_function_distance`. A few classes at a time, so that the
    products which are kept for the gradient stay below 64 MiB however many classes there are.

    Returns:
        The distance, and the gradient in the shape and dtype of x: of each class's distance by its
        own rows. Neither is attached to a graph.
    """
    with torch.no_grad():
        phi_y = _check_pair(x, y, t, alpha, beta, phi_y)
        features, given, drawn = _parts(x, t)
        of_y = phi_y.reshape(features.shape[0], *phi_y.shape[-2:])
        keep = _kept_bytes(1, x, t) <= KEPT_BYTES
        at_once = max(1, KEPT_BYTES // max(1, _kept_bytes(1, x, t)) if keep else len(features))
        values, gradients = [], []
        for first in range(0, max(1, len(features)), at_once):
            part = slice(first, first + at_once)
            of_t = given if given is None or given.shape[0] == 1 else given[part]
            count, seed, scale, stream = drawn
            arguments = features[part], of_t
            numbers = count, seed, scale, stream + first
            phi, phase = ops.characteristic_function(*arguments, *numbers, keep)
            value, by_phi = reference.distance_and_gradient(
                phi, of_y[part], float(alpha), float(beta)
            )
            by_x, _ = ops.characteristic_function_bwd(
                by_phi.to(phi.dtype), *arguments, phase, *numbers, True, False
            )
            values.append(value)
            gradients.append(by_x)
        value = values[0] if len(values) == 1 else torch.cat(values)
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
    return value.reshape(x.shape[:-2]), gradient.reshape(x.shape)


def _parts(
    x: Tensor, t: Tensor | Frequencies
) -> tuple[Tensor, Tensor | None, tuple[int, int, float, int]]:
    """x and t with a class dimension, and the numbers of drawn frequencies."""
    features = x if x.dim() == 3 else x.unsqueeze(0)
    if isinstance(t, Tensor):
        return features, t if t.dim() == 3 else t.unsqueeze(0), (0, 0, 1.0, 0)
    return features, None, (t.count, t.seed, float(t.scale), t.stream)


def _kept_bytes(classes: int, x: Tensor, t: Tensor | Frequencies) -> int:
    count = t.shape[-2] if isinstance(t, Tensor) else t.count
    dtype = reference.wide_dtype(x, t if isinstance(t, Tensor) else None)
    return classes * x.shape[-2] * count * dtype.itemsize


def _value(x: Tensor, t: Tensor | Frequencies) -> Tensor:
    """`characteristic_function` of checked arguments."""
    features, given, drawn = _parts(x, t)
    wanted = x.requires_grad or (given is not None and given.requires_grad)
    keep = torch.is_grad_enabled() and wanted and _kept_bytes(features.shape[0], x, t) <= KEPT_BYTES
    phi, _ = ops.characteristic_function(features, given, *drawn, keep)
    return phi if x.dim() == 3 else phi.squeeze(0)


# --- what a user passes -------------------------------------------------------------------------


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
    refuse_transforms(x)
    if x.dtype not in TYPES:
        raise TypeError(f"{name}: got {x.dtype}, expected a floating dtype")


def _check_features(name: str, x: Tensor) -> None:
    _check_tensor(name, x)
    if x.dim() not in (2, 3):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (n, d) or (classes, n, d)")
    if x.shape[-2] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected a row or more")


def _check_frequencies(x: Tensor, t: Tensor | Frequencies) -> None:
    classes = x.shape[0] if x.dim() == 3 else 1
    if isinstance(t, Frequencies):
        return _check_drawn(t, classes)
    _check_tensor("t", t)
    if t.shape != (*x.shape[:-2], *t.shape[-2:]) and t.dim() != 2:
        by_class = f" or ({classes}, k, d)" if x.dim() == 3 else ""
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected (k, d){by_class}")
    if t.shape[-2] == 0:
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected a frequency or more")
    if t.shape[-1] != x.shape[-1]:
        raise ValueError(f"t: got {t.shape[-1]} features, expected {x.shape[-1]}, as many as x")
    if t.device != x.device:
        raise ValueError(f"t: on {t.device}, expected {x.device}, where x is")
    return None


def _check_drawn(t: Frequencies, classes: int) -> None:
    limits = {"count": (1, WORD), "seed": (0, 2**63 - 1), "stream": (0, WORD + 1 - classes)}
    for name, (low, high) in limits.items():
        value = getattr(t, name)
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"t.{name}: got {value!r}, expected an integer") from None
        if not low <= number <= high:
            raise ValueError(f"t.{name}: got {value}, expected {low} to {high}")
    if not 0 <= t.scale < math.inf:
        raise ValueError(f"t.scale: got {t.scale}, expected a finite number >= 0")


def _check_pair(
    x: Tensor,
    y: Tensor | None,
    t: Tensor | Frequencies,
    alpha: float,
    beta: float,
    phi_y: Tensor | None,
) -> Tensor:
    """The characteristic function of y, given or computed, after everything has been checked."""
    _check_features("x", x)
    _check_frequencies(x, t)
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: got {weight}, expected a finite number >= 0")
    if (y is None) == (phi_y is None):
        raise ValueError("y, phi_y: got both or neither, expected one of the two")
    if phi_y is not None:
        _check_tensor("phi_y", phi_y)
        count = t.shape[-2] if isinstance(t, Tensor) else t.count
        shape = (*x.shape[:-2], count, 2)
        if phi_y.shape != shape:
            raise ValueError(f"phi_y: got shape {tuple(phi_y.shape)}, expected {shape}")
        if phi_y.device != x.device:
            raise ValueError(f"phi_y: on {phi_y.device}, expected {x.device}, where x is")
        return phi_y
    assert y is not None  # of the two, one is given
    _check_features("y", y)
    if y.shape[:-2] != x.shape[:-2]:
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, expected the classes of x, {tuple(x.shape[:-2])}"
        )
    if y.shape[-1] != x.shape[-1]:
        raise ValueError(f"y: got {y.shape[-1]} features, expected {x.shape[-1]}, as many as x")
    if y.device != x.device:
        raise ValueError(f"y: on {y.device}, expected {x.device}, where x is")
    return _value(y, t)


__all__ = [
    "Frequencies",
    "characteristic_function",
    "characteristic_function_distance",
    "characteristic_function_distance_and_gradient",
]
