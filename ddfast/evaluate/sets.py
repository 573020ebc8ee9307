"""The sets that are compared: what was distilled, and as many real images chosen at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.artefact import Artefact
from ddfast.data import ClassSampler, Dataset
from ddfast.evaluate.train import TrainingSet, check_sets
from ddfast.random import generator

__all__ = ["own_sets", "random_sets", "seen_alike"]


def own_sets(
    distilled: Artefact | TrainingSet, dataset: Dataset
) -> tuple[Tensor, TrainingSet, TrainingSet | None]:
    """Labels of what is stored, the set with hard labels, and with soft ones if it has any."""
    if not isinstance(distilled, Artefact):
        try:
            images, labels = distilled
        except (TypeError, ValueError):
            raise TypeError(
                "distilled must be an Artefact or a pair of images and labels, "
                f"got {type(distilled).__name__}"
            ) from None
        check_sets([(images, labels)], dataset)
        if labels.is_floating_point():
            raise TypeError("labels must be int64 classes; soft labels go with an Artefact")
        return labels, (images, labels), None
    if distilled.class_names != dataset.class_names:
        raise ValueError(
            f"the artefact's classes are {_some(distilled.class_names)}, those of {dataset.name} "
            f"are {_some(dataset.class_names)}: the labels would mean something else"
        )
    if (distilled.channels, distilled.size) != (dataset.channels, dataset.size):
        raise ValueError(
            f"the artefact's images are {_shape(distilled)}, those of {dataset.name} are "
            f"{_shape(dataset)}"
        )
    decoded = distilled.decoded()
    images, soft = decoded.images, decoded.soft_labels
    if distilled.whitening is None:
        images = decoded.normalised(dataset.mean, dataset.std)
    hard = (images, decoded.labels)
    return _as_images(distilled, dataset), hard, None if soft is None else (images, soft)


def seen_alike(distilled: Artefact | TrainingSet, dataset: Dataset) -> Dataset:
    """The data set, whose images are normalised and whitened as those of a whitened artefact."""
    if not isinstance(distilled, Artefact) or distilled.whitening is None:
        return dataset
    if (distilled.channels, distilled.size) != (dataset.channels, dataset.size):
        return dataset  # refused in a moment
    mean, std = tuple(distilled.mean), tuple(distilled.std)
    return dataclasses.replace(dataset, mean=mean, std=std, whitening=distilled.whitening)


def _as_images(distilled: Artefact, dataset: Dataset) -> Tensor:
    """Labels of as many images as the artefact has numbers.

    Those of the stored images; but where these are decoded with further tensors, of so many of each
    class, rounded up, as would take the same storage.
    """
    if not distilled.decoder_tensors:
        return distilled.labels
    image = dataset.channels * dataset.size[0] * dataset.size[1]
    per_class = -(-distilled.stored_numbers // (image * dataset.num_classes))
    return torch.arange(dataset.num_classes).repeat_interleave(per_class)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shape(images: Artefact | Dataset) -> str:
    return f"{images.channels}x{images.size[0]}x{images.size[1]}"


def random_sets(labels: Tensor, dataset: Dataset, selections: int, seed: int) -> list[TrainingSet]:
    """Random selections of training images, with as many of each class as `labels` has.

    Args:
        labels: int64 `(N,)`, in any order.
        dataset: its training images are drawn from, without replacement.
        selections: how many to draw.
        seed: number i is drawn from a generator of (seed, "evaluate: selection", i).

    Returns:
        For each selection images, uint8 `(N, channels, H, W)`, and labels, int64 `(N,)`, class 0
        first.

    Raises:
        ValueError: a class with fewer training images; the message names it.
    """
    wanted = torch.bincount(labels.cpu(), minlength=dataset.num_classes).tolist()
    sampler = ClassSampler(dataset.train_labels, dataset.num_classes)
    for place, (count, there) in enumerate(zip(wanted, sampler.counts, strict=True)):
        if count > there:
            raise ValueError(
                f"class {place} ({dataset.class_names[place]}) of {dataset.name} has {there} "
                f"training images, too few for a random selection of {count}; baselines=False "
                "does without"
            )
    found = []
    for number in range(selections):
        random = generator(seed, "evaluate: selection", number)
        indices = torch.cat(
            [sampler.sample(c, count, random) for c, count in enumerate(wanted) if count]
        )
        found.append((dataset.train_images[indices], dataset.train_labels[indices]))
    return found
