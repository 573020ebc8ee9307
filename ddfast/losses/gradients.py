"""The distance of weight gradients: DC, DSA, DCC, IDC."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.losses.dtypes import FLOATS
from ddfast.ops import gradient_distance as ops
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.gradient_distance import METRICS


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
            and device; float32, float64, bfloat16 or float16 in any mix, computed
            in the dtype that holds all.
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
    value, _ = ops.gradient_distance(syn, real, metric, float(eps), batched, with_gradient)
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
        value, gradient = ops.gradient_distance(syn, real, metric, float(eps), batched, True)
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
