"""What a run learns, by the way its images are stored, and the recipe that decodes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.normalisation import normalise
from ddfast.data.sampling import ClassSampler
from ddfast.synthetic import bases, hallucinators, multi_formation
from ddfast.synthetic.pixels import pixels

__all__ = ["recipe", "starting_set"]


def recipe(
    parametrisation: str, factor: int, size: tuple[int, int], space: str
) -> Mapping[str, Any] | None:
    """How `ddfast.synthetic.decode` makes images of it; None if they are stored as they are.

    Args:
        parametrisation: "pixels", "multi_formation", "hallucinators" or "bases".
        factor: of multi_formation, which with 1 is "pixels".
        size: (H, W) of the images.
        space: "normalised" or "pixel", see `ddfast.artefact.Artefact`.
    """
    if parametrisation == "multi_formation" and factor > 1:
        fill = multi_formation.FILL if space == "pixel" else 0.0
        return {"name": "multi_formation", "factor": factor, "kind": "single", "fill": fill}
    if parametrisation == "hallucinators":
        return {"name": "hallucinators"}
    if parametrisation == "bases":
        return {"name": "bases", "height": size[0], "width": size[1]}
    return None


def starting_set(
    dataset: Dataset,
    ipc: int,
    parametrisation: str,
    init: str,
    generator: torch.Generator,
    *,
    factor: int = 2,
    shared: int = 5,
    base_scale: int = 2,
    space: str = "normalised",
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that a run starts from, float32, and the labels of their rows.

    Args:
        ipc: stored images of each class. With "bases", the storage of so many: the bases and
            coefficients take no more numbers than they would.
        init: "real" or "noise"; "mix" with "multi_formation": real images shrunk into the cells.
            Bases that start from "real" are fitted to real images.
        generator: a CPU generator.
        factor: of "multi_formation".
        shared: how many hallucinators or bases.
        base_scale: by how much bases are smaller.
        space: "normalised" or "pixel".

    Raises:
        ValueError: settings that do not fit together or the data set.
    """
    if init == "mix" and parametrisation != "multi_formation":
        raise ValueError(
            f"init: mix needs the parametrisation multi_formation, not {parametrisation}"
        )
    if parametrisation == "bases":
        return _shared_bases(dataset, ipc, init, generator, shared, base_scale, space)
    if init == "mix":
        images, labels = multi_formation.initialise(
            dataset, ipc, "mix", factor, generator, "random"
        )
        images = _in_space(images, dataset, "pixel", space)
    else:
        images, labels = pixels(dataset, ipc, init, generator)
        images = _in_space(images, dataset, "normalised", space)
    tensors = {"images": images}
    if parametrisation == "hallucinators":
        tensors |= hallucinators.start(shared, dataset.channels, dataset.size, generator)
    return tensors, labels


def _shared_bases(
    dataset: Dataset,
    ipc: int,
    init: str,
    generator: torch.Generator,
    number: int,
    scale: int,
    space: str,
) -> tuple[dict[str, Tensor], Tensor]:
    classes, channels, size = dataset.num_classes, dataset.channels, dataset.size
    rows = bases.per_class(ipc, classes, channels, size, number, scale)
    labels = torch.arange(classes).repeat_interleave(rows)
    if init == "noise":
        b, coefficients = bases.noise(number, len(labels), channels, size, scale, generator)
    else:
        sampler = ClassSampler(dataset.train_labels, classes)
        # A class with fewer images than rows has some of them more than once.
        chosen = [sampler.sample(c, rows, generator) for c in range(classes)]
        places = torch.cat([each.repeat(-(-rows // len(each)))[:rows] for each in chosen])
        images = normalise(dataset.train_images[places], dataset.mean, dataset.std)
        b, coefficients = bases.fitted(
            _in_space(images, dataset, "normalised", space), number, scale
        )
    return {"images": b, "coefficients": coefficients}, labels


def _in_space(images: Tensor, dataset: Dataset, here: str, there: str) -> Tensor:
    """Float images of one space in another."""
    if here == there:
        return images
    mean, std = (
        torch.tensor(v, dtype=images.dtype).view(-1, 1, 1) for v in (dataset.mean, dataset.std)
    )
    return (images - mean) / std if there == "normalised" else images * std + mean
