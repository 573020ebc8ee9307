"""Training a generator against a discriminator: `ddfast generator`.

Hinge losses (Lim and Ye 2017; Miyato et al., ICLR 2018), Adam, and the average of the generator's
weights over the run, as BigGAN has them. The discriminator sees real and generated images through
differentiable augmentation (Zhao et al., NeurIPS 2020; here DSA, an operation and parameters of its
own for each image), without which it soon knows a small data set by heart.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ddfast._version import __version__
from ddfast.augment import DSA
from ddfast.data import Dataset, canonical_name, names, normalise
from ddfast.distill import checkpoint, folder
from ddfast.distill.log import Log
from ddfast.distill.loop import SECONDS_BETWEEN, SHARE
from ddfast.distill.process import (
    clear,
    deterministic,
    say,
    signals,
    usable_device,
    warn_of_changes,
)
from ddfast.generator.file import load, save
from ddfast.generator.interface import normalised
from ddfast.generator.network import (
    Discriminator,
    Generator,
    default_latent_dim,
    default_width,
    folded,
)
from ddfast.methods import Diverged, Interrupted
from ddfast.methods.config import Settings, as_json, dsa_strategy, setting
from ddfast.random import generator as make_generator
from ddfast.synthetic import grid

__all__ = ["GENERATOR", "Config", "train"]

GENERATOR = "generator.safetensors"
SAMPLES = "samples.png"
SAMPLES_A_CLASS = 10
SAMPLED_CLASSES = 20
PICTURES = 5  # in the course of a run
STANDING_BATCHES = 50  # over which the final batch statistics are averaged
BETAS = (0.0, 0.9)


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the training of a generator."""

    dataset: str = setting("name of the data set, such as digits or CIFAR10", group="task")
    data_path: str = setting("folder that holds its files", group="task", identity=False)
    data_options: dict[str, Any] = setting(  # noqa: RUF009 a field, with a factory
        'options of its reader, such as {"classes": 5}', {}, group="task"
    )
    seed: int = setting("every random number of the run follows from it", 0, group="task")
    iterations: int = setting("steps of the generator", least=1)
    batch: int = setting("real images a step, and as many generated ones", 64, least=2)
    latent_dim: int = setting("numbers in a latent", aliases=("dim_z",), least=1)
    width: int = setting("channels of the generator's last block", aliases=("G_ch",), least=1)
    width_discriminator: int = setting(
        "channels of the discriminator's first block", aliases=("D_ch",), least=1
    )
    lr_generator: float = setting("its learning rate", 2e-4, aliases=("G_lr",), above=0)
    lr_discriminator: float = setting("its learning rate", 2e-4, aliases=("D_lr",), above=0)
    steps_discriminator: int = setting(
        "steps of the discriminator for one of the generator", 2, aliases=("num_D_steps",), least=1
    )
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    average: float = setting(
        "decay of the average of the generator's weights", 0.999, aliases=("ema",), least=0, below=1
    )

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """From 28 pixels on 128 latents and width 64 as BigGAN, and less below, chosen on splits of
        the training images of digits and of generated 16x16 images, as is all else."""
        size = dataset.size
        return {
            "iterations": 3000 if min(size) < 28 else 50000,
            "latent_dim": default_latent_dim(size),
            "width": default_width(size),
            "width_discriminator": default_width(size),
            "dsa_strategy": dsa_strategy(dataset),
        }


def resolve(config: Config, dataset: Dataset) -> Config:
    """The config with every field that was left out filled in.

    Raises:
        ValueError: the config names another data set.
    """
    known = dataset.name in names()  # others carry names of their own, such as a folder's
    if config.dataset is not None and known and canonical_name(config.dataset) != dataset.name:
        raise ValueError(
            f"dataset: the config says {config.dataset!r}, the data set given is {dataset.name!r}"
        )
    values = {"dataset": dataset.name, **config.published(dataset)}
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    if known:
        missing["dataset"] = dataset.name
    return replace(config, **missing)


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
        for kept, current in zip(
            run.average.parameters(), run.generator.parameters(), strict=True
        ):
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
        parameter.grad = gradient
    run.optimisers[which].step()
    run.optimisers[which].zero_grad()


def finished(run: Training) -> Generator:
    """The averaged generator, with batch statistics of its own, in evaluation mode.

    The statistics that were gathered on the way belong to other weights: these are the mean over
    batches of the final ones, in BigGAN's words standing statistics.
    """
    buffers = dict(run.generator.named_buffers())
    for name, buffer in run.average.named_buffers():
        buffer.copy_(buffers[name])
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


