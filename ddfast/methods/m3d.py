"""M3D: the features' whole distributions, matched by the maximum mean discrepancy of a kernel.

Zhang H., Li, Wang, Zeng and Ge, M3D: Dataset Condensation by Minimizing Maximum Mean Discrepancy,
AAAI 2024 (arXiv 2312.15927). Images are stored as IDC's, in [0, 1], and decoded by multi-formation.
In a random network theta, never trained and drawn anew every `ipm` iterations, with psi its
features before the classifier and one augmentation for both sides of a class:

    L = sum_c mean K(s, s') - 2 mean K(s, x) + mean K(x, x')

over all pairs of a class, each image with itself included. K of the features, not normalised:

    gaussian     sum over j = -2 .. 2 of exp(-|a - b|^2 / (2^j b)), b the mean of |a - b|^2 over all
                 pairs of different images of both sides, a constant for the gradient
    linear       a . b: DM's loss, exactly
    polynomial   (a . b + 1)^2
    laplace      sum over g = 0.1, 1, 5 of exp(-g |a - b|^2), as the code has it: of the squared
                 distance, and so no Laplace kernel

Of many images the values are small, about 1e-3, and lr_img belongs to them: 10. A few images of
8x8 pixels need far less.

Images are clamped to [0, 1] at the start of each iteration; an optimiser step follows each class as
in IDC, see `class_steps`. The paper's repository holds no code at the revision known to us. The
loop and the loss are those that repositories made from it agree on; their settings for CIFAR are
taken for all data sets. They report the best of several accuracies on the test images in the course
of a training; here it is always the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ddfast import nets
from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.losses import mmd_and_gradient
from ddfast.methods.class_steps import at_their_turn, check_class_steps, step_by_class
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.dm import real_batch
from ddfast.methods.feature_matching import Group, check_memory, subset, sweep
from ddfast.methods.idc import LEAST_CELL
from ddfast.methods.run import Run, refuse_batchnorm
from ddfast.random import generator
from ddfast.synthetic.multi_formation import initialise

TITLE = "M3D: Condensation by Minimizing Maximum Mean Discrepancy (Zhang H. et al., AAAI 2024)"
MATCHES = "distributions of each class's features, by a kernel, in random networks"
PROTOCOL = "m3d"

KERNELS = {
    "gaussian": "gaussian",
    "linear": "linear",
    "polynomial": "polynomial",
    "laplace": "m3d_laplace",
}


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of M3D, by default those of the repositories made from the paper's code."""

    space: ClassVar[str] = "pixel"

    batch_real: int = setting("real images per class and step", 64, least=1)
    batch_syn_max: int = setting("decoded images of a class and step at most", 200, least=1)
    aug_type: str = setting("augmentations in matching, joined by _, or none", "color_crop_cutout")
    kernel: Literal["gaussian", "linear", "polynomial", "laplace"] = setting(
        "of the discrepancy; laplace is M3D's own", "gaussian"
    )
    ipm: int = setting("iterations that a network is used for", 5, least=1)
    step: Literal["joint", "per_class"] = setting(
        "optimiser steps: one after each class as published, or joint"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.aug_type)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """10000 iterations, four real images in each stored one, lr_img 10.

        Images whose cells would be less than 8 pixels wide are not divided. For digits 500
        iterations and an lr_img chosen on a split of their training images.
        """
        divided = min(dataset.size) // 2 >= LEAST_CELL
        own = self.parametrisation in (None, "pixels", "multi_formation")
        digits = dataset.name == "digits"
        return {
            **super().published(dataset),
            "parametrisation": "multi_formation",
            "factor": 2 if divided else 1,
            "iterations": 500 if digits else 10000,
            "init": "mix" if self.parametrisation in (None, "multi_formation") else "real",
            "lr_img": DIGITS_LR[self.ipc >= 10] if digits else 10.0,
            "step": "per_class" if own else "joint",
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As IDC's: `mix` takes the first images of each class."""
        if self.init != "mix" or self.parametrisation != "multi_formation":
            return super().starting_set(dataset, generator)
        images, labels = initialise(dataset, self.ipc, "mix", self.factor, generator, "first")
        return {"images": images}, labels

    def augmentation(self) -> DSA:
        return DSA(self.aug_type, mode="C")


DIGITS_LR = (0.02, 1.0)
"""Below ipc 10, and from there on. On a split of the training images and with 300 iterations: at
ipc 1 0.01 had 91.1, 0.05 90.7 and 0.2 83.6 %; at ipc 10 1 had 97.5, 3 94.4 and 0.1 and 0.5 (with
fewer epochs) 92.3 and 95.0 %; 1000 iterations with 1 had 97.8 %."""


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: batch normalisation; steps per class where classes share what is learned; not
            even one image fits into the memory.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, "M3D")
    if config.step == "per_class":
        check_class_steps(run)
    check_memory(run, [min(count, config.batch_real) for count in run.sampler.counts])


def step(run: Run) -> Tensor:
    """One update of the images. Returns the discrepancy of each class, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    net = run.net.train()
    nets.initialise(net, generator(config.seed, "network", run.iteration // config.ipm))
    if set(run.tensors) == {"images"}:  # else they are no images but what these are made of
        with torch.no_grad():
            run.images.clamp_(0, 1)
    per_class = config.step == "per_class"
    gradients, losses = sweep(
        *(run, net, real_batch(run), partial(discrepancy, kernel=KERNELS[config.kernel])),
        held=2 * config.batch_real * net.classifier.in_features,
        tensors={"images": at_their_turn(run)} if per_class else None,
        fewer=partial(subset, run, most=config.batch_syn_max),
    )
    run.update(gradients, losses, "", partial(step_by_class, run) if per_class else None)
    return losses


def discrepancy(group: Group, kernel: str) -> tuple[Tensor, Tensor]:
    """Discrepancies of the classes' features. Classes with as many real images go together."""
    counts, sizes = group.made.counts, group.real_counts
    syn = group.features.unflatten(0, (len(counts), counts[0]))
    real = group.real_rows().split(sizes)
    losses, by_features = syn.new_zeros(len(counts)), torch.zeros_like(syn)
    for size in sorted(set(sizes)):
        places = [c for c, n in enumerate(sizes) if n == size]
        here = torch.tensor(places, device=syn.device)
        value, by_syn = mmd_and_gradient(syn[here], torch.stack([real[c] for c in places]), kernel)
        losses[here], by_features[here] = value.to(losses.dtype), by_syn
    return losses, by_features.flatten(0, 1)
