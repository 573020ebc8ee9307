"""Small runs in float64, for comparison with loops written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddfast import methods, nets
from ddfast.artefact import Artefact
from ddfast.data import Dataset
from ddfast.distill import ARTEFACT, distill, loop
from ddfast.experts.file import EXPERTS, create, described
from ddfast.methods import Run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The networks here are far too small for more."""
    torch.set_num_threads(1)


@pytest.fixture
def make_experts(tmp_path) -> Callable[..., Path]:
    """A folder of trajectories that wander at random from fresh weights; see `ddfast.experts`."""

    def make(
        dataset: Dataset,
        model: str,
        experts: int = 3,
        epochs: int = 4,
        pace: float = 0.02,
        name: str = "experts",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        net = nets.build(model, dataset.channels, dataset.num_classes, dataset.size)
        start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        settings = {**described(dataset, net, model), "training": {"optimiser": "sgd"}}
        file = create(folder / EXPERTS, settings, experts, epochs, len(start))
        random = torch.Generator().manual_seed(9)
        for number in range(experts):
            nets.initialise(net, random)
            theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
            for epoch in range(epochs + 1):
                file.trajectories[number, epoch] = theta.numpy()
                theta = theta + pace * torch.randn(len(theta), generator=random)
        file.written[:] = epochs + 1
        file.trajectories.flush()
        file.written.flush()
        return folder

    return make


@pytest.fixture
def same_when_resumed(tmp_path, monkeypatch) -> Callable[..., Artefact]:
    """Distils in one go, and with interruptions: the files and losses must be the same bits.

    `same_when_resumed(method, dataset, config, 3, 7)` interrupts before the third and before the
    seventh iteration that begins; `between` is called with the folder after each interruption. The
    result is in tmp_path / "cut".
    """

    def check(
        method: str,
        dataset: Dataset,
        config: methods.Config,
        *cuts: int,
        between: Callable[[Path], object] = lambda folder: None,
    ) -> Artefact:
        def run(folder: str) -> Artefact:
            place = tmp_path / folder
            return distill(method, dataset, config, place, progress=False, device="cpu")

        run("whole")
        iterate, calls = loop._Loop.iterate, []

        def interrupted(self: loop._Loop) -> torch.Tensor:
            calls.append(1)
            if len(calls) in cuts:
                raise KeyboardInterrupt
            return iterate(self)

        with monkeypatch.context() as patch:
            patch.setattr(loop._Loop, "iterate", interrupted)
            for _ in cuts:
                with pytest.raises(KeyboardInterrupt):
                    run("cut")
                between(tmp_path / "cut")
            found = run("cut")
        files = [(tmp_path / folder / ARTEFACT).read_bytes() for folder in ("whole", "cut")]
        assert files[0] == files[1]
        logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "cut")]
        losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
        assert losses[0] == losses[1]
        assert len(calls) == len(losses[0]) + len(cuts)
        return found

    return check


def _dataset(counts: list[int], channels: int = 2, size: tuple[int, int] = (8, 8)) -> Dataset:
    random = torch.Generator().manual_seed(3)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=random)]
    shape = (len(labels), channels, *size)
    images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    return Dataset(
        name="small",
        train_images=images,
        train_labels=labels,
        test_images=images[:1],
        test_labels=labels[:1],
        class_names=tuple(f"name{c}" for c in range(len(counts))),
        mean=(0.4, 0.6, 0.5)[:channels],
        std=(0.2, 0.3, 0.25)[:channels],
    )


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    """A data set of noise with so many images of each class, in mixed order."""
    return _dataset


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """A run in float64 at iteration 0."""

    def make(method: str, dataset: Dataset, memory: int = 1 << 30, **settings: Any) -> Run:
        known = methods.find(method)
        config = methods.resolve(known.config(**settings), dataset)
        run = methods.start(config, dataset, memory, dtype=torch.float64)
        known.check(run)
        return run

    return make
