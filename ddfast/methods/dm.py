"""DM: matching the mean features of real and synthetic images in fresh random networks.

Zhao and Bilen, Dataset Condensation with Distribution Matching, WACV 2023 (arXiv 2110.04181). Per
iteration one network theta, never trained, and for every class one Siamese augmentation omega_c:

    L = sum_c | mean psi_theta(A(x; omega_c)) - mean psi_theta(A(s; omega_c)) |^2

over a batch of real images x and all synthetic images s of the class; psi are the features before
the classifier. One SGD step on all images together.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.losses import class_mean_distance
from ddfast.memory import FIRST_ORDER, FORWARD
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import dsa_strategy, setting
from ddfast.methods.run import Run
from ddfast.nets import Network, has_batchnorm

TITLE = "Dataset Condensation with Distribution Matching (Zhao and Bilen, WACV 2023)"
MATCHES = "mean features of each class, in random networks"
PROTOCOL = "dm"


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of DM, by default those of the paper and its code."""

    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """20001 iterations, real images to start from, lr_img 1 up to ipc 50 and 10 above.

        The published lr_img are those of CIFAR-10; CIFAR-100 has 1 for all its ipc. Other data sets
        follow CIFAR-10. For digits 500 iterations: on a split of their training images more gained
        less than a standard deviation.
        """
        large = self.ipc > 50 and dataset.name != "CIFAR100"
        return {
            **super().published(dataset),
            "iterations": 500 if dataset.name == "digits" else 20001,
            "init": "real",
            "lr_img": 10.0 if large else 1.0,
            "dsa_strategy": dsa_strategy(dataset),
        }


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: beyond the memory; batch normalisation with classes of unequal batches.
    """
    if not has_batchnorm(run.net):
        _classes_at_once(run)
        return
    counts = [min(count, run.config.batch_real) for count in run.sampler.counts]
    if min(counts) < max(counts):
        c = counts.index(min(counts))
        raise ValueError(
            f"batch_real: class {c} ({run.dataset.class_names[c]}) has {counts[c]} of "
            f"{max(counts)} images; with batch normalisation all classes need the same number"
        )
    for images, cost in ((sum(counts), FORWARD), (len(run.images), FIRST_ORDER)):
        fit = run.at_once(cost)
        if images > fit:
            raise ValueError(
                f"memory: batch normalisation needs all {images} images in one pass, and the "
                f"budget of {run.memory} bytes holds {fit}"
            )


def step(run: Run) -> Tensor:
    """One update of the images. Returns the distance of each class, (num_classes,)."""
    ipc, classes = run.config.ipc, run.sampler.num_classes
    net = run.fresh_net().requires_grad_(False)
    indices, counts = run.sampler.sample_all(run.config.batch_real, run.generator("real images"))
    # Siamese: the same draw for the real and the synthetic images of a class.
    draw = run.augment.draw(
        run.generator("augmentation"), run.dataset.size, count=classes, independent=True
    )
    if has_batchnorm(net):  # in training mode an image's features depend on all others
        together, most = classes, len(indices)
    else:
        together = _classes_at_once(run)
        most = run.at_once(FORWARD)
    gradient = torch.empty_like(run.images)
    losses = []
    for first in range(0, classes, together):
        end = min(first + together, classes)
        begin, within = sum(counts[:first]), counts[first:end]
        chunk = indices[begin : begin + sum(within)]
        real = _real_features(run, net, chunk, within, draw[:, first:end], most)
        # A leaf of its own: the graph of a slice would write and add zeros for all other classes.
        here = run.of_classes(first, end)
        images = run.images.detach()[here].requires_grad_()
        ipcs = [ipc] * (end - first)
        features = net.embed(run.augment(images, draw[:, first:end], ipcs))
        distances = class_mean_distance(features, real, ipcs, within)
        gradient[here] = torch.autograd.grad(distances.sum(), images)[0]
        losses.append(distances.detach())
    run.processed += len(indices) + len(run.images)
    result = torch.cat(losses)
    run.update(gradient, result)
    return result


def _real_features(
    run: Run,
    net: Network,
    indices: Tensor,
    counts: list[int],
    draw: Tensor,
    most: int,
) -> Tensor:
    """Features of real images that lie class by class, at most `most` in one pass."""
    parts = []
    with torch.no_grad():
        for piece, first, within in _pieces(counts, most):
            rows = draw[:, first : first + len(within)]
            parts.append(net.embed(run.augment(run.real(indices[piece]), rows, within)))
    return torch.cat(parts)


def _pieces(counts: list[int], most: int) -> Iterator[tuple[slice, int, list[int]]]:
    """Cuts into runs of at most `most`: the run, its first class, and its images of each class."""
    ends = list(accumulate(counts))
    for start in range(0, ends[-1], most):
        stop = min(start + most, ends[-1])
        first, last = bisect_right(ends, start), bisect_left(ends, stop)
        within = [
            min(ends[c], stop) - max(ends[c] - counts[c], start) for c in range(first, last + 1)
        ]
        yield slice(start, stop), first, within


def _classes_at_once(run: Run) -> int:
    """Classes whose synthetic images, and features of real images, fit into the memory."""
    fit = run.at_once(FIRST_ORDER)
    if fit < run.config.ipc:
        raise ValueError(
            f"memory: the budget of {run.memory} bytes holds {fit} images at once, and the "
            f"{run.config.ipc} of one class must fit"
        )
    features = run.net.classifier.in_features * run.images.element_size()
    real = run.memory // 4 // (features * run.config.batch_real)
    return max(1, min(fit // run.config.ipc, real, run.sampler.num_classes))
