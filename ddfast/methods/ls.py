"""LS: label solve, the labels of fixed real images that a kernel regression learns most from.

Nguyen, Chen and Lee, Dataset Meta-Learning from Kernel Ridge-Regression, ICLR 2021. With a kernel
K as in KIP, the images X_s are real ones and stay, and the labels are a closed form:

    Y_s = (K_ts (K_ss + reg tr(K_ss)/n I)^-1)^+ Y_t

the least-squares solution, of many the shortest, for the labels Y_t = one-hot - 1/C of all training
images X_t. One iteration; real images go through in blocks that fit the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.engine.kernel_regression import predictions, solved_labels
from ddfast.methods import infinite_width, regression
from ddfast.methods.config import setting
from ddfast.methods.regression import LABELS
from ddfast.methods.run import Run

TITLE = "LS: Dataset Meta-Learning from Kernel Ridge-Regression (Nguyen et al., ICLR 2021)"
MATCHES = "kernel ridge regression, by the labels of real images, in closed form"
PROTOCOL = "krr"


@dataclass(frozen=True, kw_only=True)
class Config(infinite_width.Config):
    """Settings of LS; those that say how images are learned have no meaning."""

    beside: ClassVar[tuple[str, ...]] = (LABELS,)

    batch_real: int = setting("of no meaning: all training images count", 1, least=1)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """KIP's ConvNet of four layers, NTK, real images.

        For digits the NTK of one fully connected layer: on a split of their training images 79.9 %
        at ipc 1 (three layers 76.0, the same images with hard labels 64.1) and 97.2 at ipc 10.
        """
        return {
            **super().published(dataset),
            "kernel": "ntk-fc1" if dataset.name == "digits" else "ntk-kip_convnet",
            "dtype": "float64",
            "init": "real",
            "iterations": 1,
            "lr_img": 1.0,
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images, and labels."""
        tensors, labels = super().starting_set(dataset, generator)
        return {**tensors, LABELS: regression.centred(labels, dataset.num_classes)}, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """None that is used."""
        return torch.optim.SGD([tensors[LABELS]], self.lr_img)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: more than one iteration; images that are no pixels; see `infinite_width.check`.
    """
    if run.config.iterations != 1:
        raise ValueError(f"iterations: got {run.config.iterations}, expected 1, a closed form")
    if run.config.parametrisation != "pixels":
        raise ValueError(
            f"parametrisation: got {run.config.parametrisation!r}, expected 'pixels', real images"
        )
    infinite_width.check(run)


def step(run: Run) -> Tensor:
    """The labels. Returns the loss of their prediction of all real images, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    support = run.images.detach().to(infinite_width.dtype_of(run))
    real, kernel = torch.arange(len(run.dataset.train_labels)), infinite_width.kernel_of(config)

    def blocks() -> Any:
        return infinite_width.targets(run, real, support, None)

    labels = solved_labels(kernel, support, blocks, config.reg)
    kept = labels.to(run.dtype)
    loss = labels.new_zeros(())
    found = predictions(kernel, support, kept, (images for images, _ in blocks()), config.reg)
    for predicted, (_, wanted) in zip(found, blocks(), strict=True):
        loss += (predicted - wanted).square().sum() / (2 * len(real) * labels.shape[1])
    run.processed += len(support) + len(real)
    losses = regression.repeated(run, loss)

    def put() -> None:
        with torch.no_grad():
            run.tensors[LABELS].copy_(kept)

    run.update({LABELS: torch.zeros_like(kept)}, losses, step=put)
    return losses
