"""The definition of `norm_relu_pool_means`, in plain torch.

`norm_relu_pool`, and for each class the mean over its images of a = activation(y), before pooling:
what CAFE matches layer by layer (Wang et al., CVPR 2022). The images lie class after class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import _pooled, memory_format, norm_relu_pool


def norm_relu_pool_means(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    counts: Sequence[int],
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise, activate and pool; average the activation over the images of each class.

    May be differentiated any number of times.

    Args:
        counts: images of each class.
        others: as of `norm_relu_pool`.

    Returns:
        out, mean and rstd as `norm_relu_pool`; means, (classes, channels, H, W), in the
        accumulation dtype and the memory format of x, zeros for a class without images.
    """
    wide = x.to(accumulator(x.dtype))
    a, mean, rstd = norm_relu_pool(wide, weight, bias, groups, eps, activation, "none")
    parts = [p.mean(0) if len(p) else p.new_zeros(p.shape[1:]) for p in a.split(list(counts))]
    means = torch.stack(parts) if parts else a.new_zeros(0, *a.shape[1:])
    out = _pooled(a, pool).to(x.dtype)
    form = memory_format(x)
    return out.contiguous(memory_format=form), mean, rstd, means.contiguous(memory_format=form)
