"""IDC-I: IDC without multi-formation. Every image is stored as it is trained on, the factor is 1.

Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022
(arXiv 2205.14959). Everything else is IDC's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddfast.data import Dataset
from ddfast.methods import idc

TITLE = idc.TITLE
MATCHES = "convolutions' gradients of each class; IDC with factor 1"
PROTOCOL = "idc"


@dataclass(frozen=True, kw_only=True)
class Config(idc.Config):
    """Settings of IDC-I, by default those of the paper's code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor not in (None, 1):
            raise ValueError(f"factor: got {self.factor}, and idc_i is idc with factor 1")

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """IDC's, with factor 1."""
        return idc.Config.published(dataclasses.replace(self, factor=1), dataset)


check = idc.check
step = idc.step
