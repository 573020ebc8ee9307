"""The definition of `norm_relu_pool` and its derivatives, in plain torch.

One block of a ConvNet behind its convolution: normalisation over (group of channels, H, W) of each
image (Ulyanov et al. 2016, Wu and He 2018), activation, pooling of 2x2 cells. With n values in a
group, xh = (x - mean) * rstd, y = weight * xh + bias, a = activation(y):

    out = pool(a)
    tangent:  xh' = rstd (x' - mean(x') - xh mean(x' xh)),  y' = weight xh' + weight' xh + bias'
              out' = pool(activation'(y) y'), a maximum taken where out took it
    bwd:      gy = unpool(grad) activation'(y),  gxh = weight gy
              grad_x = rstd (gxh - mean(gxh) - xh mean(gxh xh))
    tangent_bwd: the derivative of bwd along (x', weight', bias', grad')

`norm_relu_pool` itself may be differentiated any number of times; the other three are closed forms.
Half types are computed in float32 and rounded at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast.reference.gradient_distance import accumulator

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "swish")
POOLS = ("average", "max", "none")
SLOPE = 0.01  # of leaky_relu


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results: channels_last if x is in that and no other, else contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def norm_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, activate and pool.

    Args:
        x: (N, channels, H, W).
        weight, bias: (channels) or None.
        groups: channels for instance norm, fewer for group norm, 0 for no norm.

    Returns:
        out in x's dtype, (N, channels, H // 2, W // 2) or x's shape; mean and 1 / sqrt(variance +
        eps), (N, groups), in the accumulation dtype.
    """
    wide = x.to(accumulator(x.dtype))
    if groups == 0:
        mean, rstd = wide.new_zeros(x.shape[0], 0), wide.new_zeros(x.shape[0], 0)
        normalised = wide
    else:
        grouped = wide.reshape(*_grouped(x, groups))
        mean = grouped.mean(2)
        centred = grouped - mean.unsqueeze(2)
        rstd = (centred.square().mean(2) + eps).rsqrt()
        normalised = (centred * rstd.unsqueeze(2)).view(x.shape)
    y = _affine(normalised, weight, bias)
    return _like(x, _pooled(_activated(y, activation), pool)), mean, rstd


def norm_relu_pool_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients: of x; of weight and of bias for each image, (N, channels).

    Without normalisation (groups = 0) weight and bias count as 1 and 0 and xh as x.
    """
    xh, y, spread = _recomputed(x, weight, bias, mean, rstd, groups)
    a, first, _ = _derivatives(y, activation)
    gy = _unpooled(grad.to(y.dtype), a, pool) * first
    gxh = gy if weight is None else gy * _over_plane(weight)
    grad_x = gxh
    if groups:
        projected = _average(gxh, groups) + xh * _average(gxh * xh, groups)
        grad_x = spread * (gxh - projected)
    return _like(x, grad_x), (gy * xh).sum((2, 3)), gy.sum((2, 3))


def norm_relu_pool_tangent(
    x: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> Tensor:
    """The derivative of out along the tangents; those of weight and bias may be (N, channels)."""
    xh, y, spread = _recomputed(x, weight, bias, mean, rstd, groups)
    a, first, _ = _derivatives(y, activation)
    _, moved = _moved(xh, spread, tangent, weight, weight_tangent, bias_tangent, groups)
    moved = first * moved
    if pool == "max":
        _, where = F.max_pool2d(a, 2, return_indices=True)
        return _like(x, moved.flatten(2).gather(2, where.flatten(2)).view(where.shape))
    return _like(x, _pooled(moved, pool))


def norm_relu_pool_tangent_bwd(
    grad: Tensor,
    grad_tangent: Tensor | None,
    x: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of the three gradients along the tangents, that of grad included."""
    xh, y, spread = _recomputed(x, weight, bias, mean, rstd, groups)
    a, first, second = _derivatives(y, activation)
    xh_moved, y_moved = _moved(xh, spread, tangent, weight, weight_tangent, bias_tangent, groups)
    over = _unpooled(grad.to(y.dtype), a, pool)
    gy, gy_moved = over * first, over * second * y_moved
    if grad_tangent is not None:
        gy_moved = gy_moved + _unpooled(grad_tangent.to(y.dtype), a, pool) * first
    gxh, gxh_moved = gy, gy_moved
    if weight is not None:
        gxh, gxh_moved = gy * _over_plane(weight), gy_moved * _over_plane(weight)
    if weight_tangent is not None:
        gxh_moved = gxh_moved + gy * _over_plane(weight_tangent)
    grad_x = gxh_moved
    if groups:
        wide = tangent.to(y.dtype)
        spread_moved = -spread.square() * _average(wide * xh, groups)
        along = _average(gxh * xh, groups)
        along_moved = _average(gxh_moved * xh + gxh * xh_moved, groups)
        grad_x = spread_moved * (gxh - _average(gxh, groups) - xh * along) + spread * (
            gxh_moved - _average(gxh_moved, groups) - xh_moved * along - xh * along_moved
        )
    by_weight = (gy_moved * xh + gy * xh_moved).sum((2, 3))
    return _like(x, grad_x), by_weight, gy_moved.sum((2, 3))


