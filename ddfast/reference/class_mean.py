"""The definition of `class_mean` and `class_mean_distance`, in plain torch.

Source: Zhao, Bilen, Dataset Condensation with Distribution Matching, WACV 2023, eq. 6: per class c,

    distance_c = |mean_c(syn) - mean_c(real)|^2      summed over the features

Features are (classes, rows, width), or (rows of all classes, width) with the number of rows of each
class, class 0 first. Everything here may be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator


def class_mean(x: Tensor, counts: Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    """Mean of each class's rows, (classes, width), contiguous.

    Args:
        x: (classes, rows, width); or (rows of all classes, width) with `counts`.
        counts: rows of each class of a 2-D x.
        dtype: of the sums and the result; None: float64 for float64 features, else float32.
    """
    dtype = accumulator(x.dtype) if dtype is None else dtype
    if x.dim() == 3:
        return x.mean(1, dtype=dtype).contiguous()
    if not counts:
        return x.new_zeros(0, x.shape[1], dtype=dtype)
    return torch.stack([part.mean(0, dtype=dtype) for part in x.split(list(counts))])


def class_mean_bwd(grad: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """grad, (classes, width), divided by each class's count and repeated for each of its rows.

    The derivative of `class_mean` with respect to a 2-D x, as class_mean is the derivative of this.

    Returns:
        (rows of all classes, width) of dtype `dtype`.
    """
    repeats = torch.tensor(counts, dtype=torch.int64, device=grad.device)
    share = (grad / repeats.unsqueeze(1)).to(dtype)
    return share.repeat_interleave(repeats, 0, output_size=sum(counts))


def class_mean_distance(
    syn: Tensor,
    real: Tensor,
    syn_counts: Sequence[int] = (),
    real_counts: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Squared distance of the class means, (classes,), and their difference, (classes, width).

    Arguments as `class_mean`, for both sets. Sums and results are float64 if either set is, else
    float32.
    """
    dtype = accumulator(torch.promote_types(syn.dtype, real.dtype))
    difference = class_mean(syn, syn_counts, dtype) - class_mean(real, real_counts, dtype)
    return (difference * difference).sum(1), difference
