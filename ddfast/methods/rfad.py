"""RFAD: kernel ridge regression with the features of fresh random networks.

Loo, Hasani, Amini and Rus, Efficient Dataset Distillation using Random Feature Approximation,
NeurIPS 2022. In every iteration the NNGP kernel of an infinitely wide ConvNet is estimated with
`n_models` networks drawn anew (`ddfast.kernel_matrix.empirical_nngp`), and real images are
predicted from the synthetic ones, X_s, with labels Y_s = one-hot - 1/C:

    P = K_ts (K_ss + jit tr(K_ss)/n I)^-1 Y_s,    loss: mean cross-entropy of e^k P ("platt")
                                                  or mean of (P - Y_t)^2 / 2 ("mse")

with a learned k, 0 at first. AdaBelief makes a step on X_s, on k, with `learn_labels` on Y_s, and,
with `transform`, on a matrix T of as many rows and columns as an image has pixels, the identity at
first, by which all images are multiplied before they are used: what is distilled is X_s T.

Every 40 iterations and at the end the same loss is measured with 16 networks and 500 training
images a class (100 from 100 classes on) that stay the same; the set with the smallest one is what
the run returns, and `patience` iterations without a smaller one end it.

The images are meant for kernel regression (protocol "krr") and for wide networks without
normalisation trained as "rfad" says; networks of other kinds gain little from them.

Unlike the official code: the images that are measured do not go through a last layer of 4096
random units; grey images of 28 pixels are padded as elsewhere in ddfast. Colour images are whitened
as published (`zca`), and stay so in the artefact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast import nets
from ddfast.data import Dataset
from ddfast.data.whitening import Recipe
from ddfast.kernel_matrix import empirical_nngp
from ddfast.losses import krr_loss
from ddfast.memory import FIRST_ORDER
from ddfast.methods import bilevel, regression
from ddfast.methods.config import ZCA_HELP, convnet_of, setting
from ddfast.methods.config import Config as Shared
from ddfast.methods.optimisers import AdaBelief
from ddfast.methods.regression import LABELS
from ddfast.methods.run import Run, refuse_batchnorm
from ddfast.random import generator

TITLE = "RFAD: Efficient Dataset Distillation using Random Feature Approximation (NeurIPS 2022)"
MATCHES = "kernel ridge regression on features of random networks"
PROTOCOL = "rfad"

TRANSFORM, PLATT = "transform", "platt"
SECOND_BETA, EPS = 0.999, 1e-16
EVERY, JUDGES = 40, 16  # iterations between two measurements; networks that measure
PER_CLASS, PER_CLASS_OF_MANY, MANY = 500, 100, 100  # images that are measured
BEST = "best."  # in `Run.state`, before the names of what was learned at the smallest loss
RECORD = "best"  # (2,) float64: the loss, and after how many iterations
DIGITS_MODEL = "ConvNetD2W32NN"

Networks = Callable[[int], nets.Network]


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of RFAD, by default the official script's."""

    model: str = setting("network (published: ConvNet of width 256 without normalisation)")
    batch_real: int = setting("real images, of all classes (4 batches of 1280)", 5120, least=1)
    momentum: float = setting("of the synthetic images: AdaBelief's beta", 0.9, least=0, below=1)
    n_models: int = setting("networks of an iteration", 8, least=1)
    reg: float = setting("ridge, in units of the kernel's mean", 5e-3, aliases=("jit",), least=0)
    loss: Literal["platt", "mse"] = setting("cross-entropy with a learned scale, or squares")
    lr_platt: float = setting("learning rate of the scale", 1e-2, above=0)
    transform: bool = setting("learn a matrix that all images are multiplied by")
    lr_transform: float = setting("its learning rate", 5e-5, above=0)
    learn_labels: bool = setting("learn the labels, too", False)
    patience: int = setting("iterations without a smaller loss that end the run", 1000, least=1)
    precision: Literal["float32", "bfloat16"] = setting("of the features", "float32")
    zca: Recipe = setting(ZCA_HELP)

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        there = {TRANSFORM: self.transform, PLATT: self.loss == "platt", LABELS: self.learn_labels}
        return tuple(name for name, wanted in there.items() if wanted)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """ConvNet of width 256 without normalisation, at most 100000 iterations, lr_img 0.001.

        For digits 400 iterations with lr_img 0.003: on a split of their training images 95.3 % at
        ipc 1 by kernel regression (random selection 63.2).
        """
        digits = dataset.name == "digits"
        pixels = self.parametrisation in (None, "pixels")
        return {
            **super().published(dataset),
            "model": DIGITS_MODEL if digits else f"{convnet_of(dataset.size)}W256NN",
            "init": "real",
            "iterations": 400 if digits else 100_000,
            "lr_img": 3e-3 if digits else 1e-3,
            "loss": "platt",
            "transform": pixels,
            "zca": regression.published_whitening(dataset, "rfad") if pixels else "none",
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images, and what is learned beside them; the scale in float64."""
        tensors, labels = super().starting_set(dataset, generator)
        if self.learn_labels:
            tensors[LABELS] = regression.centred(labels, dataset.num_classes)
        if self.transform:
            tensors[TRANSFORM] = torch.eye(dataset.channels * math.prod(dataset.size))
        if self.loss == "platt":
            tensors[PLATT] = torch.zeros((), dtype=torch.float64)
        return tensors, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """AdaBelief."""
        groups = self.parameter_groups(tensors)
        rates = {LABELS: self.lr_img, TRANSFORM: self.lr_transform, PLATT: self.lr_platt}
        groups += [{"params": [tensors[name]], "lr": rates[name]} for name in self.beside]
        return AdaBelief(groups, self.lr_img, (self.momentum, SECOND_BETA), EPS)

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """X_s T with the labels, if they were learned, at the smallest measured loss."""
        best = {name: state.get(BEST + name, tensor) for name, tensor in tensors.items()}
        aside = {name: best.pop(name) for name in (TRANSFORM, PLATT) if name in best}
        if TRANSFORM in aside:
            best["images"] = transformed(best["images"].detach(), aside[TRANSFORM].detach())
        return regression.with_labels(super().distilled, best, state)


def transformed(images: Tensor, matrix: Tensor) -> Tensor:
    """All images, as rows of pixels, times the matrix."""
    return (images.flatten(1) @ matrix).view(images.shape)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: batch normalisation; a transform of images that are stored otherwise than as
            pixels; a memory that holds no image.
    """
    refuse_batchnorm(run, "RFAD")
    config = run.config
    assert isinstance(config, Config)
    if config.transform and config.parametrisation != "pixels":
        raise ValueError(
            f"transform: got true with parametrisation {config.parametrisation}, whose images are "
            "made of other tensors; it is for pixels"
        )
    run.at_once(FIRST_ORDER)


def step(run: Run) -> Tensor:
    """One update, and from time to time a measurement. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    if run.iteration == 0:
        _measure(run, 0)
    random = run.generator("real images")
    real = torch.randperm(len(run.real_images), generator=random)[: config.batch_real]
    made, beside = run.decoded(0, run.dataset.num_classes), bilevel.leaves_beside(run)
    leaf = made.images.detach().requires_grad_()
    x = transformed(leaf, beside[TRANSFORM]) if TRANSFORM in beside else leaf
    labels = regression.labels_of(run, made, beside)
    networks = random_networks(run.net, config.seed, run.iteration)
    loss = loss_of(run, x, labels, real, networks, config.n_models, beside.get(PLATT))
    found = regression.gradients(run, made, beside, leaf, loss)
    run.processed += config.n_models * (len(x) + len(real))
    losses = regression.repeated(run, loss)
    run.update(found, losses)
    done = run.iteration + 1
    if done % EVERY == 0 or done == config.iterations:
        _measure(run, done)
    return losses


def random_networks(
    net: nets.Network, seed: int, *step: int, purpose: str = "random network"
) -> Networks:
    """Networks by their number: `net` with weights drawn from (seed, purpose, step, number)."""

    def network(number: int) -> nets.Network:
        nets.initialise_wide(net, generator(seed, purpose, *step, number))
        return net.eval()

    return network


def loss_of(
    run: Run,
    x: Tensor,
    labels: Tensor,
    real: Tensor,
    networks: Networks,
    count: int,
    scale: Tensor | None,
) -> Tensor:
    """The loss of predicting real images, with `count` networks; 0-d."""
    config = run.config
    assert isinstance(config, Config)
    targets = run.dataset.train_labels[real].to(run.device)
    k_ss, k_ts = empirical_nngp(
        x,
        run.real(real),
        networks,
        count,
        precision=regression.precision(config.precision),
        memory=run.memory,
    )
    if config.loss == "platt":
        return krr_loss(k_ss, k_ts, labels, targets, config.reg, "cross_entropy", scale)
    y_t = regression.centred(targets, run.dataset.num_classes, run.dtype)
    return krr_loss(k_ss, k_ts, labels, y_t, config.reg)


@torch.no_grad()
def _measure(run: Run, done: int) -> None:
    """Keep what is learned if its loss is the smallest yet; end the run if it has been long.

    Args:
        done: iterations.
    """
    config, state = run.config, dict(run.state)
    assert isinstance(config, Config)
    many = run.dataset.num_classes >= MANY
    each = PER_CLASS_OF_MANY if many else PER_CLASS
    random = generator(config.seed, "measured images")
    real = torch.cat(
        [
            run.sampler.sample(c, min(each, count), random)
            for c, count in enumerate(run.sampler.counts)
        ]
    )
    made = run.decoded(0, run.dataset.num_classes)
    x = made.images
    if config.transform:
        x = transformed(x, run.tensors[TRANSFORM])
    beside = {name: run.tensors[name].detach() for name in config.beside}
    labels = regression.labels_of(run, made, beside)
    networks = random_networks(run.net, config.seed, purpose="measuring network")
    loss = loss_of(run, x.detach(), labels, real, networks, JUDGES, beside.get(PLATT)).item()
    run.processed += JUDGES * (len(x) + len(real))
    best, at = state.get(RECORD, torch.tensor([math.inf, 0.0], dtype=torch.float64)).tolist()
    if loss < best:
        state[RECORD] = torch.tensor([loss, done], dtype=torch.float64)
        state |= {BEST + name: t.detach().clone() for name, t in run.tensors.items()}
    elif done - at > config.patience:
        run.say(
            f"after {done} iterations: the loss on the training images that measure it has not "
            f"been below its {best:.4g} of iteration {at:.0f}, whose images are kept"
        )
        run.finished = True
    run.state = state
