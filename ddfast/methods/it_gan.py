"""IT-GAN: a trained generator's latents, moved until its images are as informative as real ones.

Zhao and Bilen, Synthesizing Informative Training Samples with GAN, NeurIPS 2022 workshop (arXiv
2204.07513). A frozen class-conditional generator G, see `ddfast generator`, makes every image of
a latent z; there is one latent for a real image x_i, `ipc` of each class, found by inversion. Then
the latents are learned, with one augmentation omega_c for all images of a class, in fresh networks:

    L = sum_c |mean psi(A(x; omega_c)) - mean psi(A(G(z); omega_c))|^2
        + diversity sum_c mean_i |psi(A(G(z_i); omega_c)) - psi(A(x_i; omega_c))|^2

the first mean over a batch of real images of the class, the others over a batch of its latents and
the images they belong to. The second term keeps the images apart.

What is stored is a latent for an image, beside the generator: as many as there are real images in
the paper (50000 x 128 numbers for CIFAR-10), so a set of a few images is no compression. The
artefact holds the images; the latents stay in the run's checkpoint.

Unverified. The authors published the evaluation and helpers, not the training. Known from them are
one latent for an image, inversion as the start, its learning rate (0.1), that of the latents
(0.001), chunks of 500, mean embeddings in ConvNets with Siamese augmentation, a pairwise alignment
of features, and the evaluation. Not known are the form and weight of the second term, batch sizes,
number of iterations, optimiser, and from what networks the embedding is drawn (helpers load
snapshots of trained ones; here they are fresh, as in DM). All of these are choices of ours: take
results as those of a method in the style of IT-GAN.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.generator import check_generator, invert, load, normalised
from ddfast.losses import class_mean
from ddfast.methods import dm
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import dsa_strategy, setting
from ddfast.methods.feature_matching import (
    Group,
    RealBatch,
    at_once,
    check_memory,
    kept,
    mean_distance,
)
from ddfast.methods.run import Decoded, Interrupted, Run
from ddfast.nets import Network
from ddfast.random import generator

TITLE = "Synthesizing Informative Training Samples with GAN (Zhao and Bilen, 2022)"
MATCHES = "mean features, by the latents of a trained generator; in the style of IT-GAN"
PROTOCOL = "it_gan"
STATUS = (
    "as the paper's training is not published, its form here is unverified; "
    "verified step by step against a literal loop of that form"
)

CHUNK = 500
"""Latents that go through the generator at once, as published."""


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of IT-GAN, published where they are known."""

    generator: str = setting(
        "file from `ddfast generator`, or MODULE:FUNCTION that returns a module (required)",
        group="task",
    )
    momentum: float = setting("of no meaning: Adam has its own betas", 0.5, least=0, below=1)
    lr_img: float = setting("learning rate of the latents", above=0)
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    batch_latents: int = setting("latents of a class in a step, each with its image", 256, least=1)
    diversity: float = setting("weight of the distance between pairs (unverified)", 0.01, least=0)
    lr_inversion: float = setting("learning rate of the inversion (published)", 0.1, above=0)
    inversion_steps: int = setting("steps of the inversion", 500, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parametrisation not in (None, "pixels"):
            raise ValueError(
                f"parametrisation: got {self.parametrisation!r}, and IT-GAN has latents"
            )

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """lr_img (of the latents) 0.001; 5000 iterations, which are unverified.

        For digits 300 iterations with 0.01: on a split of their training images, at ipc 10, 94.9 %
        (with 0.001 93.5, with diversity 0 94.7, 0.1 93.7, 1 93.0; the inverted latents themselves
        92.7, random selection 93.6).
        """
        digits = dataset.name == "digits"
        return {
            **super().published(dataset),
            "iterations": 300 if digits else 5000,
            "init": "real",
            "lr_img": 1e-2 if digits else 1e-3,
            "dsa_strategy": dsa_strategy(dataset),
        }

    @property
    def rows(self) -> str:
        return "latents"

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Random latents; `prepare` puts those of real images in their place."""
        labels = torch.arange(dataset.num_classes).repeat_interleave(self.ipc)
        dim: Any = found(self.generator).latent_dim
        return {"latents": torch.randn(len(labels), dim, generator=generator)}, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam, unverified."""
        return torch.optim.Adam(self.parameter_groups(tensors), self.lr_img)


def found(name: str | None) -> torch.nn.Module:
    """The generator of that name, in evaluation mode on the CPU, its weights without gradients.

    Args:
        name: a file, or "module:function" of a function without arguments that returns any module
            which does what `ddfast.generator.check_generator` asks for.

    Raises:
        ValueError: none given, or none there.
        FileNotFoundError, ImportError: no such file, no such module.
    """
    if not name:
        raise ValueError(
            "generator: missing; make one with `ddfast generator`, or name MODULE:FUNCTION"
        )
    module, colon, function = name.partition(":")
    if not colon or Path(name).exists():
        return load(name)
    try:
        make = getattr(importlib.import_module(module), function)
    except AttributeError:
        raise ValueError(f"generator: {module} has no function {function!r}") from None
    made = make()
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"generator: {name} returned {type(made).__name__}, expected a module")
    return made.eval().requires_grad_(False)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step, and load the generator.

    Raises:
        ValueError: a generator of another data set or of other images; beyond the memory; a class
            with fewer images than `ipc`.
    """
    config = run.config
    assert isinstance(config, Config)
    network = found(config.generator).to(run.device, run.dtype)
    recipe = getattr(network, "recipe", None)
    if recipe is not None and tuple(recipe["class_names"]) != run.dataset.class_names:
        raise ValueError(
            f"generator: {config.generator} was trained on {recipe['dataset']} with other classes "
            f"than those of {run.dataset.name}"
        )
    check_generator(network, run.dataset)
    few = [c for c, count in enumerate(run.sampler.counts) if count < config.ipc]
    if few:
        raise ValueError(
            f"ipc: got {config.ipc}, one real image for each latent, and class {few[0]} "
            f"({run.dataset.class_names[few[0]]}) has {run.sampler.counts[few[0]]}"
        )
    check_memory(run, [min(count, config.batch_real) for count in run.sampler.counts])
    run.make = partial(images_of, network, run.dataset)


def images_of(
    network: torch.nn.Module, dataset: Dataset, leaves: Mapping[str, Tensor], labels: Tensor
) -> Tensor:
    """Normalised images of latents, by `network`."""
    latents = leaves["latents"]
    made = [
        network(some, of)
        for some, of in zip(latents.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    return normalised(torch.cat(made), dataset.mean, dataset.std)


def pairs(run: Run) -> Tensor:
    """Positions of the real images that the latents belong to, (num_classes * ipc,)."""
    random = generator(run.config.seed, "paired images")
    return torch.cat(
        [run.sampler.sample(c, run.config.ipc, random) for c in range(run.dataset.num_classes)]
    )


def prepare(run: Run) -> Iterator[str]:
    """Inversion, class by class: latents whose images come near the real ones."""
    config = run.config
    assert isinstance(config, Config)
    done = int(run.state.get("inverted", torch.zeros(())).item())
    places = pairs(run)
    for c in range(done, run.dataset.num_classes):
        here = run.of_classes(c, c + 1)
        assert isinstance(run.make, partial)
        result = invert(
            run.make.args[0],
            run.dataset.train_images[places[here]],
            run.labels[here].cpu(),
            steps=config.inversion_steps,
            lr=config.lr_inversion,
            mean=run.dataset.mean,
            std=run.dataset.std,
            seed=config.seed,
            chunk=CHUNK,
            memory=run.memory,
        )
        with torch.no_grad():
            run.tensors["latents"][here] = result.latents.to(run.device, run.dtype)
        run.state = {**run.state, "inverted": torch.tensor(c + 1)}
        yield (
            f"inverted class {c} ({run.dataset.class_names[c]}): mean squared error of pixels in "
            f"[-1, 1] {result.pixel_errors.mean():.4f}"
        )


def step(run: Run) -> Tensor:
    """One update of the latents of a batch. Returns the loss of each class, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    net = run.fresh_net().requires_grad_(False)
    real = dm.real_batch(run)
    count = min(config.batch_latents, config.ipc)
    random = run.generator("latents")
    chosen = torch.stack(
        [torch.randperm(config.ipc, generator=random)[:count] for _ in run.sampler.counts]
    )
    rows = (chosen + torch.arange(len(chosen)).unsqueeze(1) * config.ipc).flatten()
    paired = RealBatch(pairs(run)[rows], [count] * len(chosen), real.draw)
    gradient, losses = torch.zeros_like(run.tensors["latents"]), []
    together = max(1, at_once(run, net, True) // count)
    for first in range(0, len(chosen), together):
        end = min(first + together, len(chosen))
        here = rows[first * count : end * count].to(run.device)
        values, part = _matched(run, net, real, paired, here, first, end)
        gradient[here] = part
        losses.append(values)
        if run.stop:
            raise Interrupted
    result = torch.cat(losses)
    run.update({"latents": gradient}, result, step=partial(_step_of_rows, run, rows))
    return result


def _matched(
    run: Run,
    net: Network,
    real: RealBatch,
    paired: RealBatch,
    rows: Tensor,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor]:
    """Losses of classes first to end - 1, and their gradient by these rows of the latents."""
    config = run.config
    assert isinstance(config, Config) and run.make is not None
    leaf = run.tensors["latents"].detach()[rows].requires_grad_()
    labels = run.labels[rows]
    counts = [len(rows) // (end - first)] * (end - first)
    made = Decoded(
        (first, end), {"latents": leaf}, run.make({"latents": leaf}, labels), labels, counts
    )
    x = run.augment(made.images, real.draw[:, first:end], counts)

    passed = kept(run, net, x.detach())
    group = Group(run, net, first, end, made, passed.features, real)
    losses, by_features = mean_distance(
        class_mean(group.features, counts), group.real_means(), counts
    )
    if config.diversity:
        apart = group.features - replace(group, real=paired).real_rows()
        each = (apart * apart).sum(1).view(end - first, -1).mean(1)
        losses = losses + config.diversity * each
        by_features = by_features + (2 * config.diversity / counts[0]) * apart
    run.processed += len(x)
    return losses, torch.autograd.grad(x, leaf, passed.backward(by_features))[0]


def _step_of_rows(run: Run, rows: Tensor) -> None:
    """An optimiser step after which all other rows, and what it knows of them, are as before."""
    latents = run.tensors["latents"]
    others = torch.ones(len(latents), dtype=torch.bool)
    others[rows] = False
    moved = [latents, *_moments(run, latents)]
    before = [tensor.detach()[others].clone() for tensor in moved]
    run.optimiser.step()
    if not others.any():
        return
    after = [latents, *_moments(run, latents)]
    with torch.no_grad():
        for tensor, values in zip(after, before, strict=False):
            tensor[others] = values
        for tensor in after[len(before) :]:  # the optimiser's first step
            tensor[others] = 0


def _moments(run: Run, latents: Tensor) -> list[Tensor]:
    state = run.optimiser.state[latents]
    return [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
