"""scikit-learn's handwritten digits: 1797 images of 8x8 pixels, the data set of the demo."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ddfast.data.dataset import Dataset
from ddfast.data.files import require
from ddfast.data.normalisation import statistics_of

__all__ = ["digits"]

# Of the 1438 training images below, as channel_statistics computes them (a test compares).
MEAN = (0.3051170181215741,)
STD = (0.375698479193374,)


def _is_test(labels: np.ndarray) -> np.ndarray:
    """A fifth of each class, chosen by a hash of the position.

    No random number generator is involved, so the split is the same with every version of every
    library and has nothing to do with the seed of a run.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit).tolist()
        members.sort(key=lambda index: hashlib.sha256(f"digits:{index}".encode()).digest())
        chosen[members[: round(len(members) / 5)]] = True
    return chosen


def digits(statistics: str | None = None) -> Dataset:
    """Digits 0-9, one channel, 8x8, split 80/20 within each class, always the same way.

    The 17 grey levels 0..16 become ``round(level * 255 / 16)``, from which they can be recovered.

    Args:
        statistics: None for the constants of the training split, or see
            :func:`ddfast.data.load`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    sklearn_datasets = require(
        "sklearn.datasets", "the digits data set", "pip install ddfast[digits]"
    )
    bunch = sklearn_datasets.load_digits()
    levels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    images = torch.from_numpy(levels)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    test = torch.from_numpy(_is_test(bunch.target))
    train_images = images[~test]
    mean, std = (MEAN, STD) if statistics is None else statistics_of(train_images, statistics)
    return Dataset(
        name="digits",
        train_images=train_images,
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        class_names=tuple(str(digit) for digit in range(10)),
        mean=mean,
        std=std,
    )