def train(
    dataset: Dataset,
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> Generator:
    """Train a generator of a data set's images, or go on with a run that was interrupted.

    `out` then holds `config.json`, `generator.safetensors`, `samples.png` (a row a class),
    `log.jsonl` and `checkpoint/`. A run that is called again with the same settings goes on from
    its last checkpoint and ends with the same bits as one that was never interrupted (same kind of
    machine, number of threads and versions); a finished one is read and returned.

    Args:
        dataset: only its training images are used.
        config: what is left out is filled in, see `Config.published`.
        out: the folder of the run, made if need be.
        device: None for the GPU if there is one, else the CPU.
        checkpoint_every: iterations between two checkpoints; None for about every 20 seconds.
        progress: show a bar and messages on stderr.

    Returns:
        The generator, as :func:`ddfast.generator.load` reads it.

    Raises:
        TypeError, ValueError: settings that cannot work, a folder with another run in it; before
            any work starts.
        OSError: the folder cannot be written, or another process is running in it.
        Diverged: a loss or gradient is no longer finite; the checkpoints before it are kept.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state has been saved.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config: got {type(config).__name__}, expected ddfast.generator.train.Config"
        )
    config = resolve(config, dataset)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: got {checkpoint_every}, expected at least 1")
    where = usable_device(device)
    run = start(config, dataset, where)
    out = folder.opened(out)
    with folder.locked(out):
        mine = folder.identity("generator", as_json(config), dataset)
        begun = folder.claim(out, mine)
        if begun and (out / GENERATOR).exists():
            say(progress, f"{out} is finished; nothing to do")
            return load(out / GENERATOR)
        folder.record(out, mine, config.data_path)
        settings = [f"{name} {value}" for name, value in mine["config"].items() if value != {}]
        say(progress, f"generator: {', '.join(settings)}")
        with deterministic(), signals(run):
            _Loop(run, out, mine, checkpoint_every, progress).finish()
        return load(out / GENERATOR)


class _Loop:
    """A run, its folder and its clock."""

    def __init__(
        self,
        run: Training,
        out: Path,
        mine: dict[str, Any],
        checkpoint_every: int | None,
        progress: bool,
    ) -> None:
        self.run, self.out, self.mine = run, out, mine
        self.every, self.progress = checkpoint_every, progress
        self.checkpoints = out / "checkpoint"
        self.checkpoints.mkdir(exist_ok=True)
        clear(out)
        clear(self.checkpoints)
        self.seconds_before = 0.0
        self.resume()
        self.started = self.saved = time.monotonic()
        self.cost = 0.0

    def finish(self) -> None:
        """Iterate to the end; write the generator and the picture."""
        run, iterations = self.run, self.run.config.iterations
        self.log = Log(self.out / "log.jsonl", run.iteration)
        bar = tqdm(
            total=iterations,
            initial=run.iteration,
            desc=f"generator {run.dataset.name}",
            unit="it",
            disable=not self.progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        try:
            while run.iteration < iterations:
                if run.iteration and run.iteration % max(1, iterations // PICTURES) == 0:
                    self.picture(finished(run))
                losses = step(run)
                self.log.write(
                    iteration=run.iteration,
                    discriminator=losses[0],
                    generator=losses[1],
                    seconds=round(self.seconds(), 3),
                )
                run.iteration += 1
                bar.set_postfix_str(f"D {losses[0]:.3f}, G {losses[1]:.3f}", refresh=False)
                bar.update()
                if self.due():
                    self.save()
                if run.stop and run.iteration < iterations:
                    raise Interrupted
            self.save()
        except KeyboardInterrupt:
            self.save()
            bar.close()
            say(
                self.progress,
                f"stopped and saved after {run.iteration} of {iterations} iterations; the same "
                "command again goes on from there",
            )
            raise
        finally:
            bar.close()
            self.log.close()
        generator = finished(run)
        self.picture(generator)
        save(generator, self.out / GENERATOR, self.recipe())

    def recipe(self) -> dict[str, Any]:
        """What the file says beside the weights."""
        data = self.run.dataset
        return {
            "dataset": data.name,
            "class_names": list(data.class_names),
            "mean": list(data.mean),
            "std": list(data.std),
            "fingerprint": self.mine["data"]["fingerprint"],
            "config": self.mine["config"],
            "versions": {"ddfast": __version__, "torch": str(torch.__version__)},
        }

    def picture(self, generator: Generator) -> None:
        run = self.run
        classes = min(run.dataset.num_classes, SAMPLED_CLASSES)
        labels = torch.arange(classes).repeat_interleave(SAMPLES_A_CLASS)
        shape = (len(labels), run.config.latent_dim)
        latents = torch.randn(shape, generator=run.random("samples")).to(run.device)
        images = generator(latents, labels.to(run.device))
        half = [0.5] * run.dataset.channels
        grid(images, labels, half, half, self.out / SAMPLES)

    def seconds(self) -> float:
        """Of the whole run, without the time between an interruption and the resume."""
        return self.seconds_before + time.monotonic() - self.started

    def due(self) -> bool:
        if self.every is not None:
            return self.run.iteration % self.every == 0
        return time.monotonic() - self.saved > max(SECONDS_BETWEEN, SHARE * self.cost)

    def save(self) -> None:
        """Write a checkpoint, after the log, which may be ahead of it but never behind."""
        begin = time.monotonic()
        self.log.flush()
        header = {
            "seconds": self.seconds(),
            "identity": self.mine,
            "made with": _conditions(self.run),
        }
        checkpoint.write(self.checkpoints, self.run.iteration, _state(self.run), header)
        self.saved = time.monotonic()
        self.cost = self.saved - begin

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        found = checkpoint.read_last(self.checkpoints)
        if found is None:
            return
        tensors, header = found
        if header["identity"] != self.mine:
            raise ValueError(
                f"checkpoint: {self.checkpoints} is not of this run; remove it to start the run "
                "anew"
            )
        _restore(self.run, tensors)
        self.run.iteration = header["iteration"]
        self.seconds_before = header["seconds"]
        say(self.progress, f"{self.out}: going on after {self.run.iteration} iterations")
        warn_of_changes(header["made with"], _conditions(self.run), 4)


NETWORKS = ("generator", "discriminator", "average")


def _state(run: Training) -> dict[str, Tensor]:
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


def _restore(run: Training, state: dict[str, Tensor]) -> None:
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


def _conditions(run: Training) -> dict[str, Any]:
    """Beside the identity, what the bits of the result depend on."""
    return {
        "device": run.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ddfast": __version__,
    }
