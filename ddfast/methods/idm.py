"""IDM: DM on quadrants of the images, in networks that learn, and their cross-entropy.

Zhao G., Li, Qin and Yu, Improved Distribution Matching for Dataset Condensation, CVPR 2023
(arXiv 2307.09742). A stored image holds four, one in each quadrant, enlarged to full size before
they are augmented. Per iteration one network theta, drawn from a queue (`network_queue`), and for
every class one Siamese augmentation omega_c:

    L = sum_c | mean psi_theta(A(x; omega_c)) - mean psi_theta(A(decode(s); omega_c)) |^2
              + ce_weight a_theta mean CE(net_theta(A(decode(s); omega_c)), c)

psi are the features before the classifier, and the logits are computed from the very same features;
the network is in evaluation mode. a_theta is its accuracy on the real batches that it was trained
on, in percent, 0 to 100: a weight of 0.5 reaches 50. A network that was not trained since the last
reset has a_theta 0, and its cross-entropy does not count. After the image update `fetch_net_num`
networks of the queue are trained on real images.

Reset. The released code counts the accuracies anew each time that it evaluates its images, every
100 iterations in most of its commands, and so they lie in the past by 100 iterations at most; here
that is `reset_interval`, though nothing is evaluated.

Steps. An optimiser step after each class, as published, is exact up to rounding with all classes
matched together, see `class_steps`; `step="joint"` makes one step for all.

Unlike the released code: the four images in a stored one are always different ones, shrunk by
nearest neighbour; what is reported is the last state, not the one that was best on test images; the
network for ImageNet has a depth that follows the images' size. Its evaluation is DM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.losses import class_mean
from ddfast.methods import network_queue
from ddfast.methods.class_steps import at_their_turn, check_class_steps, step_by_class
from ddfast.methods.config import dsa_strategy, setting
from ddfast.methods.dm import real_batch
from ddfast.methods.feature_matching import (
    Group,
    check_memory,
    cross_entropy_by_features,
    mean_distance,
    sweep,
)
from ddfast.methods.idc import LARGE, LEAST_CELL
from ddfast.methods.run import Run, refuse_batchnorm

TITLE = "Improved Distribution Matching for Dataset Condensation (Zhao G. et al., CVPR 2023)"
MATCHES = "mean features of each class in a queue of learning networks; and their classification"
PROTOCOL = "dm"


@dataclass(frozen=True, kw_only=True)
class Config(network_queue.Config):
    """Settings of IDM, by default those of the released code's commands."""

    batch_real: int = setting("real images per class and step (256; ipc 1: 5000)", least=1)
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    ce_weight: float = setting("weight of cross-entropy times accuracy in percent", least=0)
    step: Literal["joint", "per_class"] = setting(
        "optimiser steps: one after each class as published, or joint"
    )

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """20001 iterations, four real images in each stored one, lr_img 0.2, and by data set and
        ipc what the commands say.

        Other ipc have the settings of the next smaller published one, and a data set that is none
        of those is treated as CIFAR-10, beyond 64 pixels as ImageNet. Images whose quadrants would
        be less than 8 pixels wide are not divided. Digits have 200 iterations, smaller batches and
        a smaller ce_weight, chosen on a split of their training images.
        """
        divided = min(dataset.size) // 2 >= LEAST_CELL
        storable = self.parametrisation in (None, "pixels", "multi_formation")
        return {
            **super().published(dataset),
            "parametrisation": "multi_formation",
            "factor": 2 if divided else 1,
            "iterations": 200 if dataset.name == "digits" else 20001,
            "init": "mix" if self.parametrisation in (None, "multi_formation") else "real",
            "lr_img": 0.2,
            "batch_real": 256,
            "dsa_strategy": dsa_strategy(dataset),
            "step": "per_class" if storable else "joint",
            "net_num": 100,
            "net_generate_interval": 30,
            "batch_train": 256,
            "model_train_steps": 10,
            **_of_data_set(dataset, self.ipc),
        }


