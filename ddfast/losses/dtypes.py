"""What a loss may be computed of."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes that losses, layers, kernels and augmentation take."""
