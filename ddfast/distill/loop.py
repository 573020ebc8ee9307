"""The loop every method runs in."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.data import Dataset
from ddfast.distill import checkpoint, folder
from ddfast.distill.checkpoint import STATE
from ddfast.distill.log import peak_memory
from ddfast.distill.process import deterministic, say, signals, usable_device
from ddfast.distill.resumable import Resumable
from ddfast.memory import DEFAULT, in_words, parse_memory
from ddfast.methods import Config, Diverged, Interrupted, Method, Run
from ddfast.methods.run import learned, restore

ARTEFACT = "distilled.safetensors"
"""The file in the folder of a run that holds the distilled set."""

LAST_GOOD = "last_good.safetensors"
PICTURES = 10  # in the course of a run


def distill(
    method: str,
    dataset: Dataset,
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    memory: int | str = DEFAULT,
    checkpoint_every: int | None = None,
    progress: bool = True,
) -> Artefact:
    """Distil a data set, or go on with a run that was interrupted.

    `out` then holds `config.json`, `distilled.safetensors`, `grid.png`, `log.jsonl` and
    `checkpoint/`. A run that is called again with the same settings goes on from its last
    checkpoint and ends with the same bits as one that was never interrupted (same kind of machine,
    number of threads, memory and versions); a finished one is read and returned.

    Args:
        method: one of `ddfast.methods.methods()`.
        dataset: only its training images are used.
        config: the method's `Config`; fields left out take the published values.
        out: the folder of the run, made if need be.
        device: None for the GPU if there is one, else the CPU.
        memory: bytes that activations may take, or words such as "8GiB". Work is cut into chunks
            that fit, which changes results by rounding only.
        checkpoint_every: iterations between two checkpoints; None for about every 20 seconds.
        progress: show a bar and messages on stderr.

    Raises:
        TypeError, ValueError: settings that cannot work, a folder with another run in it; before
            any work starts.
        OSError: the folder cannot be written, or another process is running in it.
        Diverged: a loss or image is no longer finite; the last good state is kept.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state has been saved.
    """
    known = methods.find(method)
    if not isinstance(config, known.config):
        raise TypeError(
            f"config: got {type(config).__module__}.{type(config).__qualname__}, expected "
            f"{known.config.__module__}.Config for method {known.name!r}"
        )
    config = methods.resolve(config, dataset)
    budget = parse_memory(memory)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: got {checkpoint_every}, expected at least 1")
    where = usable_device(device)
    out = folder.opened(out)
    with folder.locked(out):
        mine = folder.identity(known.name, methods.as_json(config), dataset)
        begun = folder.claim(out, mine)
        if begun and (out / ARTEFACT).exists():
            say(progress, f"{out} is finished; nothing to do")
            return Artefact.load(out / ARTEFACT)
        run = methods.start(config, dataset, budget, where)
        known.check(run)
        folder.record(out, mine, config.data_path)
        settings = [
            f"{name} {value}"
            for name, value in mine["config"].items()
            if value is not None and value != {}
        ]
        say(progress, f"{known.name}: {', '.join(settings)}")
        run.say = partial(say, progress)
        with deterministic(), signals(run):
            return _Loop(known, run, out, mine, checkpoint_every, progress).finish()


class _Loop(Resumable):
    """A run of a method."""

    run: Run

    def __init__(
        self,
        method: Method,
        run: Run,
        out: Path,
        mine: dict[str, Any],
        checkpoint_every: int | None,
        progress: bool,
    ) -> None:
        self.method = method
        super().__init__(run, out, mine, checkpoint_every, progress)

    def finish(self) -> Artefact:
        """Iterate to the end; write the artefact and the picture."""
        run, iterations = self.run, self.run.config.iterations
        title = f"{self.method.name} {run.dataset.name} ipc {run.config.ipc}"
        with self.under_way(title) as bar:
            self.prepare()
            while run.iteration < iterations and not run.finished:
                self.picture_if_due()
                losses = self.iterate()
                loss = losses.mean().item()
                peak = peak_memory(run.device)
                self.log.write(
                    iteration=run.iteration - 1,
                    loss=loss,
                    seconds=round(self.seconds(), 3),
                    peak_memory=peak,
                )
                rate = run.processed / (time.monotonic() - self.started)
                bar.set_postfix_str(
                    f"loss {loss:.4g}, {rate:.0f} images/s, peak {in_words(peak)}", refresh=False
                )
                bar.update()
                if self.due():
                    self.save()
                if run.stop and run.iteration < iterations and not run.finished:
                    raise Interrupted
        artefact = self.artefact()
        self.picture()
        artefact.save(self.out / ARTEFACT)
        return artefact

    def prepare(self) -> None:
        """What the method does before its first step, such as training networks."""
        for said in self.method.prepare(self.run):
            say(self.progress, said)
            if self.due(prepared=True):
                self.save()
            if self.run.stop:
                raise Interrupted

    def iterate(self) -> Tensor:
        """One step of the method; if it fails, the state is as before it, and saved."""
        run = self.run
        before = {name: tensor.clone() for name, tensor in learned(run).items()}
        kept = run.state  # a step puts a new mapping in its place
        try:
            losses = self.method.step(run)
        except BaseException as error:
            rolled_back = isinstance(error, Diverged) and error.rolled_back
            good = self.artefact() if rolled_back else None
            restore(run, before)
            run.state = kept
            if isinstance(error, KeyboardInterrupt):
                raise
            self.save()
            if not isinstance(error, Diverged):
                raise
            (good or self.artefact()).save(self.out / LAST_GOOD)
            raise Diverged(
                f"{error}. The images after {run.iteration} iterations are in "
                f"{self.out / LAST_GOOD}"
            ) from None
        run.iteration += 1
        return losses

    def state(self) -> dict[str, Tensor]:
        kept = {STATE + name: tensor for name, tensor in self.run.state.items()}
        return learned(self.run) | kept

    def misfit(self, tensors: dict[str, Tensor]) -> str:
        for name, tensor in self.run.tensors.items():
            shape = tuple(tensors[name].shape) if name in tensors else "nothing"
            if shape != tuple(tensor.shape):
                return f"{name} has shape {shape}, expected {tuple(tensor.shape)}"
        return ""

    def take_up(self, tensors: dict[str, Tensor]) -> None:
        restore(self.run, tensors)
        self.run.state = {
            name: tensor.to(self.run.device)
            for name, tensor in checkpoint.state_of(tensors).items()
        }

    def conditions(self) -> dict[str, Any]:
        return {**super().conditions(), "memory": self.run.memory}

    def artefact(self) -> Artefact:
        run, data = self.run, self.run.dataset
        made: dict[str, Any] = (
            {"images": run.training_set()[0].float()}
            if run.make is not None
            else run.config.distilled(run.tensors, run.state)
        )
        return Artefact(
            **made,
            labels=run.labels,
            space=run.config.space,
            decoder=run.decoder,
            mean=data.mean,
            std=data.std,
            whitening=data.whitening,
            class_names=data.class_names,
            dataset=data.name,
            method=self.method.name,
            config=self.mine["config"],
            seed=run.config.seed,
        )

    def picture_if_due(self) -> None:
        step = max(1, self.run.config.iterations // PICTURES)
        if self.run.iteration % step == 0:
            self.picture()

    def picture(self) -> None:
        self.artefact().picture(self.out / "grid.png")
