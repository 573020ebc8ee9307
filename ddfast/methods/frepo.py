"""FRePo: kernel ridge regression on the features of a pool of networks in training.

Zhou, Nezhadarya and Ba, Dataset Distillation using Neural Feature Regression, NeurIPS 2022. With
phi the features of a network before its last layer, constant in this,

    K = phi(X) phi(X_s)',    P = K_ts (K_ss + reg tr(K_ss)/n I)^-1 Y_s
    loss = mean over real images of sum over classes of (P - Y_t)^2 / 2
           - mean over rows of min(margin of Y_s, 1/C)

where the margin of a row is its largest entry less the second largest: learned labels may not come
nearer to a tie. Y_t is one-hot - 1/C, and Y_s begins as that over sqrt(C / 10). With `use_flip`
every synthetic image counts mirrored as well. LAMB makes the step, with a learning rate that falls
along a cosine to a tenth. Then the network learns the synthetic set a little further, see
`ddfast.methods.network_pool`: all of it, or 1000 images drawn anew, with the same loss of its
outputs and without augmentation. Real images come in an order of their own for each epoch.

Images that were made in networks with batch normalisation, whose running statistics `phi` uses, are
evaluated in networks without any.

Unlike the official code: the set of the last iteration is kept, not the best one by the test set;
the reg of 1e-6 is offset by float32 rounding where support images are near duplicates, for which
`solve_dtype` "float64" and a larger `reg` are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.data.whitening import Recipe
from ddfast.kernel_matrix import empirical_nngp
from ddfast.losses import krr_loss
from ddfast.memory import FIRST_ORDER
from ddfast.methods import bilevel, network_pool, regression
from ddfast.methods.config import ZCA_HELP, convnet_of, setting
from ddfast.methods.optimisers import LAMB
from ddfast.methods.published_trajectories import family
from ddfast.methods.regression import LABELS
from ddfast.methods.run import Run
from ddfast.nets import Network

TITLE = "FRePo: Dataset Distillation using Neural Feature Regression (Zhou et al., NeurIPS 2022)"
MATCHES = "kernel ridge regression on features of networks in training"
PROTOCOL = "frepo"

SECOND_BETA = 0.999
LAST = 0.1  # of the learning rate, at the end
MOST_SUPPORT = 1000  # images of a network's step
DIGITS_MODEL = "FRePoNetD2W32"

NEVER_FLIPPED = {"CIFAR100": 10, "TinyImageNet": 10, "ImageNet1K": 1}
"""From so many images of a class on the published code does without mirrored ones."""


def flips(dataset: Dataset, ipc: int) -> bool:
    """Whether the published code uses mirrored images: of colour images, if they are few."""
    few = NEVER_FLIPPED.get(family(dataset))
    return dataset.channels == 3 and (few is None or ipc < few)


@dataclass(frozen=True, kw_only=True)
class Config(network_pool.Config):
    """Settings of FRePo, by default the official script's."""

    model: str = setting("network (published: FRePoNet, one block more for each doubling)")
    batch_real: int = setting("real images, of all classes", 1024, aliases=("batch_size",), least=1)
    momentum: float = setting("of the synthetic images: LAMB's first beta", 0.9, least=0, below=1)
    reg: float = setting("ridge, in units of the kernel's mean diagonal element", 1e-6, least=0)
    learn_labels: bool = setting("learn the labels, too", True, aliases=("learn_label",))
    lr_y: float = setting("learning rate of the labels (lr_img)", above=0)
    use_flip: bool = setting("count every image mirrored as well")
    zca: Recipe = setting(ZCA_HELP)
    precision: Literal["float32", "bfloat16"] = setting("of the features", "float32")
    solve_dtype: Literal["float32", "float64"] = setting("of the regression", "float32")

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return (LABELS,) if self.learn_labels else ()

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """FRePoNet, 500000 iterations, lr_img 3e-4, real images.

        For digits 500 iterations with lr_img 0.01: on a split of their training images 90.8 % at
        ipc 1 (89.5 after 200).
        """
        digits = dataset.name == "digits"
        rate = 1e-2 if digits else 3e-4
        pixels = self.parametrisation in (None, "pixels")
        blocks = convnet_of(dataset.size).removeprefix("ConvNet")
        return {
            **super().published(dataset),
            "model": DIGITS_MODEL if digits else f"FRePoNet{blocks}",
            "init": "real",
            "iterations": 500 if digits else 500_000,
            "lr_img": rate,
            "lr_y": self.lr_img or rate,
            "use_flip": flips(dataset, self.ipc),
            "zca": regression.published_whitening(dataset, "frepo") if pixels else "none",
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images, and with `learn_labels` a label for each of their rows."""
        tensors, labels = super().starting_set(dataset, generator)
        if self.learn_labels:
            classes = dataset.num_classes
            tensors[LABELS] = scale_of(classes) * regression.centred(labels, classes)
        return tensors, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """LAMB, for each tensor by itself."""
        groups = self.parameter_groups(tensors)
        return LAMB(groups, self.lr_img, (self.momentum, SECOND_BETA))

    def parameter_groups(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        groups = super().parameter_groups(tensors)
        if self.learn_labels:
            groups.append({"params": [tensors[LABELS]], "lr": self.lr_y})
        return groups

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """With the labels, if they were learned."""
        return regression.with_labels(super().distilled, tensors, state)


def scale_of(classes: int) -> float:
    """By which centred labels are multiplied at first."""
    return 1 / math.sqrt(classes / 10)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: a single class; a memory that holds not all images of a network's step.
    """
    if run.dataset.num_classes < 2:
        raise ValueError(f"dataset: {run.dataset.name} has one class, and a margin needs two")
    images = min(run.decoded_per_class * run.dataset.num_classes, MOST_SUPPORT)
    fitting = run.at_once(FIRST_ORDER)
    if fitting < images:
        raise ValueError(
            f"memory: networks of the pool learn {images} images at once, and {run.memory} bytes "
            f"hold {fitting}; {math.ceil(images * FIRST_ORDER * run.activations)} would do"
        )


def step(run: Run) -> Tensor:
    """One update of images and labels, and one of a network. Returns the loss for each class."""
    config = run.config
    assert isinstance(config, Config)
    state, slot = network_pool.begin(run)
    net = network_pool.load(run, state, slot)
    real = bilevel.in_turn(run, config.batch_real)
    targets = run.dataset.train_labels[real].to(run.device)
    y_t = regression.centred(targets, run.dataset.num_classes, run.dtype)
    made, beside = run.decoded(0, run.dataset.num_classes), bilevel.leaves_beside(run)
    leaf = made.images.detach().requires_grad_()
    x, y = leaf, regression.labels_of(run, made, beside, scale_of(run.dataset.num_classes))
    margins = margin(y)
    if config.use_flip:
        x, y = torch.cat([x, x.flip(3)]), torch.cat([y, y])
    k_ss, k_ts = empirical_nngp(
        x,
        run.real(real),
        lambda number: net,
        1,
        weight_var=1.0,
        bias_var=0.0,
        normalise=False,
        precision=regression.precision(config.precision),
        memory=run.memory,
    )
    predicted = krr_loss(
        *(k_ss, k_ts, y, y_t, config.reg),
        solve_dtype=regression.solve_dtype(config.solve_dtype, run),
        reduction="class_sum",
    )
    found = regression.gradients(run, made, beside, leaf, predicted - margins)
    run.processed += len(x) + len(real)
    fresh = config.parameter_groups(run.tensors)
    for group, first in zip(run.optimiser.param_groups, fresh, strict=True):
        group["lr"] = first["lr"] * cosine(run.iteration, config.iterations)
    losses = regression.repeated(run, predicted - margins)
    run.update(found, losses, f" with network {slot} of the pool")
    network_pool.update(run, state, slot, lambda network: _online_loss(run, network))
    run.state = state
    return losses


def margin(labels: Tensor) -> Tensor:
    """The mean over rows of min(largest - second largest entry, 1/C), 0-d."""
    largest = labels.topk(2, 1).values
    return (largest[:, 0] - largest[:, 1]).clamp(max=1 / labels.shape[1]).mean()


def cosine(done: float, whole: float, last: float = LAST) -> float:
    """The share of a learning rate after a part of the whole: from 1 down to the last one."""
    return last + (1 - last) * (1 + math.cos(math.pi * done / whole)) / 2


def _online_loss(run: Run, net: Network) -> Tensor:
    """Of a network's outputs for the set as it is, or for some of its images."""
    made = run.decoded(0, run.dataset.num_classes)
    beside = {name: run.tensors[name].detach() for name in run.config.beside}
    y = regression.labels_of(run, made, beside, scale_of(run.dataset.num_classes))
    x = made.images.detach()
    if len(x) > MOST_SUPPORT:
        chosen = torch.randperm(len(x), generator=run.generator("pool images"))[:MOST_SUPPORT]
        x, y = x[chosen.to(x.device)], y[chosen.to(x.device)]
    run.processed += len(x)
    return (net(x) - y).square().sum(1).mean() / 2
