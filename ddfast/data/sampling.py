"""Drawing real images class by class."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddfast.data.dataset import Dataset, check_labels
from ddfast.random import generator as make_generator

__all__ = ["ClassSampler", "hold_out", "random_selection"]


class ClassSampler:
    """The images of each class, and random draws from them.

    Args:
        labels: int64 ``(N,)`` in ``[0, num_classes)``, on any device; indices are on the CPU.
        num_classes: the number of classes.

    Raises:
        TypeError: labels that are not an int64 tensor.
        ValueError: labels out of range, or a class without an image; the message names it.
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        check_labels(labels, num_classes, "labels")
        labels = labels.cpu()
        counts = torch.bincount(labels, minlength=num_classes)
        empty = (counts == 0).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"labels has no image of class {', '.join(map(str, empty[:10]))}")
        self.num_classes = num_classes
        self.counts: tuple[int, ...] = tuple(counts.tolist())
        """The number of images of each class."""
        # Stable: within a class the images keep the order of the data set.
        order = torch.argsort(labels, stable=True)
        self._members = order.split(list(self.counts))

    def indices(self, class_index: int) -> Tensor:
        """The positions of a class's images, ascending.

        Args:
            class_index: the class.

        Returns:
            int64 ``(counts[class_index],)`` on the CPU.

        Raises:
            ValueError: a class out of range.
        """
        self._check_class(class_index)
        return self._members[class_index]

    def _check_class(self, class_index: int) -> None:
        if not 0 <= class_index < self.num_classes:
            raise ValueError(
                f"class must lie in 0..{self.num_classes - 1} for {self.num_classes} classes, "
                f"got {class_index}"
            )

    def sample(self, class_index: int, n: int, generator: torch.Generator) -> Tensor:
        """Positions of ``n`` different images of a class, in random order.

        As the official DC code does: the head of a fresh random permutation, and the whole class
        when it has fewer than ``n`` images. (A permutation of 5000 costs some 25 microseconds,
        next to nothing beside one forward pass.)

        Args:
            class_index: the class.
            n: how many, at least 1.
            generator: a CPU generator.

        Returns:
            int64 ``(min(n, counts[class_index]),)`` on the CPU.

        Raises:
            ValueError: ``n`` below 1 or a class out of range.
        """
        self._check_class(class_index)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        members = self._members[class_index]
        return members[torch.randperm(len(members), generator=generator)[:n]]

    def sample_all(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """``n`` images of every class, class 0 first; ``generator`` as in :meth:`sample`.

        Returns:
            The positions, int64 ``(sum(counts),)``, and how many belong to each class:
            ``min(n, size of the class)``.
        """
        parts = [self.sample(c, n, generator) for c in range(self.num_classes)]
        return torch.cat(parts), [len(part) for part in parts]


def random_selection(
    dataset: Dataset, ipc: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``ipc`` random training images of each class: the baseline of every distillation.

    Args:
        dataset: where from.
        ipc: images per class.
        generator: a CPU generator.

    Returns:
        Images uint8 ``(num_classes * ipc, channels, H, W)`` and labels int64, class 0 first.

    Raises:
        ValueError: ``ipc`` below 1, or a class with fewer images; the message names it.
    """
    if ipc < 1:
        raise ValueError(f"ipc must be at least 1, got {ipc}")
    sampler = ClassSampler(dataset.train_labels, dataset.num_classes)
    for class_index, count in enumerate(sampler.counts):
        if count < ipc:
            raise ValueError(
                f"class {class_index} ({dataset.class_names[class_index]}) of {dataset.name} has "
                f"{count} training images, fewer than ipc {ipc}"
            )
    indices, _ = sampler.sample_all(ipc, generator)
    return dataset.train_images[indices], dataset.train_labels[indices]


def hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The same data set with part of its training images in place of the test images.

    For choosing settings without looking at the test set. Each class gives the same fraction
    (rounded, at least one image to either side); which images depends on ``seed`` alone.

    Args:
        dataset: its test split is not touched, nor kept.
        fraction: the part to hold out, between 0 and 1.
        seed: of the split.

    Returns:
        A data set whose ``test_split`` is ``"validation"``; the name (by which methods find their
        settings), mean and std stay.

    Raises:
        ValueError: a fraction outside (0, 1), or a class with a single image; it is named.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    sampler = ClassSampler(dataset.train_labels, dataset.num_classes)
    random = make_generator(seed, "hold out")
    held = torch.zeros(len(dataset.train_labels), dtype=torch.bool)
    for class_index, count in enumerate(sampler.counts):
        if count < 2:
            raise ValueError(
                f"class {class_index} ({dataset.class_names[class_index]}) of {dataset.name} has "
                "one training image, which cannot be split"
            )
        number = min(max(round(fraction * count), 1), count - 1)
        held[sampler.sample(class_index, number, random)] = True
    return replace(
        dataset,
        train_images=dataset.train_images[~held],
        train_labels=dataset.train_labels[~held],
        test_images=dataset.train_images[held],
        test_labels=dataset.train_labels[held],
        test_split="validation",
    )
