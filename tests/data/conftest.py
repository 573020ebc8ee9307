from __future__ import annotations

import pytest
import torch

from ddfast.data import Dataset


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
