from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch

from ddfast.data import channel_statistics, load


@pytest.fixture(scope="module")
def dataset():
    return load("digits")


def test_levels_are_lossless(dataset):
    from sklearn.datasets import load_digits

    images = torch.cat([dataset.train_images, dataset.test_images])[:, 0].numpy()
    levels = np.rint(images.astype(np.float64) * 16 / 255).astype(np.int64)
    assert np.array_equal(np.rint(levels * 255 / 16), images)
    labels = torch.cat([dataset.train_labels, dataset.test_labels]).tolist()

    def multiset(all_levels, all_labels):
        return sorted(
            (int(label), image.tobytes())
            for image, label in zip(all_levels, all_labels, strict=True)
        )

    bunch = load_digits()
    assert multiset(levels, labels) == multiset(bunch.images.astype(np.int64), bunch.target)


def test_split_is_stratified_and_pinned(dataset):
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (1438, 359)
    train, test = dataset.train_labels.bincount(), dataset.test_labels.bincount()
    assert test.tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert ((test - (train + test) / 5).abs() <= 0.5).all()
    # Of the test images and labels, in order; changes only if the split does.
    digest = hashlib.sha256(dataset.test_images.numpy().tobytes())
    digest.update(dataset.test_labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "5ffdc20c47be0118"


def test_constants_are_those_of_the_training_split(dataset):
    assert (dataset.mean, dataset.std) == channel_statistics(dataset.train_images)
    assert load("digits", statistics="mnist").mean == (0.1307,)
    assert dataset.class_names == tuple("0123456789")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"needs sklearn: pip install ddfast\[digits\]"):
        load("digits")
