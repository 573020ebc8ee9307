"""Generated image classification of any size: for tests, for scale, for machines without data."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.files import whole_file
from ddfast.data.normalisation import statistics_of
from ddfast.data.polygons import SPLITS, paint_images

__all__ = ["generated", "generated_images", "generated_memmap"]


def _check(**least: tuple[int, int]) -> None:
    for what, (value, minimum) in least.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be an integer, got {value!r}")
        if value < minimum:
            raise ValueError(f"{what} must be at least {minimum}, got {value}")


def _fill(
    pixels: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    split: str,
    channels: int,
    seed: int,
) -> None:
    """Generate into ``pixels``, in chunks small enough for the processor's cache."""
    size = pixels.shape[-1]
    chunk = max(1, (1 << 15) // (size * size))
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        pixels[part] = paint_images(seed, split, labels[part], indices[part], size, channels)


def generated_images(
    labels: Tensor,
    indices: Tensor,
    split: str = "train",
    size: int = 32,
    channels: int = 3,
    seed: int = 0,
) -> Tensor:
    """Any images of the data set that :func:`generated` makes, with the very same bits.

    Args:
        labels: int64 ``(N,)``, at least 0; there is no largest class.
        indices: int64 ``(N,)``, at least 0: which image of the class.
        split: ``"train"`` or ``"test"``.
        size: height and width in pixels.
        channels: any number, 3 for RGB.
        seed: of the data set.

    Returns:
        uint8 ``(N, channels, size, size)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; it is named.
    """
    _check(size=(size, 4), channels=(channels, 1))
    if split not in SPLITS:
        raise ValueError(f"split must be train or test, got {split!r}")
    for what, values in (("labels", labels), ("indices", indices)):
        if values.dtype != torch.int64 or values.dim() != 1:
            raise TypeError(
                f"{what} must be int64 of shape (N,), got {values.dtype} {values.shape}"
            )
        if len(values) and int(values.min()) < 0:
            raise ValueError(f"{what} must be at least 0, got {int(values.min())}")
    if len(labels) != len(indices):
        raise ValueError(f"labels and indices differ in length: {len(labels)} and {len(indices)}")
    pixels = np.empty((len(labels), channels, size, size), dtype=np.uint8)
    _fill(pixels, labels.numpy(), indices.numpy(), split, channels, seed)
    return torch.from_numpy(pixels)


def _dataset(
    pixels: Tensor, classes: int, train_per_class: int, test_per_class: int, statistics: str
) -> Dataset:
    """The data set from the images of both splits one after the other, each class-major."""
    border = classes * train_per_class
    mean, std = statistics_of(pixels[:border], statistics)
    return Dataset(
        name="generated",
        train_images=pixels[:border],
        train_labels=torch.arange(classes).repeat_interleave(train_per_class),
        test_images=pixels[border:],
        test_labels=torch.arange(classes).repeat_interleave(test_per_class),
        class_names=tuple(str(label) for label in range(classes)),
        mean=mean,
        std=std,
    )


def _fill_splits(
    pixels: np.ndarray, classes: int, numbers: tuple[int, int], channels: int, seed: int
) -> None:
    start = 0
    for split, number in zip(SPLITS, numbers, strict=True):
        for label in range(classes):
            part = pixels[start : start + number]
            _fill(part, np.full(number, label), np.arange(number), split, channels, seed)
            start += number


def generated(
    classes: int = 10,
    size: int = 32,
    train_per_class: int = 500,
    test_per_class: int = 100,
    channels: int = 3,
    seed: int = 0,
    statistics: str = "computed",
) -> Dataset:
    """A generated data set in memory, class-major.

    More classes, or more images of a class, add to the data set without changing a bit of what
    was there. So does nothing else: size, channels and seed make another one.

    Args:
        classes: how many.
        size: height and width in pixels, at least 4; below 16 little of the shapes is left.
        train_per_class, test_per_class: images.
        channels: any number, 3 for RGB.
        seed: of the data set; it has nothing to do with the seed of a run.
        statistics: see :func:`ddfast.data.load`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; it is named.
    """
    _check(
        classes=(classes, 1),
        size=(size, 4),
        train_per_class=(train_per_class, 1),
        test_per_class=(test_per_class, 1),
        channels=(channels, 1),
    )
    number = classes * (train_per_class + test_per_class)
    pixels = np.empty((number, channels, size, size), dtype=np.uint8)
    _fill_splits(pixels, classes, (train_per_class, test_per_class), channels, seed)
    return _dataset(torch.from_numpy(pixels), classes, train_per_class, test_per_class, statistics)


def generated_memmap(
    path: str | os.PathLike[str],
    classes: int = 10,
    size: int = 32,
    train_per_class: int = 500,
    test_per_class: int = 100,
    channels: int = 3,
    seed: int = 0,
    statistics: str = "computed",
) -> Dataset:
    """:func:`generated` for sets larger than memory: the images live in a file.

    Args:
        path: the .npy file to write, uint8 ``(train and test images, channels, size, size)``. An
            existing one is replaced when all is generated, never before.
        classes, size, train_per_class, test_per_class, channels, seed, statistics: as for
            :func:`generated`.

    Returns:
        The data set; its images are memory-mapped and read when used. Writing to them changes
        this process's copy only.

    Raises:
        FileNotFoundError, PermissionError: the folder does not exist or cannot be written.
        TypeError, ValueError: as :func:`generated`.
    """
    _check(
        classes=(classes, 1),
        size=(size, 4),
        train_per_class=(train_per_class, 1),
        test_per_class=(test_per_class, 1),
        channels=(channels, 1),
    )
    shape = (classes * (train_per_class + test_per_class), channels, size, size)
    with whole_file(path) as temporary:
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _fill_splits(pixels, classes, (train_per_class, test_per_class), channels, seed)
        pixels.flush()
        del pixels
    mapped = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    return _dataset(mapped, classes, train_per_class, test_per_class, statistics)
