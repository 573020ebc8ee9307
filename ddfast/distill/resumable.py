"""What every long run does: it keeps a log and checkpoints, and goes on where it was stopped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddfast._version import __version__
from ddfast.distill import checkpoint
from ddfast.distill.log import Log
from ddfast.distill.process import clear, say, warn_of_changes

# Without checkpoint_every, a checkpoint follows when as many seconds have passed, and a hundred
# times as long as the last one took to write: less than 1 % of the time goes into them.
SECONDS_BETWEEN = 20.0
SHARE = 100.0


class Resumable:
    """A run, its folder and its clock. Subclasses say what a checkpoint holds.

    Args:
        run: with `iteration`, `device`, and `config.iterations`.
        out: its folder.
        mine: its identity, plain values: a checkpoint of another one is refused.
        every: iterations between two checkpoints; None for about every 20 seconds.
        progress: show a bar and messages on stderr.

    Raises:
        ValueError: a checkpoint that is not of this run.
    """

    def __init__(
        self, run: Any, out: Path, mine: dict[str, Any], every: int | None, progress: bool
    ) -> None:
        self.run, self.out, self.mine = run, out, mine
        self.every, self.progress = every, progress
        self.checkpoints = out / "checkpoint"
        self.checkpoints.mkdir(exist_ok=True)
        clear(out)
        clear(self.checkpoints)
        self.seconds_before = 0.0
        self.resume()
        self.started = self.saved = time.monotonic()
        self.cost = 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything that changes in the course of a run, but for the number of the iteration."""
        raise NotImplementedError

    def take_up(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        raise NotImplementedError

    def misfit(self, tensors: dict[str, Tensor]) -> str:
        """What in a checkpoint of this identity is not of this run; empty for nothing."""
        return ""

    def conditions(self) -> dict[str, Any]:
        """Beside the identity, what the bits of the result depend on."""
        return {
            "device": self.run.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "ddfast": __version__,
        }

    @contextlib.contextmanager
    def under_way(self, title: str) -> Iterator[tqdm]:
        """The progress bar; the run is saved when the block ends, and when it is interrupted."""
        run, iterations = self.run, self.run.config.iterations
        self.log = Log(self.out / "log.jsonl", run.iteration)
        bar = tqdm(
            total=iterations,
            initial=run.iteration,
            desc=title,
            unit="it",
            disable=not self.progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        try:
            yield bar
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

    def seconds(self) -> float:
        """Of the whole run, without the time between an interruption and the resume."""
        return self.seconds_before + time.monotonic() - self.started

    def due(self, prepared: bool = False) -> bool:
        """Whether it is time for a checkpoint; `prepared`: between two iterations it is not."""
        if self.every is not None and not prepared:
            return bool(self.run.iteration % self.every == 0)
        return time.monotonic() - self.saved > max(SECONDS_BETWEEN, SHARE * self.cost)

    def save(self) -> None:
        """Write a checkpoint, after the log, which may be ahead of it but never behind."""
        begin = time.monotonic()
        self.log.flush()
        header = {
            "seconds": self.seconds(),
            "identity": self.mine,
            "made with": self.conditions(),
        }
        checkpoint.write(self.checkpoints, self.run.iteration, self.state(), header)
        self.saved = time.monotonic()
        self.cost = self.saved - begin

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        found = checkpoint.read_last(self.checkpoints)
        if found is None:
            return
        tensors, header = found
        other = "" if header["identity"] == self.mine else "it is of other settings"
        other = self.misfit(tensors) or other
        if other:
            raise ValueError(
                f"checkpoint: {self.checkpoints} is not of this run ({other}); remove it to start "
                "the run anew"
            )
        self.take_up(tensors)
        self.run.iteration = header["iteration"]
        self.seconds_before = header["seconds"]
        say(self.progress, f"{self.out}: going on after {self.run.iteration} iterations")
        warn_of_changes(header["made with"], self.conditions(), 5)
