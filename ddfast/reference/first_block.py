"""The definition of `first_block` and its gradient, in plain torch.

The block that sees the images: a convolution, then `norm_relu_pool` of what it gives. The
convolution's result, many times as large as the images and as the block's result, is not kept:
the backward pass computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddfast.reference.class_weight_grad import class_conv, class_weight_grad
from ddfast.reference.norm_relu_pool import norm_relu_pool, norm_relu_pool_bwd


def first_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    padding: int,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, normalise, activate and pool.

    Args:
        x: (N, I, H, W).
        weight, bias: (O, I, kh, kw) and (O) or None, of the convolution, stride 1.
        norm_weight, norm_bias, groups, eps, activation, pool: as in `norm_relu_pool`.

    Returns:
        out, mean and rstd, as `norm_relu_pool`.
    """
    z = _convolved(x, weight, bias, padding)
    return norm_relu_pool(z, norm_weight, norm_bias, groups, eps, activation, pool)


def first_block_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    counts: Sequence[int],
    padding: int,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all but the images.

    Args:
        grad: of out.
        counts: images of each class, class after class.

    Returns:
        Of weight for each class, (C, O, I, kh, kw); of bias, norm_weight and norm_bias for each
        image, (N, O).
    """
    z = _convolved(x, weight, bias, padding)
    settings = groups, activation, pool
    gz, by_norm_weight, by_norm_bias = norm_relu_pool_bwd(
        grad, z, norm_weight, norm_bias, mean, rstd, *settings
    )
    kernel = list(weight.shape[2:])
    by_weight = class_weight_grad(x, gz, counts, kernel, padding, "direct")
    by_bias = gz.to(mean.dtype).sum((2, 3))
    return by_weight, by_bias, by_norm_weight, by_norm_bias


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    z = class_conv(x, weight.unsqueeze(0), [len(x)], padding, "direct")
    return z if bias is None else z + bias.view(1, -1, 1, 1)
