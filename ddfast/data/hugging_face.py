"""Image-classification data sets through the Hugging Face ``datasets`` package (an extra)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.decode import MODES, to_pixels
from ddfast.data.files import require
from ddfast.data.normalisation import statistics_of

__all__ = ["hugging_face"]

TEST_SPLITS = ("test", "validation", "val", "valid")


def _load(data_path: str | os.PathLike[str], download: bool) -> Any:
    datasets = require("datasets", "loading this data set", "pip install ddfast[hf]")
    folder = Path(data_path)
    if folder.is_dir():
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))
    if not download:
        raise FileNotFoundError(
            f"hf: there is no folder {folder}. Expected a folder with train and test files in "
            "parquet, in ImageFolder layout, or written by save_to_disk; if this is a name on the "
            "Hugging Face hub, pass download=True to let the datasets package fetch it"
        )
    return datasets.load_dataset(str(data_path))


def _column(features: Any, kinds: tuple[str, ...], chosen: str | None, what: str) -> str:
    """The column the user named, or the only one of a kind."""
    if chosen is not None:
        if chosen not in features:
            raise ValueError(f"{what} {chosen!r} is not among the columns {', '.join(features)}")
        return chosen
    # By the name of the type, so that nothing of the package needs to be imported here.
    fitting = [name for name, kind in features.items() if type(kind).__name__ in kinds]
    if len(fitting) != 1:
        raise ValueError(
            f"{what} must be named: {len(fitting) or 'none'} of the columns "
            f"{', '.join(features)} fit{': ' + ', '.join(fitting) if fitting else ''}"
        )
    return fitting[0]


def _images(split: Any, column: str, size: int | None, channels: int, where: str) -> Tensor:
    pixels: np.ndarray | None = None
    for index in range(len(split)):
        try:
            image = to_pixels(split[index][column], size, channels)
        except (OSError, ValueError) as error:
            raise ValueError(f"image {index} of {where} cannot be read: {error}") from error
        if pixels is None:
            pixels = np.empty((len(split), *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            raise ValueError(
                f"image {index} of {where} has {image.shape[1]}x{image.shape[2]} pixels, the first "
                f"{pixels.shape[2]}x{pixels.shape[3]}: pass size to bring all to one"
            )
        pixels[index] = image
    if pixels is None:
        raise ValueError(f"{where} has no images")
    return torch.from_numpy(pixels)


def hugging_face(
    data_path: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int = 3,
    statistics: str = "computed",
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    download: bool = False,
    dataset_name: str = "hf",
) -> Dataset:
    """A data set the ``datasets`` package can read: a local folder, or with consent a hub name.

    Args:
        data_path: a folder with parquet files, in ImageFolder layout, or written by
            ``save_to_disk``; with ``download``, also a name on the hub.
        size, channels: as for :func:`ddfast.data.image_folder`.
        statistics: see :func:`ddfast.data.load`.
        image_column, label_column: needed if not exactly one column has the type Image, or
            ClassLabel. Labels may be classes, integers or strings; those without class names are
            numbered in sorted order.
        train_split: name of the training split.
        test_split: name of the test split; None takes the first there is of test, validation,
            val, valid.
        download: let the package look on the hub for a ``data_path`` that is no folder.
        dataset_name: its name in reports, by which methods also find published settings.

    Raises:
        ImportError: ``datasets`` or Pillow is not installed.
        FileNotFoundError: no such folder, and no ``download``.
        ValueError: splits or columns that are not there, images of different sizes without
            ``size``, unreadable images.
    """
    if data_path is None:
        raise ValueError("hf: data_path must be a folder, or with download=True a name on the hub")
    if channels not in MODES:
        raise ValueError(f"channels of image files must be 1 or 3, got {channels}")
    splits = _load(data_path, download)
    if test_split is None:
        test_split = next((each for each in TEST_SPLITS if each in splits), "test")
    for split in (train_split, test_split):
        if split not in splits:
            raise ValueError(f"{data_path} has no split {split!r}, only {', '.join(splits)}")
    features = splits[train_split].features
    image_column = _column(features, ("Image",), image_column, "image_column")
    label_column = _column(features, ("ClassLabel",), label_column, "label_column")
    train_values = list(splits[train_split][label_column])
    test_values = list(splits[test_split][label_column])
    class_names = getattr(features[label_column], "names", None)
    if class_names is None:
        known = sorted(set(train_values))
        unknown = sorted(set(test_values) - set(known))
        if unknown:
            raise ValueError(
                f"split {test_split!r} has labels not in {train_split!r}: {unknown[:10]}"
            )
        number = {value: index for index, value in enumerate(known)}
        train_values = [number[value] for value in train_values]
        test_values = [number[value] for value in test_values]
        class_names = [str(value) for value in known]
    images = [
        _images(splits[split], image_column, size, channels, f"split {split!r}")
        for split in (train_split, test_split)
    ]
    mean, std = statistics_of(images[0], statistics)
    return Dataset(
        name=dataset_name,
        train_images=images[0],
        train_labels=torch.tensor(train_values, dtype=torch.int64),
        test_images=images[1],
        test_labels=torch.tensor(test_values, dtype=torch.int64),
        class_names=tuple(class_names),
        mean=mean,
        std=std,
    )
