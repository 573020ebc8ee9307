"""Images in one folder a class, and Tiny-ImageNet's variation of that layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.decode import decode_all
from ddfast.data.files import find_folder
from ddfast.data.normalisation import statistics_of

__all__ = ["image_folder", "tiny_imagenet"]

PathLike = str | os.PathLike[str]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _labels(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def image_folder(
    data_path: PathLike | None = None,
    size: int | None = None,
    channels: int = 3,
    statistics: str | None = None,
    cache: PathLike | None = None,
    dataset_name: str = "ImageFolder",
) -> Dataset:
    """Your own images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val/``).

    Classes are the sorted names of the folders in ``train/``. Decoded once, kept as uint8.

    Args:
        data_path: the folder with ``train/`` and ``test/`` or ``val/``.
        size: pixels of each side; the shorter side is resized, the centre cut out. None leaves
            the images as they are, which must then all be alike.
        channels: 3 or 1; grey, palette and transparent images are converted.
        statistics: None is ``"imagenet"`` for three channels (as the field's ImageNet subsets)
            and ``"computed"`` for one; see :func:`ddfast.data.load`.
        cache: a folder in which the decoded images are packed, and read from next time.
        dataset_name: its name in reports.

    Raises:
        FileNotFoundError: the message says which folders are expected.
        ImportError: Pillow is not installed.
        ValueError: an empty class, test classes that are not in ``train/``, unreadable images,
            images of different sizes without ``size``; the message names class or file.
    """
    source = "Each holds one folder a class, with the images of that class in it."
    _, (train, test) = find_folder(
        data_path, [""], ["train", ("test", "val")], dataset_name, source
    )
    classes = [folder.name for folder in _folders(train)]
    if not classes:
        raise FileNotFoundError(
            f"{dataset_name}: {train} has no folders; expected one for each class"
        )
    unknown = [folder.name for folder in _folders(test) if folder.name not in classes]
    if unknown:
        raise ValueError(f"{test} has classes that {train} has not: {', '.join(unknown[:10])}")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for split in (train, test):
        members = [_images(split / each) for each in classes]
        empty = [each for each, files in zip(classes, members, strict=True) if not files]
        if split is train and empty:
            raise ValueError(
                f"{train} has no images in the folder of class {', '.join(empty[:10])}"
            )
        files = [path for paths in members for path in paths]
        images.append(decode_all(files, split, size, channels, cache))
        labels.append(_labels([len(paths) for paths in members]))
    if statistics is None:
        statistics = "imagenet" if channels == 3 else "computed"
    mean, std = statistics_of(images[0], statistics)
    return Dataset(
        name=dataset_name,
        train_images=images[0],
        train_labels=labels[0],
        test_images=images[1],
        test_labels=labels[1],
        class_names=tuple(classes),
        mean=mean,
        std=std,
    )


def _annotations(path: Path, classes: list[str]) -> list[tuple[str, int]]:
    """File name and class of each validation image: the first two columns, between tabs."""
    number = {wnid: index for index, wnid in enumerate(classes)}
    entries = []
    for line, text in enumerate(path.read_text().splitlines(), start=1):
        if not text.strip():
            continue
        fields = text.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise ValueError(f"{path}, line {line}: expected file name, tab, wnid; got {text!r}")
        entries.append((fields[0], number[fields[1]]))
    return entries


def tiny_imagenet(
    data_path: PathLike | None = None,
    statistics: str = "imagenet",
    cache: PathLike | None = None,
) -> Dataset:
    """Tiny-ImageNet: 200 classes, 100 000 training and 10 000 validation images of 3x64x64.

    Classes are the sorted wnids (published label orders differ: ``class_names`` says which is
    which); the validation images serve as the test split, as everywhere in the field.

    Args:
        data_path: the folder with ``tiny-imagenet-200/`` (``wnids.txt``,
            ``train/<wnid>/images/*.JPEG``, ``val/images/``, ``val/val_annotations.txt``), or that
            folder itself.
        statistics: see :func:`ddfast.data.load`.
        cache: a folder in which the decoded images are packed, and read from next time.

    Raises:
        FileNotFoundError: the message lists what is expected and missing.
        ImportError: Pillow is not installed.
        ValueError: unreadable images or annotations, a class without images.
    """
    source = "These are the contents of the official archive tiny-imagenet-200.zip."
    needed = ["wnids.txt", "train", "val/images", "val/val_annotations.txt"]
    folders = ["tiny-imagenet-200", ""]
    root, (wnids, train, val, table) = find_folder(
        data_path, folders, needed, "TinyImageNet", source
    )
    classes = sorted(wnids.read_text().split())
    members = [_images(train / wnid / "images") for wnid in classes]
    empty = [wnid for wnid, paths in zip(classes, members, strict=True) if not paths]
    if empty:
        raise ValueError(f"{train}/<wnid>/images has no images for {', '.join(empty[:10])}")
    entries = _annotations(table, classes)
    absent = [file for file, _ in entries if not (val / file).exists()]
    if absent:
        raise FileNotFoundError(f"{val} lacks images named in {table}: {', '.join(absent[:10])}")
    train_images = decode_all([path for paths in members for path in paths], train, None, 3, cache)
    test_images = decode_all([val / file for file, _ in entries], root / "val", None, 3, cache)
    mean, std = statistics_of(train_images, statistics)
    return Dataset(
        name="TinyImageNet",
        train_images=train_images,
        train_labels=_labels([len(paths) for paths in members]),
        test_images=test_images,
        test_labels=torch.tensor([label for _, label in entries], dtype=torch.int64),
        class_names=tuple(classes),
        mean=mean,
        std=std,
    )
