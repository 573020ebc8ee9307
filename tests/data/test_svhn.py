from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.io
import torch

from ddfast.data import load
from ddfast.random import generator


@pytest.fixture
def splits():
    """The official arrays: X (32, 32, 3, N) and y (N, 1) with 10 for the digit 0."""
    result = {}
    for name, number in (("train", 12), ("test", 3)):
        pixels = torch.randint(256, (32, 32, 3, number), generator=generator(0, name))
        labels = np.arange(number, dtype=np.uint8).reshape(-1, 1) % 10 + 1
        result[name] = {"X": pixels.numpy().astype(np.uint8), "y": labels}
    return result


def write(folder, splits, kind):
    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in splits.items():
        if kind == "mat":
            scipy.io.savemat(folder / f"{name}_32x32.mat", arrays)
        else:
            np.savez(folder / f"{name}_32x32.npz", **arrays)


@pytest.mark.parametrize("kind", ["mat", "npz"])
@pytest.mark.parametrize("place", ["", "SVHN", "svhn"])
def test_layouts(tmp_path, splits, kind, place):
    write(tmp_path / place, splits, kind)
    dataset = load("SVHN", tmp_path)
    assert dataset.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert dataset.test_labels.tolist() == [1, 2, 3]
    for n, row, column, channel in ((0, 0, 0, 0), (5, 3, 30, 2), (11, 31, 1, 1)):
        expected = splits["train"]["X"][row, column, channel, n]
        assert dataset.train_images[n, channel, row, column] == expected
    assert dataset.test_images.shape == (3, 3, 32, 32)
    assert dataset.mean == (0.4377, 0.4438, 0.4728)


def test_mat_without_scipy(tmp_path, splits, monkeypatch):
    write(tmp_path, splits, "mat")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install scipy; or .*32x32\.npz"):
        load("SVHN", tmp_path)


def test_wrong_files(tmp_path, splits):
    with pytest.raises(FileNotFoundError, match=r"train_32x32.npz or train_32x32.mat"):
        load("SVHN", tmp_path)
    good = splits["train"]
    splits["train"] = {"X": good["X"][:31], "y": good["y"]}
    write(tmp_path, splits, "npz")
    with pytest.raises(ValueError, match=r"train_32x32.npz .* got uint8 \(31, 32, 3, 12\)"):
        load("SVHN", tmp_path)
    splits["train"] = {"X": good["X"], "y": good["y"] - 1}
    write(tmp_path, splits, "npz")
    with pytest.raises(ValueError, match=r"labels must lie in 1..10 .* got 0..9"):
        load("SVHN", tmp_path)
    splits["train"] = {"X": good["X"]}
    write(tmp_path, splits, "npz")
    with pytest.raises(ValueError, match=r"has no array 'y'"):
        load("SVHN", tmp_path)


def test_an_npz_is_never_unpickled(tmp_path, splits):
    splits["train"]["y"] = np.array([{"a": 1}] * 12, dtype=object)
    write(tmp_path, splits, "npz")
    with pytest.raises(ValueError, match=r"allow_pickle"):
        load("SVHN", tmp_path)
