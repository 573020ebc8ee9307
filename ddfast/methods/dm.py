"""DM: matching the mean features of real and synthetic images in fresh random networks.

Zhao and Bilen, Dataset Condensation with Distribution Matching, WACV 2023 (arXiv 2110.04181). Per
iteration one network theta, never trained, and for every class one Siamese augmentation omega_c:

    L = sum_c | mean psi_theta(A(x; omega_c)) - mean psi_theta(A(s; omega_c)) |^2

over a batch of real images x and all synthetic images s of the class; psi are the features before
the classifier. One SGD step on all images together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddfast.data import Dataset
from ddfast.losses import class_mean
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import dsa_strategy, setting
from ddfast.methods.feature_matching import (
    Group,
    RealBatch,
    check_memory,
    mean_distance,
    sweep,
)
from ddfast.methods.run import Run

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
        follow CIFAR-10. All are for ConvNets: for ResNets the authors advise 0.1 or 0.01. For
        digits 500 iterations: on a split of their training images more gained less than a standard
        deviation.
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
    check_memory(run, [min(count, run.config.batch_real) for count in run.sampler.counts])


def step(run: Run) -> Tensor:
    """One update of the images. Returns the distance of each class, (num_classes,)."""
    net = run.fresh_net().requires_grad_(False)
    gradients, losses = sweep(run, net, real_batch(run), mean_features)
    run.update(gradients, losses)
    return losses


def real_batch(run: Run, *moment: int) -> RealBatch:
    """`batch_real` images of every class, and the same augmentation for both sides of a class.

    Args:
        moment: where in the iteration, if it needs more than one batch.
    """
    indices, counts = run.sampler.sample_all(
        run.config.batch_real, run.generator("real images", *moment)
    )
    draw = run.augment.draw(
        run.generator("augmentation", *moment),
        run.dataset.size,
        count=run.dataset.num_classes,
        independent=True,
    )
    return RealBatch(indices, counts, draw)


def mean_features(group: Group) -> tuple[Tensor, Tensor]:
    """Squared distances of the mean features."""
    counts = group.made.counts
    return mean_distance(class_mean(group.features, counts), group.real_means(), counts)
