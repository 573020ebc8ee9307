"""The matching losses of dataset distillation as drop-in functions.

Each runs on a compiled kernel (C++ on CPU, Triton on CUDA), supports autograd up to the order its
docstring states and refuses higher orders with an error, and never changes its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.characteristic import (
    Frequencies,
    characteristic_function,
    characteristic_function_distance,
    characteristic_function_distance_and_gradient,
)
from ddfast.ops import class_mean as _class_mean
from ddfast.ops import gradient_distance as _gradient_distance
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.gradient_distance import METRICS

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gradient_distance(
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    metric: str = "row_cosine",
    eps: float = 1e-6,
    batched: bool = False,
) -> Tensor:
    """Distance between two lists of weight gradients (Zhao et al., ICLR 2021, eq. 9 and 10).

    With a = real, b = syn, the sums over all tensors:

    * `row_cosine`: sum over output units i of 1 - <a_i, b_i> / (|a_i| |b_i| + eps); tensors with
      fewer than two dimensions (biases, norm layers) contribute 0, as in the published code;
    * `cosine`: 1 - <a, b> / (|a| |b| + eps), one vector over all tensors;
    * `mse`: |a - b|^2 summed; `l1`: |a - b| summed, over all tensors.

    The slow equivalent is `ddfast.reference.gradient_distance.gradient_distance`. On CPU the loss
    and its gradient with respect to `syn` are computed in one pass over memory. First and second
    derivatives, with respect to both lists; a third raises NotImplementedError.

    Args:
        syn, real: sequences of tensors in parameter shape, (out, in, ...), pairwise the same shape
            and device; float32, float64, bfloat16 or float16 in any mix (promoted pair by pair).
        metric: one of the above.
        eps: added to the product of norms, not a clamp.
        batched: every tensor has a leading class dimension, (classes, out, in, ...).

    Returns:
        Scalar, or (classes,) if `batched`. float64 if any tensor is, else float32.

    Raises:
        TypeError: not sequences of tensors, or not floating point.
        ValueError: empty, different lengths, shapes, devices or class counts; unknown metric;
            negative or non-finite eps.
    """
    syn, real = _checked_pair(syn, real, metric, eps, batched)
    with_gradient = (
        torch.is_grad_enabled()
        and syn[0].device.type == "cpu"
        and any(t.requires_grad for t in syn)
        and not any(t.requires_grad for t in real)
    )
    value, _ = _gradient_distance.gradient_distance(
        syn, real, metric, float(eps), batched, with_gradient
    )
    return value if batched else value[0]


def gradient_distance_and_gradient(
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    metric: str = "row_cosine",
    eps: float = 1e-6,
    batched: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The distance and its gradient with respect to `syn` in one pass, outside autograd.

    Arguments and errors as `gradient_distance`. For loops that go on by hand, such as
    forward-over-reverse matching, where the gradient is a constant.

    Returns:
        The distance, and one tensor per element of `syn` in its shape and (promoted) dtype. Neither
        is attached to a graph.
    """
    syn, real = _checked_pair(syn, real, metric, eps, batched)
    with torch.no_grad():
        value, gradient = _gradient_distance.gradient_distance(
            syn, real, metric, float(eps), batched, True
        )
    return (value if batched else value[0]), gradient


