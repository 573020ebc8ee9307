"""KIP: kernel inducing points, the support set of a kernel ridge regression.

Nguyen, Chen and Lee, Dataset Meta-Learning from Kernel Ridge-Regression, ICLR 2021, and Nguyen,
Novak, Xiao and Lee, Dataset Distillation with Infinitely Wide Convolutional Networks, NeurIPS 2021.
With the neural tangent kernel K of an infinitely wide network, real images X_t are predicted from
the synthetic ones, X_s, with labels Y_s = one-hot - 1/C:

    P = K_ts (K_ss + reg tr(K_ss)/n I)^-1 Y_s,    loss: mean of (P - Y_t)^2 / 2

and Adam makes a step on X_s, and with `learn_labels` on Y_s. `batch_real` real images are drawn in
every iteration, as many of each class; all of them where there are no more. No network is trained.

Real images go through in blocks that fit the memory: the gradient of the regression is a closed
form, so that each block of the kernel is computed and differentiated by itself
(`ddfast.engine.kernel_regression`), which changes results by rounding only. The kernel is computed
in float64 as published; float32 costs half, and at the published reg of 1e-6 is too coarse for
near-duplicates among the synthetic images.

Images belong to their kernel: the protocol "krr" classifies by the same regression. Learned labels
are kept as they are, one row of numbers around zero for each image.

Unlike the official code: its augmentation of real images (mirroring, shifts, rotations, shifts of
channels) is defined there and not called; `dsa_strategy` offers DSA's in its place. Classes with
fewer images than their share of the batch give what they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.engine.kernel_regression import regression_gradient
from ddfast.methods import bilevel, infinite_width, regression
from ddfast.methods.config import setting
from ddfast.methods.regression import LABELS
from ddfast.methods.run import Run

TITLE = (
    "KIP: Dataset Meta-Learning from Kernel Ridge-Regression (Nguyen et al., ICLR, NeurIPS 2021)"
)
MATCHES = "kernel ridge regression with the kernel of an infinitely wide network"
PROTOCOL = "krr"

SECOND_BETA = 0.999


@dataclass(frozen=True, kw_only=True)
class Config(infinite_width.Config):
    """Settings of KIP, by default those of the official notebook."""

    batch_real: int = setting("real images of an iteration, of all classes", 5000, least=1)
    momentum: float = setting("of the synthetic images: Adam's first beta", 0.9, least=0, below=1)
    learn_labels: bool = setting("learn the labels, too", False)
    lr_labels: float = setting("learning rate of the labels (lr_img)", above=0)
    dsa_strategy: str = setting("augmentations of real images, joined by _, or none", "none")

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return (LABELS,) if self.learn_labels else ()

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """KIP's ConvNet of four layers, NTK, 50000 iterations from real images, lr_img 0.04.

        For digits the NTK of three fully connected layers and 300 iterations: on a split of their
        training images 96.3 % at ipc 1 (random selection 65.3), 96.1 after 100 iterations and 95.7
        after 1000; one layer had 98.2 at ipc 10 (91.6). Learned labels had 96.4 and 98.6.
        """
        digits = dataset.name == "digits"
        return {
            **super().published(dataset),
            "kernel": "ntk-fc3" if digits else "ntk-kip_convnet",
            "dtype": "float64",
            "init": "real",
            "iterations": 300 if digits else 50_000,
            "lr_img": 4e-2,
            "lr_labels": 4e-2 if self.lr_img is None else self.lr_img,
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images, and with `learn_labels` the labels."""
        tensors, labels = super().starting_set(dataset, generator)
        if self.learn_labels:
            tensors[LABELS] = regression.centred(labels, dataset.num_classes)
        return tensors, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam."""
        groups = self.parameter_groups(tensors)
        groups += [{"params": [tensors[name]], "lr": self.lr_labels} for name in self.beside]
        return torch.optim.Adam(groups, self.lr_img, (self.momentum, SECOND_BETA))


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: fewer real images than classes; see `infinite_width.check`.
    """
    if run.config.batch_real < run.dataset.num_classes:
        raise ValueError(
            f"batch_real: got {run.config.batch_real}, expected an image of each of the "
            f"{run.dataset.num_classes} classes at least"
        )
    infinite_width.check(run)


def step(run: Run) -> Tensor:
    """One update of images and labels. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    made, beside = run.decoded(0, run.dataset.num_classes), bilevel.leaves_beside(run)
    support = made.images.detach().to(infinite_width.dtype_of(run))
    labels = regression.labels_of(run, made, beside)
    real = real_images(run)
    draw = run.augment.draw(
        run.generator("augmentation"), run.dataset.size, count=len(real), independent=True
    )
    blocks = infinite_width.targets(
        run, real, support, lambda images, here: run.augment(images, draw[:, here])
    )
    loss, by_support, by_labels = regression_gradient(
        infinite_width.kernel_of(config), support, labels, blocks, len(real), config.reg
    )
    found = run.no_gradients()
    run.chain(found, made, made.images, by_support.to(run.dtype))
    for name, leaf in beside.items():
        (found[name],) = torch.autograd.grad(labels, leaf, by_labels.to(labels.dtype))
    run.processed += len(support) + len(real)
    losses = regression.repeated(run, loss)
    run.update(found, losses)
    return losses


def real_images(run: Run) -> Tensor:
    """Positions of this iteration's real images: as many of each class, or all there are."""
    batch, there = run.config.batch_real, len(run.dataset.train_labels)
    if there <= batch:
        return torch.arange(there)
    share = batch // run.dataset.num_classes
    return run.sampler.sample_all(share, run.generator("real images"))[0]
