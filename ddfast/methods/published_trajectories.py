"""Published settings of trajectory matching, and the nearest ones where a paper has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ddfast.data import Dataset

FAMILIES = ("CIFAR10", "CIFAR100", "TinyImageNet", "ImageNet1K", "ImageNet128")
"""Data sets with published settings, the last a subset of ten classes in 128 pixels."""


class Published(NamedTuple):
    """A row of a paper's table; batch_syn 0 stands for all."""

    syn_steps: int
    expert_epochs: int
    max_start_epoch: int
    batch_syn: int
    lr_img: float
    lr_lr: float
    lr_teacher: float


Table = Mapping[str, Mapping[int, Published]]


def family(dataset: Dataset) -> str:
    """The one of `FAMILIES` that a data set is most like: by its name, else its size and classes.

    Beyond 96 pixels ImageNet128, beyond 32 ImageNet1K from 500 classes on and else TinyImageNet; up
    to there CIFAR100 from 50 classes on, else CIFAR10.
    """
    if dataset.name in FAMILIES:
        return dataset.name
    side, many = max(dataset.size), dataset.num_classes
    if side > 32:
        return "ImageNet128" if side > 96 else "ImageNet1K" if many >= 500 else "TinyImageNet"
    return "CIFAR100" if many >= 50 else "CIFAR10"


def nearest(table: Mapping[str, Mapping[int, Any]], dataset: Dataset, ipc: int) -> Any:
    """The published row for the nearest family in the table and, there, for the nearest ipc.

    Nearest in the order of `FAMILIES`, and by the ratio of the ipc; the smaller of two as near.
    """
    place = FAMILIES.index(family(dataset))
    name = min(table, key=lambda each: (abs(FAMILIES.index(each) - place), FAMILIES.index(each)))
    return table[name][min(table[name], key=lambda n: (max(n, ipc) / min(n, ipc), n))]
