"""The definition of `trajectory` and `trajectory_distance`, in plain torch.

Source: Cazenavette et al., Dataset Distillation by Matching Training Trajectories, CVPR 2022, eq. 3
(the distance), and Cui et al., ICML 2023 (the running sum of gradients, of which the final
parameters are a linear function). Everything here may be differentiated any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.reference.gradient_distance import accumulator


def trajectory(
    theta: Tensor, gradient: Tensor, total: Tensor, start: Tensor, target: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One SGD step, the running sum of gradients, and how far from the target that leads.

    Args:
        theta, gradient, start, target: (P,) of one dtype.
        total: (P,), float64 for float64, else float32.
        lr: 0-d, of the dtype of `total`.

    Returns:
        theta - lr gradient in theta's dtype; total + gradient; and (2,), squared distances to
        `target`, of the first, before it is rounded to theta's dtype, and of `start`. All is
        computed in the dtype of `total`.
    """
    wide = total.dtype
    moved = theta.to(wide) - lr * gradient.to(wide)
    squares = trajectory_distance(moved, start.to(wide), target.to(wide))
    return moved.to(theta.dtype), total + gradient.to(wide), squares


def trajectory_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """(2,): |student - target|^2 and |start - target|^2, of three vectors of one dtype.

    float64 for float64, else float32, which the differences are computed in.
    """
    wide = accumulator(student.dtype)
    away = [x.to(wide) - target.to(wide) for x in (student, start)]
    return torch.stack([(difference * difference).sum() for difference in away])