def _of_data_set(dataset: Dataset, ipc: int) -> dict[str, Any]:
    """What differs between the commands of the released code."""
    if dataset.name == "digits":
        return DIGITS | ({"ce_weight": 0.02} if ipc >= 10 else {})
    if dataset.name == "TinyImageNet":
        reset = 100 if ipc < 10 else 500 if ipc < 50 else 1000
        if ipc < 50:
            return {"ce_weight": 0.5, "reset_interval": reset}
        return {"ce_weight": 0.8, "reset_interval": reset, "model_train_steps": 50}
    if max(dataset.size) > LARGE:
        found = {"ce_weight": 3.0, "batch_real": 128, "net_generate_interval": 50}
        found |= {"net_num": 50 if ipc < 50 else 100, "batch_train": 128}
        return found | {"reset_interval": 200 if ipc < 10 else 1000 if ipc < 50 else 500}
    found = {"ce_weight": 0.1 if ipc >= 50 else 0.5, "reset_interval": 500 if ipc >= 50 else 100}
    if ipc == 1:
        found |= {"batch_real": 5000, "net_generate_interval": 5}
    if dataset.name == "CIFAR100" and 10 <= ipc < 50:
        found |= {"ce_weight": 0.1, "model_train_steps": 50}
    return found


DIGITS = {
    "ce_weight": 0.5,
    "reset_interval": 100,
    "net_generate_interval": 5,
    "batch_train": 64,
}
"""There are 1437 of them: with the published batches, a network new every 30 iterations, each would
have seen them a hundred times, on CIFAR-10 three times. On a split of the training images, after
150 iterations and 300 epochs, ce_weight 0.5 had 90.3, 0.02 94.7 and 0 96.1 % at ipc 10, and the
images at the start 92.8 %; lr_img 1 made no difference to 0.2. At ipc 1 0.5 had 89 %, with lr_img
0.2, 1 and 5 alike."""


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: batch normalisation; steps per class where classes share what is learned; not
            even one image fits into the memory.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, "IDM")
    if config.step == "per_class":
        check_class_steps(run)
    check_memory(run, [min(count, config.batch_real) for count in run.sampler.counts])


def step(run: Run) -> Tensor:
    """One update of the images, then training. Returns the loss of each class, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    state = network_queue.begin(run)
    queue = network_queue.numbers(config, run.iteration)
    random = run.generator("choice of networks")
    chosen = queue[int(torch.randint(len(queue), (), generator=random))]
    trained = torch.randperm(len(queue), generator=random)[: config.fetch_net_num].tolist()

    net = network_queue.load(run, state, chosen)
    weight = config.ce_weight * network_queue.accuracy(state, chosen)
    per_class = config.step == "per_class"
    gradients, losses = sweep(
        *(run, net, real_batch(run), partial(means_and_cross_entropy, weight=weight)),
        tensors={"images": at_their_turn(run)} if per_class else None,
    )
    run.update(gradients, losses, "", partial(step_by_class, run) if per_class else None)
    for turn, place in enumerate(trained):
        network_queue.train(run, state, queue[place], turn)
    run.state = state
    return losses


def means_and_cross_entropy(group: Group, weight: float) -> tuple[Tensor, Tensor]:
    """DM's distances, and so many times the mean cross-entropy of each class."""
    counts, found = group.made.counts, group.features
    losses, by_features = mean_distance(class_mean(found, counts), group.real_means(), counts)
    if weight:
        entropy, by_entropy, _ = cross_entropy_by_features(group.net, found, group.made.labels)
        losses = losses + weight * class_mean(entropy.unsqueeze(1), counts).squeeze(1)
        sizes = torch.tensor(counts, device=found.device)
        shares = (weight / sizes.to(found.dtype)).repeat_interleave(sizes, 0)
        by_features = by_features + shares.unsqueeze(1) * by_entropy
    return losses, by_features
