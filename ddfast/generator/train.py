"""Training a generator, from a data set to a file: `ddfast generator`."""

from __future__ import annotations

import os
from typing import Any

import torch

from ddfast._version import __version__
from ddfast.data import Dataset
from ddfast.distill import folder
from ddfast.distill.process import deterministic, say, signals, usable_device
from ddfast.distill.resumable import Resumable
from ddfast.generator.adversarial import (
    Config,
    Training,
    finished,
    resolve,
    restore,
    start,
    state_of,
    step,
)
from ddfast.generator.file import load, save
from ddfast.generator.network import Generator
from ddfast.methods import Interrupted
from ddfast.methods.config import as_json
from ddfast.synthetic import grid

__all__ = ["GENERATOR", "SAMPLES", "Config", "train"]

GENERATOR = "generator.safetensors"
SAMPLES = "samples.png"
SAMPLES_A_CLASS = 10
SAMPLED_CLASSES = 20
PICTURES = 5  # in the course of a run


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


class _Loop(Resumable):
    """A training of a generator."""

    run: Training

    def finish(self) -> None:
        """Iterate to the end; write the generator and the picture."""
        run, iterations = self.run, self.run.config.iterations
        with self.under_way(f"generator {run.dataset.name}") as bar:
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

    def state(self) -> dict[str, torch.Tensor]:
        return state_of(self.run)

    def take_up(self, tensors: dict[str, torch.Tensor]) -> None:
        restore(self.run, tensors)
