"""A generator and a discriminator, and one step of their game.

Hinge losses (Lim and Ye 2017; Miyato et al., ICLR 2018), Adam, and the average of the generator's
weights over the run, as BigGAN has them. The discriminator sees real and generated images through
differentiable augmentation (Zhao et al., NeurIPS 2020; here DSA, an operation and parameters of its
own for each image), without which it soon knows a small data set by heart.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast.augment import DSA
from ddfast.data import Dataset, normalise
from ddfast.generator.interface import normalised
from ddfast.generator.network import (
    Discriminator,
    Generator,
    default_latent_dim,
    default_width,
    folded,
)
from ddfast.methods import Diverged
from ddfast.methods.config import Task, dsa_strategy, filled, setting
from ddfast.random import generator as make_generator

__all__ = ["Config", "Training", "finished", "resolve", "restore", "start", "state_of", "step"]

STANDING_BATCHES = 50  # over which the final batch statistics are averaged
BETAS = (0.0, 0.9)
NETWORKS = ("generator", "discriminator", "average")


@dataclass(frozen=True, kw_only=True)
class Config(Task):
    """Settings of the training of a generator."""

    iterations: int = setting("steps of the generator", least=1)
    batch: int = setting("real images a step, and as many generated ones", 64, least=2)
    latent_dim: int = setting("numbers in a latent", aliases=("dim_z",), least=1)
    width: int = setting("channels of the generator's last block", aliases=("G_ch",), least=1)
    width_discriminator: int = setting(
        "channels of the discriminator's first block", aliases=("D_ch",), least=1
    )
    lr_generator: float = setting("its learning rate", 5e-4, aliases=("G_lr",), above=0)
    lr_discriminator: float = setting("its learning rate", 1e-3, aliases=("D_lr",), above=0)
    steps_discriminator: int = setting(
        "steps of the discriminator for one of the generator", 1, aliases=("num_D_steps",), least=1
    )
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    average: float = setting(
        "decay of the average of the generator's weights", 0.999, aliases=("ema",), least=0, below=1
    )

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """From 28 pixels on 50000 iterations, latents of 128 and width 64, BigGAN's; nobody has
        measured that here. Below 28 pixels what one core does in 2 to 3 minutes: 2500
        iterations, latents of 64 and width 16; below 16 pixels 2000, 32 and 32. Those, and all that
        does not depend on the size, were chosen on splits of the training images of digits and of
        generated 16x16 ones.
        """
        size, small = dataset.size, min(dataset.size)
        return {
            "iterations": 50000 if small >= 28 else 2500 if small >= 16 else 2000,
            "latent_dim": default_latent_dim(size),
            "width": default_width(size),
            "width_discriminator": default_width(size),
            "dsa_strategy": dsa_strategy(dataset),
        }


resolve = filled


@dataclass
class Training:
    """The state of a run. A checkpoint saves the networks and the optimisers' state."""

    config: Config
    dataset: Dataset
    augment: DSA
    generator: Generator
    discriminator: Discriminator
    average: Generator
    optimisers: dict[str, torch.optim.Optimizer]
    device: torch.device
    iteration: int = 0
    stop: bool = field(default=False, repr=False)

    def random(self, purpose: str, *step: int) -> torch.Generator:
        return make_generator(self.config.seed, f"generator: {purpose}", *step)

    def labels(self, *step: int) -> Tensor:
        """Of a generated batch: as frequent as in the data set."""
        labels = self.dataset.train_labels
        random = self.random("labels", *step)
        chosen = torch.randint(len(labels), (self.config.batch,), generator=random)
        return labels[chosen].to(self.device)

    def latents(self, *step: int) -> Tensor:
        shape = (self.config.batch, self.config.latent_dim)
        return torch.randn(shape, generator=self.random("latents", *step)).to(self.device)

    def real(self, *step: int) -> tuple[Tensor, Tensor]:
        """A normalised batch of training images, and their labels."""
        data, random = self.dataset, self.random("real images", *step)
        chosen = torch.randint(len(data.train_labels), (self.config.batch,), generator=random)
        images = data.train_images[chosen].to(self.device)
        return normalise(images, data.mean, data.std), data.train_labels[chosen].to(self.device)

    def seen(self, images: Tensor, *step: int) -> Tensor:
        """Normalised images as the discriminator sees them."""
        random = self.random("augmentation", *step)
        draw = self.augment.draw(random, self.dataset.size, count=len(images), independent=True)
        return self.augment(images, draw)


