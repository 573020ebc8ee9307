"""The protocol `krr`: no network is trained, a kernel regression on the set classifies.

The class of a test image is the largest entry of K_ts (K_ss + reg tr(K_ss)/n I)^-1 Y_s, where K is
the kernel of an infinitely wide network (`ddfast.kernel_matrix`) and Y_s the soft labels of the
set, or one-hot - 1/C (Nguyen et al., KIP, ICLR and NeurIPS 2021; Loo et al., RFAD, NeurIPS 2022).
All in float64, test images in blocks. The same set gives the same accuracy each time: there is one
for each random selection and for every other row a single one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddfast.artefact import Artefact
from ddfast.data import Dataset
from ddfast.distill.log import peak_memory
from ddfast.engine.kernel_regression import Kernel, predictions, rows_at_once
from ddfast.evaluate.protocols import Protocol
from ddfast.evaluate.report import Row
from ddfast.evaluate.train import NotFinite, TrainingSet
from ddfast.kernel_matrix import kernel_matrix, kernel_options
from ddfast.memory import DEFAULT
from ddfast.methods.regression import centred
from ddfast.random import generator

__all__ = ["KRR", "REG", "SUBSET", "Kernels", "kernel_rows", "kernels_of"]

KRR = "krr"
REG = 1e-6
"""Of the ridge, where neither the caller nor the artefact's config says one."""

SUBSET = 5000
"""Of more training images than this, a random subset of so many stands for the full data."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of an evaluation, by name, and the protocol that says the ridge."""

    by_name: Mapping[str, Kernel]
    protocol: Protocol


def kernels_of(
    names: Sequence[str],
    distilled: Artefact | TrainingSet,
    dataset: Dataset,
    reg: float | None,
    refused: Mapping[str, Any],
) -> Kernels:
    """The kernels that are named, with the variances and the ridge of the artefact's config.

    Args:
        names: see `ddfast.kernel_matrix.kernel_options`.
        reg: None for that of the config, or `REG`.
        refused: settings of a training, by name, which must all be None.

    Raises:
        TypeError, ValueError: a name that is no kernel or a kernel for larger images; a setting
            without meaning; a negative reg.
    """
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name} has no meaning for protocol {KRR!r}, which trains no network")
    if not names:
        raise ValueError("models is empty: there is no kernel to evaluate with")
    settings = distilled.config if isinstance(distilled, Artefact) else {}
    variances = {k: settings[k] for k in ("weight_var", "bias_var") if k in settings}
    made: dict[str, Kernel] = {
        name: partial(kernel_matrix, **kernel_options(name), **variances) for name in names
    }
    image = torch.zeros(1, dataset.channels, *dataset.size)
    for kernel in made.values():
        kernel(image)  # raises if the images are too small for it
    ridge = settings.get("reg", REG) if reg is None else reg
    return Kernels(made, Protocol(KRR, 1, schedule="constant", reg=float(ridge)))


def kernel_rows(
    kernels: Kernels,
    stored: int,
    hard: TrainingSet,
    soft: TrainingSet | None,
    others: Sequence[TrainingSet],
    dataset: Dataset,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> list[Row]:
    """Every kernel's rows: the distilled set, random selections and the full data.

    Args:
        stored: images of the distilled set before it was decoded, and of each selection.
        hard, soft: the distilled set, with either kind of labels.
        others: random selections; if there are none, there is no row for the full data either.
        advance: called with the number of test images that have been classified.
    """
    full = "full data"
    groups: dict[str, list[TrainingSet]] = {"distilled": [hard]}
    if soft is not None:
        groups = {"distilled, soft labels": [soft], **groups}
    if others:
        count = len(dataset.train_labels)
        chosen = torch.arange(count)
        if count > SUBSET:
            full = "full data, random subset"
            random = generator(seed, "evaluate: subset of the full data")
            chosen = torch.randperm(count, generator=random)[:SUBSET]
        groups["random selection"] = list(others)
        groups[full] = [(dataset.train_images[chosen], dataset.train_labels[chosen])]
    rows = []
    for model, kernel in kernels.by_name.items():
        for name, sets in groups.items():
            began = time.monotonic()
            found = tuple(
                (100 * accuracy(kernel, each, dataset, kernels.protocol.reg or 0, device, advance),)
                for each in sets
            )
            images = len(sets[0][1])
            of_set = images if name == full else stored
            rows.append(
                Row(
                    name=name,
                    model=model,
                    protocol=kernels.protocol,
                    images=images,
                    ipc=of_set / dataset.num_classes,
                    ratio=of_set / len(dataset.train_labels),
                    accuracies=found,
                    seconds=time.monotonic() - began,
                    peak_memory=peak_memory(device),
                )
            )
    return rows


def accuracy(
    kernel: Kernel,
    support: TrainingSet,
    dataset: Dataset,
    reg: float,
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
) -> float:
    """The share of the data set's test images that the regression gets right, from 0 to 1.

    Args:
        support: images, uint8 or float as the data set's `normalised` gives them, and labels, int64
            or soft ones.

    Raises:
        NotFinite: a prediction is not finite, from which no class can be read.
    """
    images, labels = (tensor.detach().to(device) for tensor in support)
    # Rounded to float32 first, so that pixels are the numbers that the method had.
    x = dataset.normalised(images) if images.dtype == torch.uint8 else images
    x = x.double()
    if not labels.is_floating_point():
        labels = centred(labels, dataset.num_classes, torch.float64)
    most = rows_at_once(x, dataset.num_classes, DEFAULT)

    def blocks() -> Iterator[Tensor]:
        for pixels in dataset.test_images.split(most):
            yield dataset.normalised(pixels.to(device)).double()

    right = 0
    found = predictions(kernel, x, labels, blocks(), reg)
    for predicted, wanted in zip(found, dataset.test_labels.split(most), strict=True):
        if not torch.isfinite(predicted).all():
            raise NotFinite("the predictions for the test images are not finite")
        right += int((predicted.argmax(1).cpu() == wanted.cpu()).sum())
        advance(len(wanted))
    return right / len(dataset.test_labels)
