"""The folder of a run: whose it is, and that nobody else writes into it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.data import Dataset
from ddfast.data.files import whole_file
from ddfast.data.fingerprint import fingerprint
from ddfast.distill import checkpoint
from ddfast.methods.run import OPTIMISER


def opened(out: str | os.PathLike[str]) -> Path:
    """The folder, made if need be, and found to be writable.

    Raises:
        OSError: it cannot be made or written; the message says so.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"out: cannot write into {folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process may run in the folder meanwhile. The lock goes with the process.

    Raises:
        BlockingIOError: another process does.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"out: another process is running in {folder}") from None
        yield
    finally:
        os.close(handle)


def identity(method: str, config: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What makes a run this run and no other, as plain values."""
    data = {
        "images": len(dataset.train_images),
        "shape": [dataset.channels, *dataset.size],
        "classes": dataset.num_classes,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "fingerprint": fingerprint(dataset),
    }
    return {"method": method, "config": config, "data": data}


def claim(folder: Path, mine: dict[str, Any]) -> bool:
    """Whether the folder holds this very run already.

    Raises:
        ValueError: it holds another, and the message names the differences; or what it holds
            cannot be told.
    """
    path = folder / "config.json"
    if not path.exists():
        taken = [
            name for name in ("distilled.safetensors", "checkpoint") if (folder / name).exists()
        ]
        if taken:
            raise ValueError(
                f"out: {folder} holds {' and '.join(taken)} but no config.json that says of which "
                "run; choose another folder"
            )
        return False
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        old, new = _flat(theirs), _flat(json.loads(json.dumps(mine)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"out: {path} cannot be read ({error}), so it is unknown whose run this is; choose "
            "another folder"
        ) from None
    nothing = object()
    different = [
        f"{name} is {_shown(old, name)} there and {_shown(new, name)} here"
        for name in [*new, *(name for name in old if name not in new)]
        if old.get(name, nothing) != new.get(name, nothing)
    ]
    if different:
        raise ValueError(
            f"out: {folder} holds a run with other settings ({'; '.join(different)}); choose "
            "another folder, or the same settings to go on with it"
        )
    return True


def record(folder: Path, mine: dict[str, Any], data_path: str | None) -> None:
    """Write `config.json`: what makes the run, and where its data were."""
    text = json.dumps({**mine, "data_path": data_path}, indent=2)
    with whole_file(folder / "config.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def unfinished(folder: Path) -> tuple[Artefact, int]:
    """The synthetic set of a run that has not ended, and after how many iterations it is that.

    Args:
        folder: of the run.

    Raises:
        ValueError: no run there, or no checkpoint of it yet.
    """
    try:
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, data = run["config"], run["data"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} does not hold a run of ddfast") from None
    found = checkpoint.read_last(folder / "checkpoint")
    if found is None:
        raise ValueError(f"the run in {folder} has no checkpoint yet")
    tensors, header = found
    settings = methods.find(run["method"]).config(**config)
    learned = {
        name: tensor.float()
        for name, tensor in tensors.items()
        if not name.startswith((OPTIMISER, checkpoint.STATE))
    }
    if config.get("zca", "none") != "none":
        raise ValueError(
            f"the run in {folder} has not ended, and its images are whitened; grid.png there shows "
            "them as they look"
        )
    if "images" not in learned:
        raise ValueError(
            f"the run in {folder} has not ended, and its images are made by a network; grid.png "
            "there shows them"
        )
    per_class = len(learned[settings.rows]) // data["classes"]
    artefact = Artefact(
        **settings.distilled(learned, checkpoint.state_of(tensors)),
        labels=torch.arange(data["classes"]).repeat_interleave(per_class),
        space=settings.space,
        decoder=settings.decoder((data["shape"][1], data["shape"][2])),
        mean=data["mean"],
        std=data["std"],
        class_names=[str(c) for c in range(data["classes"])],
        dataset=config["dataset"],
        method=run["method"],
        config=config,
        seed=config["seed"],
    )
    return artefact, header["iteration"]


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    data = {f"data {name}": value for name, value in identity["data"].items()}
    return {"method": identity["method"], **identity["config"], **data}


def _shown(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "not set"
    text = str(values[name])
    return text if len(text) <= 40 else text[:37] + "..."
