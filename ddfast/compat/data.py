"""`get_dataset` of the official DC, DSA and DM scripts, on ddfast's readers."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import data as torch_data

from ddfast import data

__all__ = ["Loaded", "get_dataset"]


class _Normalised(torch_data.Dataset[tuple[Tensor, int]]):
    """uint8 images, normalised when asked for."""

    def __init__(self, dataset: data.Dataset, images: Tensor, labels: Tensor) -> None:
        self.dataset, self.images, self.labels = dataset, images, labels
        self.classes = list(dataset.class_names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset.normalised(self.images[index][None])[0], int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


class Loaded(NamedTuple):
    """What `get_dataset` returns, in the official order."""

    channel: int
    im_size: tuple[int, int]
    num_classes: int
    class_names: list[str]
    mean: list[float]
    std: list[float]
    dst_train: torch_data.Dataset[tuple[Tensor, int]]
    dst_test: torch_data.Dataset[tuple[Tensor, int]]
    testloader: Any


def get_dataset(dataset: str, data_path: str | os.PathLike[str], **options: Any) -> Loaded:
    """A data set as the official scripts take it: nine values, by their order.

    The images stay uint8 in memory; items are normalised float32 (channels, H, W), and a label.
    Nothing is downloaded.

    Args:
        dataset: any name that `ddfast.data.load` knows, among them the official ones.
        data_path: where its files are.
        options: of its reader, see `ddfast.data.load`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `ddfast.data.load` (the official script
            exits for an unknown name).
    """
    found = data.load(dataset, data_path, **options)
    test = _Normalised(found, found.test_images, found.test_labels)
    return Loaded(
        found.channels,
        found.size,
        found.num_classes,
        list(found.class_names),
        list(found.mean),
        list(found.std),
        _Normalised(found, found.train_images, found.train_labels),
        test,
        torch_data.DataLoader(test, batch_size=256, shuffle=False),
    )
