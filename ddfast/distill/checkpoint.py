"""Checkpoints: whole or not at all, verified when read, the last two kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddfast.data import signed_file

KEPT = 2

# Before the names of what a method keeps beside what it learns.
STATE = "state."


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a method kept beside what it learns, from a checkpoint's tensors."""
    return {n.removeprefix(STATE): tensor for n, tensor in tensors.items() if n.startswith(STATE)}


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"iteration-{iteration:09d}.safetensors"


def write(folder: Path, iteration: int, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Save the state after `iteration` iterations, then forget all but the last two.

    The file is written beside its place, flushed to the disk and moved there, so that a crash at
    any moment leaves at least the one before.

    Args:
        tensors: of any device and shape.
        header: plain values, kept as JSON.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**header, "iteration": iteration})
    metadata = {"header": text, "sha256": signed_file.digest(tensors, text)}
    signed_file.write(_path(folder, iteration), tensors, metadata)
    for old in _existing(folder)[:-KEPT]:
        old.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of one checkpoint.

    Raises:
        ValueError: damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["header"]
        if metadata["sha256"] != signed_file.digest(tensors, text):
            raise ValueError("its checksum does not match")
        return tensors, json.loads(text)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, with a warning about newer ones that are not.

    Returns:
        Tensors and header; None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    reasons = []
    for path in reversed(_existing(folder)):
        try:
            found = read(path)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"{reason}; going back to {path.name}", RuntimeWarning, stacklevel=3)
        return found
    if reasons:
        raise ValueError(
            f"no checkpoint in {folder} can be read ({'; '.join(reasons)}); remove the folder to "
            "start the run anew"
        )
    return None


def _existing(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("iteration-*.safetensors"))
