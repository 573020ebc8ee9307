"""RaT-BPTT: back-propagation through a window at a random place of the training.

Feng, Vedantam and Kempe, Embarrassingly Simple Dataset Distillation, ICLR 2024. A fresh network is
trained by Adam for r + `window` steps, r uniform from `minwindow` to `totwindow` - `window`; only
the last `window` have a gradient, and the optimiser's state before them is a constant that they
carry on. The loss is that of real images. The gradient of the images is clipped to twice the moving
average of its norms; images begin as noise of unit norm. `cctype` "fixed" is the longest training
always.

Labels (`learn_labels`) are weights of the classes, one-hot at first, cut off at 0 after each step
and not scaled to sum to one; they are not clipped.

The official code tests the networks at four times in their training and keeps the best by the test
set; here it is the last. Images of a class in a minibatch (`batch_per_class`): unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.methods import bilevel
from ddfast.methods.bilevel import Training
from ddfast.methods.config import setting
from ddfast.methods.published_trajectories import nearest
from ddfast.methods.run import Decoded, Run
from ddfast.unroll import Adam

TITLE = "RaT-BPTT: Embarrassingly Simple Dataset Distillation (Feng et al., ICLR 2024)"
MATCHES = "the loss on real data after training, through a random window of it"
PROTOCOL = "rat_bptt"

NAMES = "window", "totwindow", "learn_labels"
# The repository's README.
PUBLISHED: Mapping[str, Mapping[int, Mapping[str, Any]]] = {
    family: {ipc: dict(zip(NAMES, values, strict=True)) for ipc, values in rows.items()}
    for family, rows in {
        "CIFAR10": {10: (60, 200, False)},
        "CIFAR100": {1: (90, 130, False), 10: (100, 300, True)},
        "TinyImageNet": {10: (100, 300, False)},
        "ImageNet1K": {1: (80, 280, False)},
    }.items()
}
DIGITS: dict[bool, Mapping[str, Any]] = {  # from ipc 10 on, or below
    large: {
        "window": window,
        "totwindow": 3 * window,
        "inner_lr": inner_lr,
        "lr_img": lr_img,
        "learn_labels": False,
        "lr_y": lr_img,
        "iterations": iterations,
        "init": init,
    }
    for large, window, inner_lr, lr_img, iterations, init in (
        (False, 10, 1e-2, 0.05, 200, "noise"),
        (True, 20, 3e-3, 0.2, 150, "real"),
    )
}
NORM_DECAY = 0.9
MOST_OVER_MEAN = 2.0


@dataclass(frozen=True, kw_only=True)
class Config(bilevel.Config):
    """Settings of RaT-BPTT, by default the official script's."""

    batch_real: int = setting("real images of the outer loss, of all classes", 5000, least=1)
    window: int = setting("steps that are differentiated", least=1)
    totwindow: int = setting("steps of the longest training", least=1)
    minwindow: int = setting("fewest steps before the window", 0, least=0)
    cctype: Literal["random", "fixed"] = setting("where the window lies", "random")
    inner_lr: float = setting("learning rate of the inner Adam", above=0)
    batch_per_class: int = setting("synthetic images per class and inner step", least=1)
    task_sampler_nc: int = setting("classes of an inner step (all)", least=1)
    learn_labels: bool = setting("learn labels as weights of the classes")
    lr_y: float = setting("learning rate of the labels (lr_img)", above=0)
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.dsa_strategy)  # raises if it does not know an operation

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("label_weights",) if self.learn_labels else ()

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """60000 iterations, lr_img 0.001 (Adam), the README's windows for data set and ipc.

        For digits 200 iterations of noise: lr_img 0.05, inner_lr 0.01, a window of 10 of up to
        30 steps; from ipc 10 on 150 of real images, 0.2, 0.003, 20 and 60. On a split of their
        training images noise had 88.6 % at ipc 1, real images 97.0 at ipc 10 (random selection
        95.0).
        """
        digits = dataset.name == "digits"
        mirrored = dataset.name in ("MNIST", "SVHN", "digits")
        found: Mapping[str, Any] = nearest(PUBLISHED, dataset, self.ipc)
        if digits:
            found = DIGITS[self.ipc >= 10]
        return {
            **super().published(dataset),
            "inner_lr": 1e-3,
            "init": "noise",
            "lr_img": 1e-3,
            "lr_y": 1e-3,
            "batch_per_class": 10,
            "task_sampler_nc": dataset.num_classes,
            "dsa_strategy": "rotate" if mirrored else "flip_rotate",
            "iterations": 60_000,
            **found,
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
            tensors["label_weights"] = hot.float()
        return tensors, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam."""
        groups = self.parameter_groups(tensors)
        if self.learn_labels:
            groups.append({"params": [tensors["label_weights"]], "lr": self.lr_y})
        return torch.optim.Adam(groups, self.lr_img)

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """With the labels, if they were learned."""
        images = {name: t for name, t in tensors.items() if name != "label_weights"}
        made = super().distilled(images, state)
        if "label_weights" in tensors:
            made["soft_labels"] = tensors["label_weights"].detach().float()
        return made


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: a window that the training does not hold; labels for images that are decoded;
            see `bilevel.check`.
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
    if config.learn_labels and config.parametrisation != "pixels":
        raise ValueError(
            f"learn_labels: labels belong to images, and the parametrisation is "
            f"{config.parametrisation!r}"
        )


def step(run: Run) -> Tensor:
    """One update of images and labels. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    made = run.decoded(0, run.dataset.num_classes)
    training, beside = _training(run, made)
    gradients, loss = bilevel.gradients(run, made, beside, training)
    clipped, norms = clip(run, gradients)
    run.update(clipped, bilevel.each_class(run, loss))
    if config.learn_labels:
        with torch.no_grad():
            run.tensors["label_weights"].clamp_(min=0)
    run.state = {**run.state, **norms}
    return bilevel.each_class(run, loss)


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
    random = run.generator("real batch")
    real = torch.randperm(len(run.dataset.train_labels), generator=random)[: config.batch_real]
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
        labels=beside.get("label_weights"),
        window=config.window,
    )
    return training, beside


def clip(run: Run, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the images with norms of at most twice their moving average, and these averages.

    The first norm is the first average.
    """
    clipped, norms = dict(gradients), {}
    for name, gradient in gradients.items():
        if name in run.config.beside:
            continue
        norm = gradient.norm()
        mean = run.state.get(f"norm.{name}", norm)
        most = MOST_OVER_MEAN * mean
        if norm > most:
            clipped[name] = gradient * (most / norm)
        norms[f"norm.{name}"] = NORM_DECAY * mean + (1 - NORM_DECAY) * norm
    return clipped, norms
