"""Means of the features of each class, and their distance: DM."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

from ddfast.losses.dtypes import FLOATS
from ddfast.ops import class_mean as ops
from ddfast.ops.registry import refuse_transforms


def class_mean(x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Mean of the features of each class, in one pass over memory.

    What DM compares (Zhao, Bilen, WACV 2023, see `class_mean_distance`). The slow equivalent is
    `x.mean(1)`, or a mean over each part of `x.split(counts)`. Derivatives of every order; the
    gradient of a 3-D x is an expanded view.

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
    return ops.class_mean(x, _checked_counts("x", x, "counts", counts))


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
        real: the real features, in shapes as those of syn; n and dtype may differ.
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
    distance, _ = ops.class_mean_distance(syn, real, syn_rows, real_rows)
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
