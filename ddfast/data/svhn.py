"""Street View House Numbers, the cropped digits, from the official .mat files or as .npz."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.files import find_folder, require
from ddfast.data.normalisation import statistics_of

__all__ = ["svhn"]

FILES = [
    ("train_32x32.npz", "train_32x32.mat"),
    ("test_32x32.npz", "test_32x32.mat"),
]


def _read_split(path: Path) -> tuple[Tensor, Tensor]:
    content: dict[str, np.ndarray]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            content = {key: archive[key] for key in ("X", "y") if key in archive}
    else:
        scipy_io = require(
            "scipy.io",
            f"reading {path.name}",
            "pip install scipy; or save the arrays X and y of the file as "
            f"{path.with_suffix('.npz').name}",
        )
        content = scipy_io.loadmat(str(path), variable_names=["X", "y"])
    for key in ("X", "y"):
        if key not in content:
            raise ValueError(f"{path} is not in SVHN's format: it has no array {key!r}")
    pixels, labels = content["X"], np.asarray(content["y"]).reshape(-1).astype(np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)):
        raise ValueError(
            f"{path} is not in SVHN's format: expected X as uint8 (32, 32, 3, {len(labels)}) "
            f"for {len(labels)} labels, got {pixels.dtype} {pixels.shape}"
        )
    if len(labels) and (labels.min() < 1 or labels.max() > 10):
        raise ValueError(
            f"{path} is not in SVHN's format: labels must lie in 1..10 (10 is the digit 0), "
            f"got {labels.min()}..{labels.max()}"
        )
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(labels % 10)


def svhn(data_path: str | os.PathLike[str] | None = None, statistics: str = "svhn") -> Dataset:
    """SVHN, format 2: 73 257 and 26 032 images of 3x32x32, digits 0-9.

    Args:
        data_path: the folder with ``train_32x32.mat`` and ``test_32x32.mat`` (read with SciPy),
            or the same arrays ``X`` and ``y`` as ``.npz``; or one that holds them in ``SVHN/``
            or ``svhn/``. The label 10 of the files is the digit 0.
        statistics: see :func:`ddfast.data.load`.

    Raises:
        FileNotFoundError: the message lists what is expected and missing.
        ImportError: a .mat file without SciPy.
        ValueError: a file in another format.
    """
    source = "These are the official files of the cropped digits (format 2)."
    _, paths = find_folder(data_path, ["SVHN", "svhn", ""], FILES, "SVHN", source)
    (train_images, train_labels), (test_images, test_labels) = map(_read_split, paths)
    mean, std = statistics_of(train_images, statistics)
    return Dataset(
        name="SVHN",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(str(digit) for digit in range(10)),
        mean=mean,
        std=std,
    )
