from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ddfast.data import Dataset


@pytest.fixture(autouse=True)
def global_random_state_is_left_alone():
    """Holds for every test of the folder: neither torch's, NumPy's nor Python's state moves."""
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    yield
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.fixture
def small_dataset():
    """Seven, five and four images of three classes; pixel values tell the images apart."""
    labels = torch.tensor([2, 0, 1, 0, 0, 2, 1, 0, 1, 2, 0, 1, 2, 1, 0, 0])
    images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 2, 3, 4).contiguous()
    return Dataset(
        name="small",
        train_images=images,
        train_labels=labels,
        test_images=images[:2] + 100,
        test_labels=labels[:2],
        class_names=("ant", "bee", "cat"),
        mean=(0.25, 0.5),
        std=(0.5, 0.125),
    )
