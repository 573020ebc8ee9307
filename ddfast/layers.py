"""Layers of the networks as fused functions.

Each runs on a compiled kernel (C++ on CPU, Triton on CUDA), supports autograd up to the order its
docstring states and refuses higher orders with an error, and never changes its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

from ddfast.losses import FLOATS
from ddfast.ops import norm_relu_pool as _norm_relu_pool
from ddfast.ops import norm_relu_pool_means as _norm_relu_pool_means
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.norm_relu_pool import ACTIVATIONS, POOLS


def norm_relu_pool(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 0,
    eps: float = 1e-5,
    activation: str = "relu",
    pool: str = "average",
) -> Tensor:
    """Group normalisation, activation and 2x2 pooling in one pass over memory.

    What follows the convolution in a block of a ConvNet. Only x and the mean and deviation of each
    group are kept for the derivatives; the rest is recomputed. The slow equivalent is
    `avg_pool2d(relu(group_norm(x, groups, weight, bias, eps)), 2)`. First and second derivatives,
    with respect to x, weight and bias; a third raises NotImplementedError. Compiled for float32 and
    float64; half types are computed in float32 by the reference on CPU.

    Args:
        x: (N, channels, H, W), float32, float64, bfloat16 or float16. The result comes in
            channels_last if x does, and contiguous otherwise; channels_last is the fastest.
        weight, bias: (channels,), of any of those dtypes; None for ones and zeros.
        groups: of channels that are normalised together, (N, groups) means in all; `channels` is
            instance norm (Ulyanov et al. 2016), 0 no normalisation.
        eps: added to the variance.
        activation: "relu", "leaky_relu" (slope 0.01), "sigmoid" or "swish" (x * sigmoid(x)).
        pool: "average" or "max" of 2x2 cells, which drop the last row or column of an odd plane
            (they still count for mean and variance); or "none".

    Returns:
        (N, channels, H // 2, W // 2), or x's shape for pool "none"; in x's dtype.

    Raises:
        TypeError: x, weight or bias not a floating tensor; groups not an integer.
        ValueError: another number of dimensions, a plane too small to pool or empty, groups that do
            not divide channels, weight or bias of another shape or device or without groups,
            negative or non-finite eps, an unknown activation or pool.
        NotImplementedError: under torch.func transforms or forward-mode differentiation.
    """
    groups = _check_block(x, weight, bias, groups, eps, activation, pool)
    out, _, _ = _norm_relu_pool.norm_relu_pool(
        x, weight, bias, groups, float(eps), activation, pool
    )
    return out


def norm_relu_pool_means(
    x: Tensor,
    counts: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 0,
    eps: float = 1e-5,
    activation: str = "relu",
    pool: str = "average",
) -> tuple[Tensor, Tensor]:
    """:func:`norm_relu_pool`, and each class's mean of the activation before pooling.

    What CAFE (Wang et al., CVPR 2022) matches layer by layer, without storing the activation. The
    slow equivalent averages `relu(group_norm(x, groups, weight, bias, eps))` over the images of
    each class. First and second derivatives; a third raises NotImplementedError.

    Args:
        x: (N, channels, H, W), class after class; dtypes and layout as for `norm_relu_pool`.
        counts: images of each class, N together.
        weight, bias, groups, eps, activation, pool: as for `norm_relu_pool`.

    Returns:
        (N, channels, H // 2, W // 2) in x's dtype; means, (classes, channels, H, W), in float64
        for float64, else float32, and zeros for a class without images.

    Raises:
        TypeError, ValueError, NotImplementedError: as `norm_relu_pool`; counts that are not
            integers, negative, or do not sum to N.
    """
    groups = _check_block(x, weight, bias, groups, eps, activation, pool)
    try:
        counts = [operator.index(count) for count in counts]
    except TypeError:
        raise TypeError(f"counts: got {counts!r}, expected a list of integers") from None
    if any(count < 0 for count in counts) or sum(counts) != len(x):
        raise ValueError(f"counts: got {counts}, expected integers >= 0 that sum to {len(x)}")
    out, _, _, means = _norm_relu_pool_means.norm_relu_pool_means(
        x, weight, bias, counts, groups, float(eps), activation, pool
    )
    return out, means


def _check_block(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> int:
    """The number of groups, or the error that says what is wrong."""
    _check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, channels, H, W)")
    channels, height, width = x.shape[1:]
    try:
        groups = operator.index(groups)
    except TypeError:
        raise TypeError(f"groups: got {groups!r}, expected an integer") from None
    if groups < 0 or (groups and channels % groups):
        raise ValueError(f"groups: got {groups}, expected 0 or a divisor of {channels} channels")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if pool not in POOLS:
        raise ValueError(f"pool: got {pool!r}, expected one of {', '.join(POOLS)}")
    least = 1 if pool == "none" else 2
    if channels < 1 or height < least or width < least:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected a channel and {least}x{least} pixels or more"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, expected a finite number >= 0")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        if groups == 0:
            raise ValueError(f"{name}: given, expected None without normalisation (groups=0)")
        if tensor.shape != (channels,):
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected ({channels},), the channels "
                "of x"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {x.device}, where x is")
    return groups


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    refuse_transforms(tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")


__all__ = ["norm_relu_pool", "norm_relu_pool_means"]
