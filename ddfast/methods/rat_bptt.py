"""RaT-BPTT: back-propagation through a window at a random place of the training.

Feng, Vedantam and Kempe, Embarrassingly Simple Dataset Distillation, ICLR 2024. A fresh network is
trained by Adam for r + `window` steps, r uniform from `minwindow` to `totwindow` - `window`; only
the last `window` have a gradient, and the optimiser's state before them is a constant that they
carry on. The loss is that of real images. `cctype` "fixed" is the longest training always. Each
step of the network, and the batch of real images, draws an operation of `dsa_strategy` of its own,
with parameters for each image.

Gradients vary by orders of magnitude. Those of the tensors that images are made of are cut, each to
twice the moving average m of its norms n, and Adam makes a step:

    m <- 0.9 m + 0.1 n, and m = n at first;     gradient <- gradient min(1, 2 m / n)

Images begin as noise, each of norm 1. Labels (`learn_labels`) are weights of the classes, one-hot
at first, cut off at 0 after each step and not scaled to sum to one; their gradient is not clipped.

Unlike the official code: r is drawn anew in every iteration (there, but for an option, in every
pass over the real images), whitening is not part of the method, and of the networks tested at four
times in their training it is the last, not the best by the test set, that counts. A window that
moves when the loss stalls is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.methods import bilevel, regression
from ddfast.methods.bilevel import Training
from ddfast.methods.config import dsa_strategy, setting
from ddfast.methods.published_trajectories import nearest
from ddfast.methods.regression import LABELS
from ddfast.methods.run import Decoded, Run
from ddfast.unroll import Adam

TITLE = "RaT-BPTT: Embarrassingly Simple Dataset Distillation (Feng et al., ICLR 2024)"
MATCHES = "the loss on real data after training, through a random window of it"
PROTOCOL = "rat_bptt"

EPOCHS = 60_000
"""Passes over the real data."""

NAMES = (
    *("window", "totwindow", "cctype", "learn_labels"),
    *("batch_per_class", "task_sampler_nc", "batch_real", "lr_img"),
)
# The commands in the repository's README; task_sampler_nc 0 stands for all classes.
PUBLISHED: Mapping[str, Mapping[int, Mapping[str, Any]]] = {
    family: {ipc: dict(zip(NAMES, values, strict=True)) for ipc, values in rows.items()}
    for family, rows in {
        "CIFAR10": {10: (60, 200, "random", False, 10, 0, 5000, 1e-3)},
        "CIFAR100": {
            1: (90, 130, "fixed", True, 1, 0, 5000, 3e-4),
            10: (100, 300, "random", True, 1, 0, 5000, 1e-3),
        },
        "TinyImageNet": {10: (100, 300, "random", True, 1, 50, 1000, 3e-4)},
        "ImageNet1K": {1: (80, 280, "fixed", True, 1, 50, 1500, 3e-4)},
    }.items()
}
DIGITS: dict[bool, Mapping[str, Any]] = {  # from ipc 10 on, or below
    large: {
        "window": window,
        "totwindow": 3 * window,
        "inner_lr": inner_lr,
        "lr_img": lr_img,
        "iterations": iterations,
        "init": init,
    }
    for large, window, inner_lr, lr_img, iterations, init in (
        (False, 10, 1e-2, 0.05, 200, "noise"),
        (True, 20, 3e-3, 0.2, 150, "real"),
    )
}
SECOND_BETA = 0.999
NORM_DECAY = 0.9
MOST_OVER_MEAN = 2.0
ABOVE_ZERO = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def strategy(dataset: Dataset) -> str:
    """The published augmentation; without flip for digits, which mirrored are something else."""
    return "flip_rotate" if "flip" in dsa_strategy(dataset).split("_") else "rotate"


@dataclass(frozen=True, kw_only=True)
class Config(bilevel.Config):
    """Settings of RaT-BPTT, by default the official script's."""

    batch_real: int = setting(
        "real images of the outer loss, of all classes (5000)", aliases=("batch_size",), least=1
    )
    momentum: float = setting("of the synthetic images: Adam's first beta", 0.9, least=0, below=1)
    window: int = setting("steps that are differentiated", least=1)
    totwindow: int = setting("steps of the longest training", least=1)
    minwindow: int = setting("fewest steps before the window", 0, least=0)
    cctype: Literal["random", "fixed"] = setting(
        "where the window lies: at random, or at the end of totwindow steps"
    )
    inner_lr: float = setting("learning rate of the inner Adam", above=0)
    batch_per_class: int = setting("synthetic images per class and inner step", least=1)
    task_sampler_nc: int = setting("classes of an inner step (all)", least=1)
    learn_labels: bool = setting("learn labels as weights of the classes", aliases=("train_y",))
    lr_y: float = setting("learning rate of the labels (lr_img)", above=0)
    dsa_strategy: str = setting(
        "augmentations to draw from, joined by _, or none", aliases=("syn_strategy",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.dsa_strategy)  # raises if it does not know an operation

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return (LABELS,) if self.learn_labels else ()

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """60000 passes over the real data, and the README's command for data set and ipc.

        For digits 200 iterations of noise: lr_img 0.05, inner_lr 0.01, a window of 10 of up to
        30 steps; from ipc 10 on 150 of real images, 0.2, 0.003, 20 and 60. On a split of their
        training images noise had 88.6 % at ipc 1, real images 97.0 at ipc 10 (random selection
        95.0).
        """
        digits = dataset.name == "digits"
        found: dict[str, Any] = dict(nearest(PUBLISHED, dataset, self.ipc))
        batch = self.batch_real or found["batch_real"]
        found["iterations"] = bilevel.passes(len(dataset.train_labels), batch, EPOCHS)
        if digits:
            found |= DIGITS[self.ipc >= 10]
        classes = dataset.num_classes
        return {
            **super().published(dataset),
            "inner_lr": 1e-3,
            "init": "noise",
            "dsa_strategy": strategy(dataset),
            **found,
            "lr_y": self.lr_img or found["lr_img"],
            "task_sampler_nc": min(found["task_sampler_nc"] or classes, classes),
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Noise of unit norm, or what `init` says; with `learn_labels` also the labels."""
        tensors, labels = super().starting_set(dataset, generator)
        if self.init == "noise" and self.rows == "images":
            norms = tensors["images"].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            tensors["images"] = tensors["images"] / norms
        if self.learn_labels:
            hot = torch.nn.functional.one_hot(labels, dataset.num_classes)
            tensors[LABELS] = hot.float()
        return tensors, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam."""
        groups = self.parameter_groups(tensors)
        if self.learn_labels:
            groups.append({"params": [tensors[LABELS]], "lr": self.lr_y})
        return torch.optim.Adam(groups, self.lr_img, (self.momentum, SECOND_BETA))

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """With the labels, if they were learned."""
        return regression.with_labels(super().distilled, tensors, state)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: a window that the training does not hold; more classes in a step than there
            are; see `bilevel.check`.
    """
    config = run.config
    assert isinstance(config, Config)
    each = min(config.batch_per_class, run.decoded_per_class)
    batch = each * min(config.task_sampler_nc, run.dataset.num_classes)
    bilevel.check(run, "RaT-BPTT", batch, config.totwindow, Adam(), config.window)
    if config.minwindow + config.window > config.totwindow:
        raise ValueError(
            f"window: got {config.window} behind at least {config.minwindow} steps, expected at "
            f"most totwindow, {config.totwindow}, together"
        )
    if config.task_sampler_nc > run.dataset.num_classes:
        raise ValueError(
            f"task_sampler_nc: got {config.task_sampler_nc}, and {run.dataset.name} has "
            f"{run.dataset.num_classes} classes"
        )


def step(run: Run) -> Tensor:
    """One update of images and labels. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    made = run.decoded(0, run.dataset.num_classes)
    training, beside = _training(run, made)
    gradients, loss = bilevel.gradients(run, made, beside, training)
    clipped, norms = clip(run, gradients)
    losses = bilevel.update(run, clipped, loss, training, partial(_step, run))
    run.state = {**run.state, **norms}
    return losses


@torch.no_grad()
def _step(run: Run) -> None:
    run.optimiser.step()
    if LABELS in run.tensors:
        run.tensors[LABELS].clamp_(min=0)


def _training(run: Run, made: Decoded) -> tuple[Training, dict[str, Tensor]]:
    """What this iteration's student is trained on, and the leaves beside the images."""
    config = run.config
    assert isinstance(config, Config)
    before = config.totwindow - config.window
    if config.cctype == "random":
        random = run.generator("window")
        before = int(torch.randint(config.minwindow, before + 1, (), generator=random))
    steps = before + config.window
    batches = bilevel.minibatches(run, made, steps, config.batch_per_class, config.task_sampler_nc)
    real = bilevel.in_turn(run, config.batch_real)
    size = run.dataset.size
    draws = [
        run.augment.draw(run.generator("augmentation", step), size, count=len(rows))
        for step, rows in enumerate(batches)
    ]
    real_draw = run.augment.draw(run.generator("real augmentation"), size, count=len(real))
    beside = bilevel.leaves_beside(run)
    training = Training(
        bilevel.fresh_start(run),
        batches,
        torch.tensor(config.inner_lr, dtype=run.dtype),
        real,
        Adam(),
        augment=lambda x, step: run.augment(x, draws[step]),
        augment_real=lambda x, here: run.augment(x, real_draw[:, here]),
        labels=beside[LABELS][made.sources] if beside else None,
        window=config.window,
    )
    return training, beside


def clip(run: Run, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the images with norms of at most twice their moving average, and these averages.

    The average counts these norms in, and begins with the first of them.
    """
    clipped, norms = dict(gradients), {}
    for name, gradient in gradients.items():
        if name in run.config.beside:
            continue
        norm, key = gradient.norm(), f"norm.{name}"
        norms[key] = NORM_DECAY * run.state.get(key, norm) + (1 - NORM_DECAY) * norm
        most = MOST_OVER_MEAN * norms[key]
        clipped[name] = gradient * (most / (norm + ABOVE_ZERO)).clamp(max=1)
    return clipped, norms