def start(config: Config, dataset: Dataset, device: torch.device) -> Training:
    """A run at iteration 0, from a resolved config."""

    def random(purpose: str) -> torch.Generator:
        return make_generator(config.seed, f"generator: {purpose}")

    shape = (dataset.num_classes, dataset.channels, dataset.size)
    generator = Generator(
        *shape, config.latent_dim, config.width, random("weights of the generator")
    ).to(device)
    discriminator = Discriminator(
        *shape, config.width_discriminator, random("weights of the discriminator")
    ).to(device)
    return Training(
        config=config,
        dataset=dataset,
        augment=DSA(config.dsa_strategy),
        generator=generator.train(),
        discriminator=discriminator.train(),
        average=copy.deepcopy(generator).requires_grad_(False),
        optimisers={
            name: torch.optim.Adam(net.parameters(), lr, BETAS, fused=True)
            for name, net, lr in (
                ("generator", generator, config.lr_generator),
                ("discriminator", discriminator, config.lr_discriminator),
            )
        },
        device=device,
    )


def step(run: Training) -> tuple[float, float]:
    """One step of the generator, after those of the discriminator.

    Returns:
        The hinge losses of the discriminator (2 while it tells nothing apart) and the generator.

    Raises:
        Diverged: a loss or a gradient is not finite.
    """
    data, here = run.dataset, run.iteration
    for k in range(run.config.steps_discriminator):
        real, real_labels = run.real(here, k)
        labels = run.labels(here, k)
        with torch.no_grad():
            fake = run.generator(run.latents(here, k), labels)
        images = run.seen(torch.cat([real, normalised(fake, data.mean, data.std)]), here, k)
        scores = run.discriminator(images, torch.cat([real_labels, labels]))
        told = scores.split([len(real), len(fake)])
        loss = F.relu(1 - told[0]).mean() + F.relu(1 + told[1]).mean()
        _update(run, "discriminator", loss)
    k = run.config.steps_discriminator
    labels = run.labels(here, k)
    fake = normalised(run.generator(run.latents(here, k), labels), data.mean, data.std)
    deceived = -run.discriminator(run.seen(fake, here, k), labels).mean()
    _update(run, "generator", deceived)
    # At the beginning the average forgets faster: the first weights are worth nothing.
    decay = min(run.config.average, (1 + here) / (10 + here))
    with torch.no_grad():
        for kept, current in zip(run.average.parameters(), run.generator.parameters(), strict=True):
            kept.lerp_(current, 1 - decay)
    return loss.item(), deceived.item()


def _update(run: Training, which: str, loss: Tensor) -> None:
    """One step of an optimiser, unless something is not finite."""
    parameters = list(getattr(run, which).parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).sum()
    if not torch.isfinite(loss + norm):
        what = "gradient" if torch.isfinite(loss) else "loss"
        lr = f"lr_{which}"
        raise Diverged(
            f"the {what} of the {which} is not finite at iteration {run.iteration}; a smaller "
            f"{lr} (now {getattr(run.config, lr):g}) may help"
        )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.contiguous()  # the fused step wants the parameter's strides
    run.optimisers[which].step()
    run.optimisers[which].zero_grad()


def finished(run: Training) -> Generator:
    """The averaged generator, with batch statistics of its own, in evaluation mode.

    The statistics that were gathered on the way belong to other weights: these are the mean over
    batches of the final ones, in BigGAN's words standing statistics.
    """
    generator = folded(run.average).train()
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    with torch.no_grad():
        for number in range(STANDING_BATCHES):
            generator(run.latents(-1, number), run.labels(-1, number))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return generator.eval().requires_grad_(False)


def state_of(run: Training) -> dict[str, Tensor]:
    """Everything that changes in the course of a run, but for the number of the iteration."""
    state = {
        f"{name}/{key}": tensor
        for name in NETWORKS
        for key, tensor in getattr(run, name).state_dict().items()
    }
    for name, optimiser in run.optimisers.items():
        for index, values in optimiser.state_dict()["state"].items():
            state |= {f"optimiser of {name}/{index}/{key}": v for key, v in values.items()}
    return state


def restore(run: Training, state: dict[str, Tensor]) -> None:
    """Take up what `state_of` returned."""
    for name in NETWORKS:
        start = f"{name}/"
        weights = {key[len(start) :]: t for key, t in state.items() if key.startswith(start)}
        getattr(run, name).load_state_dict(weights)
    for name, optimiser in run.optimisers.items():
        values: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key.startswith(f"optimiser of {name}/"):
                _, index, which = key.split("/")
                values.setdefault(int(index), {})[which] = tensor
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": values, "param_groups": groups})
