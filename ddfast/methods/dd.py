"""DD: images and step sizes by which a network learns the data in a few steps.

Wang, Zhu, Torralba and Efros, Dataset Distillation, arXiv 1811.10959. A network makes
T = `distill_steps` x `distill_epochs` steps of plain SGD, each on one of S = `distill_steps` groups
of images in a fixed order, each with a step size of its own:

    theta_{i+1} = theta_i - eta_i grad CE(theta_i; group i mod S)        eta_i = softplus(rho_i)

The loss is that of theta_T on real images, and Adam makes a step on the images and on rho. No
augmentation, no momentum, hard labels. The gradient is exact, as the official code's, but at the
memory of one step.

`ipc` counts all images of a class, S x `images_per_class_per_step`, and either of the two settings
may be left out. The first group has a class's first images in the order in which they are stored
(decoded, where one stored image makes several), the second group the next, and so on: an artefact,
whose `lr` holds the T step sizes, needs no more than S from its config to be trained on as it was
distilled. Shuffled and with a constant rate it is not the set that DD made.

`init_net` "random" draws a network anew in every iteration (the paper's unknown initialisation).
With "fixed" (known) it begins from the same weights in every iteration, and the set belongs to
these.

Networks are evaluated as they are used (protocol "dd"): from weights of the same distribution, or
for "fixed" and the same architecture from the same ones, by the set's own schedule. Random
selections and the full data, for which no schedule was learned, are trained by the protocol "dc".

Not as published: ConvNets in place of LeNet and of an AlexNet with local response normalisation,
for comparison with later methods; batch normalisation is refused. Distillation for networks that
were trained before and for attacks is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ddfast import nets
from ddfast.data import Dataset
from ddfast.methods import bilevel
from ddfast.methods.bilevel import Training, inverse_softplus, passes
from ddfast.methods.config import setting
from ddfast.methods.pretrained import flattened
from ddfast.methods.run import Run
from ddfast.random import generator
from ddfast.unroll import SGD

TITLE = "DD: Dataset Distillation (Wang et al., arXiv 2018)"
MATCHES = "the loss on real data after a few steps with learned step sizes"
PROTOCOL = "dd"

EPOCHS, DECAY_EPOCHS, DECAY = 400, 40, 0.5  # passes over the real data
SECOND_BETA = 0.999


@dataclass(frozen=True, kw_only=True)
class Config(bilevel.Config):
    """Settings of DD, by default the official script's."""

    beside: ClassVar[tuple[str, ...]] = ("lr",)

    batch_real: int = setting("real images of the outer loss, of all classes", 1024, least=1)
    momentum: float = setting("of the synthetic images: Adam's first beta", 0.5, least=0, below=1)
    distill_steps: int = setting("groups of images, one a step (10, or fewer for ipc)", least=1)
    images_per_class_per_step: int = setting(
        "images of a class in a group, in place of distill_steps: ipc over it",
        aliases=("distilled_images_per_class_per_step",),
        least=1,
    )
    distill_epochs: int = setting("how often the groups take turns", least=1)
    distill_lr: float = setting("step sizes at first (0.02; 0.001 for CIFAR)", above=0, below=1e6)
    init_net: Literal["random", "fixed"] = setting("the network's weights at first", "random")
    init_weights: Literal["xavier", "default"] = setting(
        "how they are drawn: normal by Glorot with zero biases, or torch's default", "xavier"
    )
    sample_n_nets: int = setting("networks whose gradients are averaged", 1, least=1)
    decay_iterations: int = setting("iterations after which lr_img is halved", least=1)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """400 passes over the real data, lr_img 0.01 (Adam, of step sizes too), halved every 40.

        For digits 300 iterations with distill_lr 0.1: 20 steps from noise with lr_img 0.02, from
        ipc 10 on 40 from real images with 0.05. On a split of their training images 84.0 % at ipc 1
        and 95.6 at ipc 10 (random selection 92.8). With 0.2 and 0.05 at ipc 1 the loss jumps
        up again and again (84.7 % after 200 iterations, 73.9 after 300).
        """
        digits = dataset.name == "digits"
        images = len(dataset.train_labels)
        steps = max(k for k in range(1, 11) if self.ipc % k == 0)
        if self.images_per_class_per_step is not None:
            steps = max(1, self.ipc // self.images_per_class_per_step)
        return {
            **super().published(dataset),
            "init": "real" if digits and self.ipc >= 10 else "noise",
            "lr_img": (0.05 if self.ipc >= 10 else 0.02) if digits else 0.01,
            "distill_steps": steps,
            "distill_epochs": (4 if self.ipc >= 10 else 20) if digits else 3,
            "distill_lr": 0.1 if digits else 0.001 if dataset.name.startswith("CIFAR") else 0.02,
            "iterations": 300 if digits else passes(images, self.batch_real, EPOCHS),
            "decay_iterations": 150 if digits else passes(images, self.batch_real, DECAY_EPOCHS),
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images, and what the step sizes are the softplus of."""
        tensors, labels = super().starting_set(dataset, generator)
        steps = self.distill_steps * self.distill_epochs
        return {**tensors, "lr": torch.full((steps,), inverse_softplus(self.distill_lr))}, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam over everything."""
        groups = self.parameter_groups(tensors)
        return torch.optim.Adam(groups, self.lr_img, (self.momentum, SECOND_BETA))

    def parameter_groups(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        own = {"params": [tensors["lr"]], "lr": self.lr_img}
        return [*super().parameter_groups(tensors), own]

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Also the step sizes."""
        images = {name: t for name, t in tensors.items() if name != "lr"}
        rates = torch.nn.functional.softplus(tensors["lr"].detach().double())
        return {**super().distilled(images, state), "lr": rates.tolist()}


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: images of a class that cannot be divided among the groups; see `bilevel.check`.
    """
    config = run.config
    assert isinstance(config, Config)
    of_step = config.images_per_class_per_step
    if of_step is not None and config.distill_steps * of_step != config.ipc:
        raise ValueError(
            f"images_per_class_per_step: got {of_step}, with {config.distill_steps} distill_steps "
            f"for {config.distill_steps * of_step} images per class, expected ipc, {config.ipc}"
        )
    if run.decoded_per_class % config.distill_steps:
        raise ValueError(
            f"distill_steps: got {config.distill_steps}, expected a divisor of the "
            f"{run.decoded_per_class} images of a class"
        )
    group = run.decoded_per_class // config.distill_steps * run.dataset.num_classes
    bilevel.check(run, "DD", group, config.distill_steps * config.distill_epochs, SGD())


def step(run: Run) -> Tensor:
    """One update of images and step sizes. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    groups = group_rows(run.decoded_per_class, run.dataset.num_classes, config.distill_steps)
    batches = [rows.to(run.device) for rows in groups] * config.distill_epochs
    real = bilevel.in_turn(run, config.batch_real)
    total, losses = run.no_gradients(), []
    for number in range(config.sample_n_nets):
        made = run.decoded(0, run.dataset.num_classes)
        beside = bilevel.leaves_beside(run)
        rates = torch.nn.functional.softplus(beside["lr"])
        training = Training(start(run, number), batches, rates, real)
        found, loss = bilevel.gradients(run, made, beside, training)
        for name, part in found.items():
            total[name] += part / config.sample_n_nets
        losses.append(loss)
    fresh = config.parameter_groups(run.tensors)
    for group, first in zip(run.optimiser.param_groups, fresh, strict=True):
        group["lr"] = first["lr"] * DECAY ** (run.iteration // config.decay_iterations)
    return bilevel.update(run, total, torch.stack(losses).mean(), training)


def start(run: Run, number: int) -> Tensor:
    """The weights that a student begins with."""
    config = run.config
    assert isinstance(config, Config)
    random = (
        run.generator("network", number)
        if config.init_net == "random"
        else fixed_network(config.seed, number)
    )
    draw_weights(run.net, random, config.init_weights)
    return flattened(run.net)


def fixed_network(seed: int, number: int) -> torch.Generator:
    """What the weights of a network are drawn from that is the same in every iteration."""
    return generator(seed, "fixed network", number)


def group_rows(count: int, classes: int, groups: int) -> list[Tensor]:
    """Positions of each group's images, of `count` a class that lie class after class."""
    rows = torch.arange(count * classes).view(classes, groups, count // groups)
    return [rows[:, group].flatten() for group in range(groups)]


@torch.no_grad()
def draw_weights(net: torch.nn.Module, random: torch.Generator, how: str) -> None:
    """Fresh weights, as `Config.init_weights` says."""
    nets.initialise(net, random)
    if how != "xavier":
        return
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            area = math.prod(module.weight.shape[2:])
            fans = area * (module.weight.shape[0] + module.weight.shape[1])
            drawn = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            module.weight.copy_(drawn.normal_(0, math.sqrt(2 / fans), generator=random))
            if module.bias is not None:
                module.bias.zero_()
