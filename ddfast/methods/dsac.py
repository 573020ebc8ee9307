"""DSAC: DCC with the same augmentation of real and synthetic images.

Lee, Chun, Jung, Yun and Yoon, Dataset Condensation with Contrastive Signals, ICML 2022
(arXiv 2202.02916). DSAC is to DCC what DSA is to DC: both sides of a class go through one
augmentation, drawn anew for every class and update, also where all classes are matched together; in
network training each image has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddfast.data import Dataset
from ddfast.methods import dcc
from ddfast.methods.config import dsa_strategy, setting

TITLE = dcc.TITLE
MATCHES = "as DCC, with the same augmentation on both sides"
PROTOCOL = "dsa"


@dataclass(frozen=True, kw_only=True)
class Config(dcc.Config):
    """Settings of DSAC, by default those of the paper's code."""

    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """DCC's, with all augmentations (without flip for digits)."""
        return {**super().published(dataset), "dsa_strategy": dsa_strategy(dataset)}


check = dcc.check
step = dcc.step
