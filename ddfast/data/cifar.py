"""CIFAR-10 and CIFAR-100 from the binary archives, or with ``unsafe=True`` from the Python ones."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ddfast.data.dataset import Dataset
from ddfast.data.files import find_folder
from ddfast.data.normalisation import statistics_of

__all__ = ["cifar10", "cifar100"]

PathLike = str | os.PathLike[str]
Split = tuple[np.ndarray, np.ndarray]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def _read_binary(path: Path, label_bytes: int) -> Split:
    """Records of ``label_bytes`` labels (the last one counts) and 3x32x32 pixels."""
    raw = np.fromfile(path, dtype=np.uint8)
    record = label_bytes + 3072
    if raw.size == 0 or raw.size % record:
        raise ValueError(
            f"{path} is damaged or cut short: {raw.size} bytes are not a whole number of "
            f"records of {record} bytes"
        )
    records = raw.reshape(-1, record)
    pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return pixels, records[:, label_bytes - 1].astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Even when asked to unpickle, builds nothing but NumPy arrays and plain containers."""

    allowed: ClassVar = {
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"a CIFAR file has no need of {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not in CIFAR's format: expected a dict, got {type(content)}")
    return content


def _read_pickled(path: Path, label_key: str) -> Split:
    content = _unpickle(path)
    for key in ("data", label_key):
        if key not in content:
            raise ValueError(f"{path} is not in CIFAR's format: it has no entry {key!r}")
    pixels = np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
    return pixels, np.asarray(content[label_key], dtype=np.int64)


def _concatenated(paths: list[Path], read: Callable[[Path], Split]) -> Split:
    pixels, labels = zip(*(read(path) for path in paths), strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def _names(lines: list[str], count: int, path: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != count:
        raise ValueError(f"{path} must name {count} classes, got {len(names)}")
    return names


def _dataset(
    name: str, train: Split, test: Split, classes: tuple[str, ...], statistics: str
) -> Dataset:
    train_images = torch.from_numpy(np.ascontiguousarray(train[0]))
    mean, std = statistics_of(train_images, statistics)
    return Dataset(
        name=name,
        train_images=train_images,
        train_labels=torch.from_numpy(train[1]),
        test_images=torch.from_numpy(np.ascontiguousarray(test[0])),
        test_labels=torch.from_numpy(test[1]),
        class_names=classes,
        mean=mean,
        std=std,
    )


def _refuse_pickle(
    error: FileNotFoundError, data_path: PathLike | None, folder: str, file: str, name: str
) -> Exception:
    """The error to raise without the binary files: another one if the pickled files are there."""
    assert data_path is not None
    for place in (Path(data_path) / folder, Path(data_path)):
        if (place / file).exists():
            return ValueError(
                f"{place} holds the Python version of {name}, which is pickled; loading a pickle "
                "from an untrusted source can run any program. Use the binary version of the "
                "archive, or pass unsafe=True if you trust these files"
            )
    return error


def cifar10(
    data_path: PathLike | None = None, statistics: str = "cifar10", unsafe: bool = False
) -> Dataset:
    """CIFAR-10: 50 000 and 10 000 images of 3x32x32, 10 classes.

    Args:
        data_path: the folder with ``cifar-10-batches-bin/`` (``data_batch_1.bin`` to ``_5.bin``,
            ``test_batch.bin``), or that folder itself.
        statistics: see :func:`ddfast.data.load`.
        unsafe: read the pickled ``cifar-10-batches-py/`` instead. Only arrays are unpickled, but
            the format is not made for files one does not trust.

    Raises:
        FileNotFoundError: the message lists what is expected and missing.
        ValueError: pickled files without ``unsafe``, damaged files.
    """
    if unsafe:
        source = "These are the contents of the official archive cifar-10-python.tar.gz."
        folders, files = ["cifar-10-batches-py", ""], [*BATCHES, "test_batch"]
    else:
        source = "These are the contents of the official archive cifar-10-binary.tar.gz."
        folders = ["cifar-10-batches-bin", ""]
        files = [f"{batch}.bin" for batch in [*BATCHES, "test_batch"]]
    try:
        _, paths = find_folder(data_path, folders, files, "CIFAR10", source)
    except FileNotFoundError as error:
        raise _refuse_pickle(
            error, data_path, "cifar-10-batches-py", "data_batch_1", "CIFAR10"
        ) from None

    def read(path: Path) -> Split:
        return _read_pickled(path, "labels") if unsafe else _read_binary(path, 1)

    return _dataset(
        "CIFAR10", _concatenated(paths[:-1], read), read(paths[-1]), CIFAR10_CLASSES, statistics
    )


def cifar100(
    data_path: PathLike | None = None, statistics: str = "cifar100", unsafe: bool = False
) -> Dataset:
    """CIFAR-100 with its 100 fine classes: 50 000 and 10 000 images of 3x32x32.

    Args:
        data_path: the folder with ``cifar-100-binary/`` (``train.bin``, ``test.bin``,
            ``fine_label_names.txt``), or that folder itself.
        statistics: ``"cifar100"`` (default) are the constants of the DC family; ``"cifar10"`` is
            the convention of MTT, TESLA, DATM and IDC. See :func:`ddfast.data.load`.
        unsafe: read the pickled ``cifar-100-python/`` instead; see :func:`cifar10`.

    Raises:
        FileNotFoundError: the message lists what is expected and missing.
        ValueError: pickled files without ``unsafe``, damaged files.
    """
    if unsafe:
        source = "These are the contents of the official archive cifar-100-python.tar.gz."
        folders, files = ["cifar-100-python", ""], ["train", "test", "meta"]
    else:
        source = "These are the contents of the official archive cifar-100-binary.tar.gz."
        folders = ["cifar-100-binary", ""]
        files = ["train.bin", "test.bin", "fine_label_names.txt"]
    try:
        _, (train, test, names) = find_folder(data_path, folders, files, "CIFAR100", source)
    except FileNotFoundError as error:
        raise _refuse_pickle(error, data_path, "cifar-100-python", "meta", "CIFAR100") from None
    if unsafe:
        lines = [str(line) for line in _unpickle(names).get("fine_label_names", [])]
        splits = _read_pickled(train, "fine_labels"), _read_pickled(test, "fine_labels")
    else:
        lines = names.read_text().splitlines()
        splits = _read_binary(train, 2), _read_binary(test, 2)
    return _dataset("CIFAR100", *splits, _names(lines, 100, names), statistics)