# --- pieces -------------------------------------------------------------------------------------


def _grouped(x: Tensor, groups: int) -> tuple[int, int, int]:
    """(N, groups, values of a group), spelt out because an empty batch leaves nothing to infer."""
    return x.shape[0], groups, x.shape[1] // groups * x.shape[2] * x.shape[3]


def _like(x: Tensor, result: Tensor) -> Tensor:
    return result.to(x.dtype).contiguous(memory_format=memory_format(x))


def _over_plane(per_channel: Tensor) -> Tensor:
    """(channels) or (N, channels), to be broadcast over planes."""
    return per_channel[..., None, None]


def _over_groups(statistic: Tensor, channels: int) -> Tensor:
    """(N, groups) to (N, channels, 1, 1)."""
    size = statistic.shape[0], statistic.shape[1], channels // statistic.shape[1]
    return statistic.unsqueeze(2).expand(size).reshape(size[0], channels, 1, 1)


def _average(values: Tensor, groups: int) -> Tensor:
    """Mean over each group, (N, channels, 1, 1)."""
    return _over_groups(values.reshape(*_grouped(values, groups)).mean(2), values.shape[1])


def _affine(xh: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xh if weight is None else xh * _over_plane(weight)
    return y if bias is None else y + _over_plane(bias)


def _recomputed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """xh, y and rstd, the last (N, channels, 1, 1)."""
    xh = x.to(accumulator(x.dtype))
    spread = xh.new_ones(())
    if groups:
        spread = _over_groups(rstd, x.shape[1])
        xh = (xh - _over_groups(mean, x.shape[1])) * spread
    return xh, _affine(xh, weight, bias), spread


def _moved(
    xh: Tensor,
    spread: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """xh' and y'."""
    moved = tangent.to(xh.dtype)
    if groups:
        moved = spread * (moved - _average(moved, groups) - xh * _average(moved * xh, groups))
    y = _affine(moved, weight, bias_tangent)
    if weight_tangent is not None:
        y = y + _over_plane(weight_tangent) * xh
    return moved, y


def _activated(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    if activation == "leaky_relu":
        return F.leaky_relu(y, SLOPE)
    return torch.sigmoid(y) if activation == "sigmoid" else F.silu(y)


def _derivatives(y: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """The activation and its first two derivatives; relu'(0) = 0."""
    a = _activated(y, activation)
    if activation in ("relu", "leaky_relu"):
        low = 0.0 if activation == "relu" else SLOPE
        first = torch.where(y > 0, 1.0, low).to(y.dtype)
        return a, first, torch.zeros_like(y)
    s = torch.sigmoid(y)
    slope = s * (1 - s)
    if activation == "sigmoid":
        return a, slope, slope * (1 - 2 * s)
    return a, s + y * slope, slope * (2 + y * (1 - 2 * s))


def _pooled(a: Tensor, pool: str) -> Tensor:
    if pool == "average":
        return F.avg_pool2d(a, 2)
    return F.max_pool2d(a, 2) if pool == "max" else a


def _unpooled(grad: Tensor, a: Tensor, pool: str) -> Tensor:
    """The transpose of pooling at a: (N, channels, H // 2, W // 2) to a's shape."""
    if pool == "none":
        return grad
    if pool == "max":
        _, where = F.max_pool2d(a, 2, return_indices=True)
        zeros = a.new_zeros(a.shape).flatten(2)
        return zeros.scatter(2, where.flatten(2), grad.flatten(2)).view(a.shape)
    quarter = (grad / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.pad(quarter, (0, a.shape[3] % 2, 0, a.shape[2] % 2))
