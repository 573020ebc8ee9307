"""The matching losses of dataset distillation as drop-in functions.

Each runs on a compiled kernel (C++ on CPU, Triton on CUDA), supports autograd up to the order its
docstring states and refuses higher orders with an error, and never changes its inputs.
"""

from __future__ import annotations

from ddfast.losses.characteristic import (
    Frequencies,
    characteristic_function,
    characteristic_function_distance,
    characteristic_function_distance_and_gradient,
)
from ddfast.losses.discrepancy import mmd, mmd_and_gradient
from ddfast.losses.dtypes import FLOATS
from ddfast.losses.gradients import gradient_distance, gradient_distance_and_gradient
from ddfast.losses.means import class_mean, class_mean_distance
from ddfast.losses.regression import krr_loss, krr_predict, label_solve
from ddfast.losses.trajectories import trajectory_distance

__all__ = [
    "FLOATS",
    "Frequencies",
    "characteristic_function",
    "characteristic_function_distance",
    "characteristic_function_distance_and_gradient",
    "class_mean",
    "class_mean_distance",
    "gradient_distance",
    "gradient_distance_and_gradient",
    "krr_loss",
    "krr_predict",
    "label_solve",
    "mmd",
    "mmd_and_gradient",
    "trajectory_distance",
]
