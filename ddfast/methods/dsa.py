"""DSA: gradient matching with the same augmentation of real and synthetic images.

Zhao and Bilen, Dataset Condensation with Differentiable Siamese Augmentation, ICML 2021
(arXiv 2102.08259). The loops are DC's. In an image update both sides of a class go through one
augmentation, drawn anew for every class and update; in network training each image has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddfast.data import Dataset
from ddfast.methods import dc
from ddfast.methods.config import dsa_strategy, setting

TITLE = "Dataset Condensation with Differentiable Siamese Augmentation (Zhao and Bilen, ICML 2021)"
MATCHES = "as DC, with the same augmentation on both sides"
PROTOCOL = "dsa"


@dataclass(frozen=True, kw_only=True)
class Config(dc.Config):
    """Settings of DSA, by default those of the paper and its code."""

    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """DC's, from real images, with all augmentations (without flip for digits)."""
        return {
            **super().published(dataset),
            "init": "real",
            "dsa_strategy": dsa_strategy(dataset),
        }


check = dc.check
step = dc.step