def _checked_pair(
    syn: Sequence[Tensor], real: Sequence[Tensor], metric: str, eps: float, batched: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Both lists in one dtype, or the error that names what is wrong."""
    for name, tensors in (("syn", syn), ("real", real)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: got {type(tensors).__name__}, expected a sequence of tensors")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}]: got {type(tensor).__name__}, expected a tensor")
            if tensor.dtype not in FLOATS:
                raise TypeError(f"{name}[{i}]: got {tensor.dtype}, expected a floating dtype")
    if not syn:
        raise ValueError("syn: got an empty sequence, expected at least one tensor")
    if len(syn) != len(real):
        raise ValueError(f"real: got {len(real)} tensors, expected {len(syn)}, as many as syn")
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, expected a finite number >= 0")
    device = syn[0].device
    for i, (s, r) in enumerate(zip(syn, real, strict=True)):
        if s.shape != r.shape:
            raise ValueError(
                f"real[{i}]: got shape {tuple(r.shape)}, expected {tuple(s.shape)}, as syn[{i}]"
            )
        if s.device != device or r.device != device:
            raise ValueError(
                f"syn[{i}], real[{i}]: on {s.device} and {r.device}, expected {device}"
            )
        if batched and (s.dim() == 0 or s.shape[0] != syn[0].shape[0]):
            raise ValueError(
                f"syn[{i}]: got shape {tuple(s.shape)}, expected a leading class dimension of "
                f"{syn[0].shape[0] if syn[0].dim() else '?'} because batched=True"
            )
    refuse_transforms(*syn, *real)
    dtype = syn[0].dtype
    for tensor in (*syn, *real):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [t.to(dtype) for t in syn], [t.to(dtype) for t in real]


def class_mean(x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Mean of the features of each class, in one pass over memory.

    The slow equivalent is `x.mean(1)`, or a mean over each part of `x.split(counts)`. Derivatives
    of every order; the gradient of a 3-D x is an expanded view.

    Args:
        x: (classes, n, d); or (N, d) with the rows of all classes, class 0 first, and `counts`.
            float32, float64, bfloat16 or float16. Any strides; only the last one must be 1 to be
            read without a copy.
        counts: rows of each class of a 2-D x, each at least 1, N together.

    Returns:
        (classes, d). float64 for float64, else float32.

    Raises:
        TypeError: x not a floating tensor, or counts not integers.
        ValueError: x of another number of dimensions, counts missing, given for a 3-D x or not
            adding up to N, or a class without rows.
    """
    return _class_mean.class_mean(x, _checked_counts("x", x, "counts", counts))


def class_mean_distance(
    syn: Tensor,
    real: Tensor,
    syn_counts: Sequence[int] | None = None,
    real_counts: Sequence[int] | None = None,
) -> Tensor:
    """Squared distance between the class means of two sets of features (Zhao, Bilen, WACV 2023).

    |mean(syn of class c) - mean(real of class c)|^2, summed over the features: the loss of DM is
    the sum over the classes. Both sets are read once; the gradient is known in closed form. The
    slow equivalent is `((syn.mean(1) - real.mean(1)) ** 2).sum(1)`. Derivatives of every order,
    with respect to both sets; the gradient of a 3-D set is an expanded view.

    Args:
        syn: (classes, n, d); or (N, d) with the rows of all classes, class 0 first, and
            `syn_counts`. float32, float64, bfloat16 or float16. Any strides; only the last one must
            be 1 to be read without a copy.
        real: the same for the real features; n and dtype may differ from those of syn.
        syn_counts, real_counts: rows of each class of a 2-D set, each at least 1, N together.

    Returns:
        (classes,). float64 if either set is, else float32.

    Raises:
        TypeError: a set is not a floating tensor, or its counts are not integers.
        ValueError: a set of another number of dimensions, counts missing, given for a 3-D set or
            not adding up to N, a class without rows, or sets that differ in classes, d or device.
    """
    syn_rows = _checked_counts("syn", syn, "syn_counts", syn_counts)
    real_rows = _checked_counts("real", real, "real_counts", real_counts)
    syn_classes = syn.shape[0] if syn.dim() == 3 else len(syn_rows)
    real_classes = real.shape[0] if real.dim() == 3 else len(real_rows)
    if syn_classes != real_classes:
        raise ValueError(f"real: got {real_classes} classes, expected {syn_classes}, those of syn")
    if syn.shape[-1] != real.shape[-1]:
        raise ValueError(
            f"real: got {real.shape[-1]} features per row, expected {syn.shape[-1]}, as many as syn"
        )
    if syn.device != real.device:
        raise ValueError(f"real: on {real.device}, expected {syn.device}, where syn is")
    distance, _ = _class_mean.class_mean_distance(syn, real, syn_rows, real_rows)
    return distance


def _checked_counts(
    name: str, x: Tensor, counts_name: str, counts: Sequence[int] | None
) -> list[int]:
    """The rows of each class of a 2-D x, [] for a 3-D x, or the error that names what is wrong."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
    refuse_transforms(x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got {x.dtype}, expected a floating dtype")
    if x.dim() == 3:
        if counts is not None:
            raise ValueError(
                f"{counts_name}: given, expected None because {name} is (classes, n, d)"
            )
        if x.shape[0] > 0 and x.shape[1] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected a row or more per class"
            )
        return []
    if x.dim() != 2:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected (classes, n, d), or (N, d) and "
            f"{counts_name}"
        )
    if counts is None:
        raise ValueError(
            f"{counts_name}: got None, expected the rows of each class because {name} is (N, d)"
        )
    try:
        rows = [operator.index(n) for n in counts]
    except TypeError:
        raise TypeError(f"{counts_name}: got {counts!r}, expected a sequence of integers") from None
    for c, n in enumerate(rows):
        if n < 1:
            raise ValueError(f"{counts_name}[{c}]: got {n}, expected a row or more for every class")
    if sum(rows) != x.shape[0]:
        raise ValueError(
            f"{counts_name}: add up to {sum(rows)}, expected {x.shape[0]}, the rows of {name}"
        )
    return rows


__all__ = [
    "Frequencies",
    "characteristic_function",
    "characteristic_function_distance",
    "characteristic_function_distance_and_gradient",
    "class_mean",
    "class_mean_distance",
    "gradient_distance",
    "gradient_distance_and_gradient",
]
