"""FTD: MTT with experts that end in flat regions, and a running average of the images.

Du, Jiang, Tan, Zhou and Li, Minimizing the Accumulated Trajectory Error to Improve Dataset
Distillation, CVPR 2023 (arXiv 2211.11004). The student and its update are MTT's. Experts are
trained by GSAM: `ddfast experts --optimiser gsam --alpha A`, by the paper's table with A 0.3 for
CIFAR-10 at ipc 1 and 10 and 1 elsewhere. What the artefact holds is

    average <- d average + (1 - d) images,   d = `ema_decay`

after each update, from the first images on. With the published 0.9999 and 5000 iterations these
still are 61 % of it.

The released code evaluates the average on networks that it has just trained on the images
themselves; here, as always, on fresh ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddfast.data import Dataset
from ddfast.methods import mtt, trajectory_matching
from ddfast.methods.config import setting
from ddfast.methods.published_trajectories import Published, Table, nearest
from ddfast.methods.run import Run
from ddfast.methods.trajectory_matching import advance, check_trajectories, say_of_training

TITLE = "Minimizing the Accumulated Trajectory Error (Du et al., CVPR 2023)"
MATCHES = "MTT's, with experts trained to flat minima; keeps a running average of the images"
PROTOCOL = "mtt"

TABLE: Table = {
    "CIFAR10": {
        1: Published(50, 2, 2, 0, 1e2, 1e-7, 1e-2),
        10: Published(30, 2, 20, 0, 1e2, 1e-5, 1e-3),
        50: Published(30, 2, 40, 0, 1e3, 1e-5, 1e-2),
    },
    "CIFAR100": {
        1: Published(40, 3, 20, 0, 1e3, 1e-5, 1e-2),
        10: Published(20, 2, 40, 0, 1e3, 1e-5, 1e-2),
        50: Published(80, 2, 40, 1000, 1e3, 1e-5, 1e-2),
    },
    "TinyImageNet": {
        1: Published(30, 2, 10, 0, 1e4, 1e-4, 1e-2),
        10: Published(20, 2, 40, 500, 1e4, 1e-4, 1e-2),
    },
}

DECAY = {
    "CIFAR10": {1: 0.9999, 10: 0.9995, 50: 0.999},
    "CIFAR100": {1: 0.9995, 10: 0.9995, 50: 0.999},
    "TinyImageNet": {1: 0.999, 10: 0.999},
}

AVERAGE = "average."
"""Before the names of what images are made of, in `Run.state`."""


@dataclass(frozen=True, kw_only=True)
class Config(trajectory_matching.Config):
    """Settings of FTD, by default the published ones."""

    ema_decay: float = setting("what the average keeps of itself at each update", least=0, below=1)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """5000 iterations; the rest by data set and ipc, for those that no paper has by what is
        nearest: syn_steps 20 to 80, lr_img 100 to 10000, ema_decay 0.999 to 0.9999.

        For digits MTT's, with ema_decay 0.98.
        """
        return {
            **super().published(dataset),
            "iterations": 5000,
            "ema_decay": nearest(DECAY, dataset, self.ipc),
            **nearest(TABLE, dataset, self.ipc)._asdict(),
            **(DIGITS[self.ipc >= 10] if dataset.name == "digits" else {}),
        }

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The average, in place of the images."""
        kept = {n: state.get(AVERAGE + n, tensor) for n, tensor in tensors.items()}
        return super().distilled(kept, state)


DIGITS = tuple({**each, "ema_decay": 0.98} for each in mtt.DIGITS)
"""MTT's, and an average over the last of so few iterations. On a split of the training images, with
experts by GSAM, 0.9 had 91.1, 0.98 91.6 and 0.99 91.8 % at ipc 1, and 0.98 97.0 % at ipc 10."""


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: see `check_trajectories`.
    """
    check_trajectories(run, "FTD")


def prepare(run: Run) -> Iterator[str]:
    """Nothing, but for a word about the experts."""
    said = say_of_training(run, "gsam", "FTD")
    if said and not run.iteration:
        yield said


def step(run: Run) -> Tensor:
    """One update. Returns the distance, the same for each class, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    names = [name for name in run.tensors if name not in config.beside]
    before = {n: run.state.get(AVERAGE + n, run.tensors[n].detach()).clone() for n in names}
    losses, updated = advance(run)
    if updated:
        averages = {
            AVERAGE + n: before[n].lerp(run.tensors[n].detach(), 1 - config.ema_decay)
            for n in names
        }
        run.state = {**run.state, **averages}
    return losses
