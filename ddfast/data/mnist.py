"""MNIST and FashionMNIST from idx files, compressed or not."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.files import find_folder
from ddfast.data.normalisation import statistics_of

__all__ = ["fashion_mnist", "mnist"]

PathLike = str | os.PathLike[str]

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def _spellings(stem: str, dimensions: int) -> tuple[str, ...]:
    """The official name, and the one unpackers that dislike dashes give it."""
    names = (f"{stem}-idx{dimensions}-ubyte", f"{stem}.idx{dimensions}-ubyte")
    return (*names, *(f"{name}.gz" for name in names))


FILES = [
    _spellings("train-images", 3),
    _spellings("train-labels", 1),
    _spellings("t10k-images", 3),
    _spellings("t10k-labels", 1),
]


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An idx file of unsigned bytes: 0, 0, type 8, number of dimensions, big-endian sizes, data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes with {dimensions} dimensions: "
            f"it starts with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) != head + math.prod(shape):
        raise ValueError(
            f"{path} is damaged or cut short: sizes {shape} need {head + math.prod(shape)} bytes, "
            f"the file has {len(content)}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy())


def _read(
    name: str, data_path: PathLike | None, classes: tuple[str, ...], statistics: str
) -> Dataset:
    # Both data sets use the same file names, so the folders that carry the name come first.
    folders = [f"{name}/raw", name, "raw", ""]
    source = f"These are the four files of the official {name} distribution, as .gz or unpacked."
    _, paths = find_folder(data_path, folders, FILES, name, source)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(path, dimensions) for path, dimensions in zip(paths, (3, 1, 3, 1), strict=True)
    )
    train_images = train_images[:, None]
    mean, std = statistics_of(train_images, statistics)
    return Dataset(
        name=name,
        train_images=train_images,
        train_labels=train_labels.long(),
        test_images=test_images[:, None],
        test_labels=test_labels.long(),
        class_names=classes,
        mean=mean,
        std=std,
    )


def mnist(data_path: PathLike | None = None, statistics: str = "mnist") -> Dataset:
    """MNIST: 60 000 and 10 000 images of 1x28x28, digits 0-9.

    Args:
        data_path: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each with or without
            ``.gz``; or one that holds them in ``MNIST/raw/``, ``MNIST/`` or ``raw/``.
        statistics: see :func:`ddfast.data.load`.

    Raises:
        FileNotFoundError: the message lists what is expected and missing.
        ValueError: a damaged file.
    """
    return _read("MNIST", data_path, tuple(str(digit) for digit in range(10)), statistics)


def fashion_mnist(data_path: PathLike | None = None, statistics: str = "fashionmnist") -> Dataset:
    """FashionMNIST: 60 000 and 10 000 images of 1x28x28, 10 classes.

    Files, arguments and errors as for :func:`mnist`; subfolders are called ``FashionMNIST``.
    """
    return _read("FashionMNIST", data_path, FASHION_CLASSES, statistics)
