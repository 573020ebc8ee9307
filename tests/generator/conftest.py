"""A tiny data set and settings with which training takes a second."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddfast.data import Dataset, generated
from ddfast.generator.adversarial import Config

SMALL: dict[str, Any] = {
    "iterations": 6,
    "batch": 4,
    "latent_dim": 3,
    "width": 2,
    "width_discriminator": 2,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The networks here are far too small for more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return generated(classes=3, size=8, train_per_class=6, test_per_class=2)


@pytest.fixture
def make_config():
    def make(**settings: Any) -> Config:
        return Config(**SMALL | settings)

    return make
