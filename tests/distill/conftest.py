"""What the tests of the loop share: small runs of each method, and ways to interrupt them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.data import Dataset, generated
from ddfast.distill import distill

SMALL: dict[str, dict[str, Any]] = {
    "dm": {"iterations": 9, "batch_real": 4},
    "dc": {"iterations": 4, "outer_loop": 2, "inner_loop": 1, "batch_real": 4},
    "dsa": {"iterations": 4, "outer_loop": 2, "inner_loop": 1, "batch_real": 4, "batch_train": 3},
    "dsac": {"iterations": 4, "outer_loop": 2, "inner_loop": 1, "batch_real": 4, "inner_warmup": 1},
    "idc": {"iterations": 4, "inner_loop": 2, "batch_real": 4, "n_data": 8, "init": "real"},
    "idc_i": {"iterations": 4, "inner_loop": 2, "n_data": 8, "step": "per_class"},
    "idm": {
        "iterations": 7,
        "batch_real": 4,
        "net_generate_interval": 2,
        "net_num": 4,
        "model_train_steps": 2,
        "reset_interval": 4,
        "factor": 2,
        "init": "real",
    },
    "m3d": {"iterations": 7, "batch_real": 4, "factor": 2, "init": "real"},
    "cafe": {"iterations": 4, "outer_most": 3, "inner_most": 2, "batch_real": 4},
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generated(classes=3, size=8, train_per_class=6, test_per_class=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _config(method: str = "dm", **settings: Any) -> methods.Config:
    known = {"ipc": 2, "model": "ConvNetD1W4", **SMALL[method]}
    return methods.find(method).config(**known | settings)


def _run(dataset: Dataset, out: Path, method: str = "dm", **options: Any) -> Artefact:
    settings = options.pop("settings", {})
    options = {"progress": False, **options}
    return distill(method, dataset, _config(method, **settings), out, **options)


def _same(a: Artefact, b: Artefact) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def _contents(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def _log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Let the given image update (counted from 0, over all iterations) raise once it is done."""
    update, calls = methods.Run.update, []

    def interrupted(self: methods.Run, *arguments: Any) -> None:
        update(self, *arguments)
        calls.append(1)
        if len(calls) == call + 1:
            raise error

    monkeypatch.setattr(methods.Run, "update", interrupted)


@pytest.fixture
def config() -> Callable[..., Any]:
    """The config of a small run of a method."""
    return _config


@pytest.fixture
def run() -> Callable[..., Any]:
    """Distils into a folder: `run(dataset, out, method, settings={...}, **options)`."""
    return _run


@pytest.fixture
def same() -> Callable[..., Any]:
    """Whether two artefacts have the same images and labels."""
    return _same


@pytest.fixture
def contents() -> Callable[..., Any]:
    """The bytes of all files of a folder, by name."""
    return _contents


@pytest.fixture
def log_of() -> Callable[..., Any]:
    """The lines of a run's log."""
    return _log_of


@pytest.fixture
def interrupt_at() -> Callable[..., Any]:
    """Lets the given image update raise: `interrupt_at(monkeypatch, call, error)`."""
    return _interrupt_at
