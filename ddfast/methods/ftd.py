"""FTD: MTT with experts that were trained to be flat, and the mean of the images over the run.

Du, Jiang, Tan, Zhou and Li, Minimizing the Accumulated Trajectory Error to Improve Dataset
Distillation, CVPR 2023 (arXiv 2211.11004). The objective is MTT's, see
`ddfast.methods.trajectory_matching`. The experts come from `ddfast experts --optimiser gsam`; what
is kept is an exponential moving average of the images, decayed after every iteration.

The official code evaluates that average on networks which it has just trained on the images
themselves, for another thousand epochs; here, as all sets, on fresh ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddfast.data import Dataset
from ddfast.experts import open_experts
from ddfast.methods import mtt, trajectory_matching
from ddfast.methods.config import setting
from ddfast.methods.run import Run
from ddfast.methods.trajectory_matching import pick

TITLE = "FTD: Minimizing the Accumulated Trajectory Error (Du et al., CVPR 2023)"
MATCHES = "as MTT, experts of flat minima, images averaged over the run"
PROTOCOL = "mtt"
EMA = "ema."

NAMES = (*mtt.NAMES, "ema_decay")
# Table 7 of the paper.
PUBLISHED: dict[tuple[str, int], Mapping[str, Any]] = {
    key: dict(zip(NAMES, values, strict=True))
    for key, values in {
        ("CIFAR10", 1): (50, 2, 2, None, 1e2, 1e-7, 1e-2, 0.9999),
        ("CIFAR10", 10): (30, 2, 20, None, 1e2, 1e-5, 1e-3, 0.9995),
        ("CIFAR10", 50): (30, 2, 40, None, 1e3, 1e-5, 1e-2, 0.999),
        ("CIFAR100", 1): (40, 3, 20, None, 1e3, 1e-5, 1e-2, 0.9995),
        ("CIFAR100", 10): (20, 2, 40, None, 1e3, 1e-5, 1e-2, 0.9995),
        ("CIFAR100", 50): (80, 2, 40, 1000, 1e3, 1e-5, 1e-2, 0.999),
        ("TinyImageNet", 1): (30, 2, 10, None, 1e4, 1e-4, 1e-2, 0.999),
        ("TinyImageNet", 10): (20, 2, 40, 500, 1e4, 1e-4, 1e-2, 0.999),
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class Config(trajectory_matching.Config):
    """Settings of FTD."""

    ema_decay: float = setting("decay of the images' mean, an iteration", least=0, below=1)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """5000 iterations and the paper's settings for the data set and ipc.

        For digits MTT's, and a decay of 0.99 for their fewer iterations.
        """
        digits = dataset.name == "digits"
        found = mtt.DIGITS[self.ipc >= 10] if digits else pick(PUBLISHED, dataset, self.ipc)
        return {
            **self.shared_settings(dataset),
            "ema_decay": 0.99,
            **found,
            "iterations": (150 if self.ipc >= 10 else 200) if digits else 5000,
        }

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The means in place of the images and what they are made of."""
        means = {name.removeprefix(EMA): t for name, t in state.items() if name.startswith(EMA)}
        return super().distilled({**tensors, **means}, state)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step, see `trajectory_matching.check`."""
    trajectory_matching.check(run, "FTD")


def prepare(run: Run) -> Iterator[str]:
    """Only a look at the experts."""
    config = run.config
    assert isinstance(config, Config)
    training = open_experts(config.experts).settings.get("training", {})
    if training.get("optimiser", "gsam") != "gsam":
        yield "the experts were trained by plain SGD; FTD's are made with --optimiser gsam"


def step(run: Run) -> Tensor:
    """One update of images, learning rate and mean. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    means = {
        name: run.state.get(EMA + name, tensor.detach().clone())
        for name, tensor in run.tensors.items()
        if name not in config.beside
    }
    losses = trajectory_matching.step(run)
    d = config.ema_decay
    moved = {
        EMA + name: d * mean + (1 - d) * run.tensors[name].detach() for name, mean in means.items()
    }
    run.state = {**run.state, **moved}
    return losses
