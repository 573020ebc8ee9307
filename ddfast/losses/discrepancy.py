"""The maximum mean discrepancy of two sets of features: M3D."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.losses.dtypes import FLOATS
from ddfast.ops import mmd as ops
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.gradient_distance import accumulator

#: The factors of M3D's Gaussian mixture, and the rates of what it calls a Laplace kernel.
_M3D_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_M3D_RATES = (0.1, 1.0, 5.0)
_MMD_KERNELS = ("gaussian", "laplace", "m3d_laplace", "linear", "polynomial", "energy")

Bandwidth = float | Sequence[float] | Tensor | str | None


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: str = "gaussian",
    bandwidth: Bandwidth = None,
    unbiased: bool = False,
    degree: int = 2,
) -> Tensor:
    """Squared maximum mean discrepancy of two sets of rows (Gretton et al., JMLR 2012).

    mean K(x, x') - 2 mean K(x, y) + mean K(y, y'), tile by tile: no n x m matrix is ever stored.
    With D = |a - b|:

    * `gaussian`: sum over h in bandwidth of exp(-D^2 / h);
    * `laplace`: sum over h in bandwidth of exp(-D / h);
    * `m3d_laplace`: exp(-D^2 / 10) + exp(-D^2) + exp(-5 D^2), the one M3D (Zhang et al., AAAI
      2024) calls so: the sum over g in 0.1, 1, 5 of exp(-g D^2);
    * `energy`: -D, so that MMD^2 is the energy distance 2 E|a - b| - E|a - a'| - E|b - b'|;
    * `linear`: <a, b>; biased, it is `class_mean_distance`, the loss of DM;
    * `polynomial`: (<a, b> + 1)^degree; of degree 1 it is `linear`.

    The slow equivalent is `ddfast.reference.mmd.mmd`. On CPU the value and the gradients that are
    needed come from one pass. First derivatives, with respect to either set or both; a second
    raises NotImplementedError. Where D = 0 the kernels of D have slope zero; equal rows are at
    exactly that distance. Features that are not finite give NaN, and so do those whose squared
    distances overflow the dtype of the result.

    Args:
        x, y: (..., n, d) and (..., m, d), the same leading dimensions; float32, float64, bfloat16
            or float16. Any strides; only the last one must be 1 to be read without a copy.
        kernel: one of the above.
        bandwidth: of `gaussian` and `laplace`. None: M3D's heuristic, with b the mean squared
            distance of all pairs of different pooled rows, for `gaussian` the five bandwidths b / 4
            to 4 b, doubling; for `laplace` sqrt(b). "median": the median squared distance of those
            pairs, i < j, exact and the lower of two (its root for `laplace`). Or one number, or a
            sequence of them, or a tensor in the shape of the leading dimensions, which may have one
            more for several bandwidths each. Never differentiated. A heuristic that comes to zero,
            as where all rows are equal, or so near that its inverse would overflow (2e-31 in
            float32, 4e-301 in float64), gives value 0 and gradient 0.
        unbiased: leaves out the pairs of a row with itself.
        degree: of `polynomial`.

    Returns:
        The leading dimensions' shape; float64 if either set is, else float32.

    Raises:
        TypeError: not tensors, or not floating point; bandwidth of another type.
        ValueError: shapes that do not fit, no rows, unknown kernel; unbiased with a single row;
            bandwidth not positive, or too small for its inverse (of a tensor this is not checked
            under torch.compile), or given to a kernel that has none; degree below 1.
    """
    sets = _checked_sets(x, y, kernel, bandwidth, unbiased, degree)
    with_gradient = torch.is_grad_enabled() and x.device.type == "cpu"
    value, _ = ops.mmd(*sets, with_gradient and x.requires_grad, with_gradient and y.requires_grad)
    return value.reshape(x.shape[:-2])


def mmd_and_gradient(
    x: Tensor,
    y: Tensor,
    kernel: str = "gaussian",
    bandwidth: Bandwidth = None,
    unbiased: bool = False,
    degree: int = 2,
) -> tuple[Tensor, Tensor]:
    """MMD^2 and its gradient with respect to x in one pass, outside autograd.

    Arguments and errors as `mmd`.

    Returns:
        The value, and the gradient of its sum in the shape of x, in the value's dtype. Neither is
        attached to a graph.
    """
    sets = _checked_sets(x, y, kernel, bandwidth, unbiased, degree)
    with torch.no_grad():
        value, (by_x,) = ops.mmd(*sets, True, False)
    return value.reshape(x.shape[:-2]), by_x.reshape(x.shape)


def _checked_sets(
    x: Tensor, y: Tensor, kernel: str, bandwidth: Bandwidth, unbiased: bool, degree: int
) -> tuple[Tensor, Tensor, Tensor, str, int, bool]:
    """What the operator takes, or the error that names what is wrong."""
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
        if tensor.dim() < 2:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected (..., rows, d)")
        rows = 2 if unbiased else 1
        if tensor.shape[-2] < rows and tensor.shape[:-2].numel():
            raise ValueError(
                f"{name}: got {tensor.shape[-2]} rows, expected at least {rows} because "
                f"unbiased={unbiased}"
            )
    refuse_transforms(x, y)
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, expected that of x, {tuple(x.shape)}, in all but the "
            "number of rows"
        )
    if x.device != y.device:
        raise ValueError(f"y: on {y.device}, expected {x.device}, where x is")
    if kernel not in _MMD_KERNELS:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(_MMD_KERNELS)}")
    if kernel == "polynomial" and operator.index(degree) < 1:
        raise ValueError(f"degree: got {degree}, expected an integer >= 1")
    classes = x.shape[:-2].numel()
    a, b = (t.reshape(classes, *t.shape[-2:]) for t in (x, y))
    wide = accumulator(torch.promote_types(x.dtype, y.dtype))
    if kernel in ("gaussian", "laplace"):
        bandwidths = _bandwidths(a, b, x.shape[:-2], kernel, bandwidth, wide)
    elif bandwidth is not None:
        raise ValueError(f"bandwidth: given, expected None because kernel is {kernel!r}")
    elif kernel == "m3d_laplace":
        kernel = "gaussian"
        bandwidths = torch.tensor([1 / g for g in _M3D_RATES], dtype=torch.float64, device=x.device)
    else:
        bandwidths = torch.empty(0, dtype=torch.float64, device=x.device)
    bandwidths = bandwidths.to(x.device, wide).expand(classes, -1)
    return a, b, bandwidths, kernel, int(degree), bool(unbiased)


def _least(dtype: torch.dtype) -> float:
    """The smallest bandwidth whose inverse, a few times over, is far from overflow."""
    return torch.finfo(dtype).tiny * 2**24


def _bandwidths(
    x: Tensor,
    y: Tensor,
    leading: torch.Size,
    kernel: str,
    bandwidth: Bandwidth,
    dtype: torch.dtype,
) -> Tensor:
    """(classes, bandwidths), or (bandwidths,) where all classes have the same.

    Args:
        dtype: what is computed in.
    """
    least = _least(dtype)
    expected = f"expected positive finite numbers, for {dtype} at least {least:.1g}"
    if bandwidth is None or isinstance(bandwidth, str):
        if bandwidth not in (None, "median"):
            raise ValueError(f"bandwidth: got {bandwidth!r}, expected None, 'median' or numbers")
        how = "mean" if bandwidth is None else "median"
        with torch.no_grad():
            found = ops.mmd_bandwidth(x.detach(), y.detach(), how)[:, None]
            found = torch.where(found < least, 0.0, found)  # a NaN stays
            if kernel == "laplace":
                return found.sqrt()
            return found if how == "median" else torch.cat([found * f for f in _M3D_FACTORS], 1)
    if isinstance(bandwidth, Tensor):
        values = bandwidth.detach()
        values = values.expand(leading) if values.dim() == 0 else values
        if values.shape == leading:
            values = values.unsqueeze(-1)
        elif values.shape[:-1] != leading:
            raise ValueError(
                f"bandwidth: got shape {tuple(values.shape)}, expected {tuple(leading)} or that "
                "and one more dimension"
            )
        values = values.reshape(x.shape[0], values.shape[-1]).to(torch.float64)
        if torch.compiler.is_compiling():
            return values
        if not values.shape[-1] or not bool(((values >= least) & values.isfinite()).all()):
            raise ValueError(f"bandwidth: got {bandwidth!r}, {expected}")
        return values
    try:
        numbers = [
            float(h) for h in ([bandwidth] if isinstance(bandwidth, (int, float)) else bandwidth)
        ]
    except (TypeError, ValueError):
        raise TypeError(
            f"bandwidth: got {bandwidth!r}, expected None, 'median', numbers or a tensor"
        ) from None
    if not numbers or not all(least <= h < float("inf") for h in numbers):
        raise ValueError(f"bandwidth: got {bandwidth!r}, {expected}")
    return torch.tensor(numbers, dtype=torch.float64)
