"""Kernel matrices of infinitely wide networks."""

from __future__ import annotations

from ddfast.kernel_matrix.matrix import kernel_matrix

__all__ = ["kernel_matrix"]
