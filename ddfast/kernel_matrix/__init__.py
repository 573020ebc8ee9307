"""Kernel matrices of infinitely wide networks, and of the features of random ones."""

from __future__ import annotations

from ddfast.kernel_matrix.empirical import empirical_nngp
from ddfast.kernel_matrix.matrix import kernel_matrix
from ddfast.kernel_matrix.naming import kernel_options

__all__ = ["empirical_nngp", "kernel_matrix", "kernel_options"]
