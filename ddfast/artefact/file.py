"""An artefact as one safetensors file, which carries its preprocessing and its recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.artefact.contents import Artefact
from ddfast.data import signed_file
from ddfast.data.whitening import Whitening

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1
"""Of the files that are written, and the only one that is read."""

# All metadata live under one key, so that the same artefact is the same bytes.
KEY = "ddfast"
DECODER = "decoder."  # before the names of its tensors
WHITENING = "whitening."  # before the names of its tensors
RECIPE = ("space", "mean", "std", "class_names", "dataset", "method", "config", "seed", "versions")


def save(artefact: Artefact, path: str | os.PathLike[str]) -> Path:
    """Write an artefact, whole or not at all: whatever was at ``path`` stays until the end.

    The same artefact gives the same bytes.

    Args:
        artefact: what to write.
        path: of the file; its folder must exist.

    Returns:
        The path.

    Raises:
        FileNotFoundError, PermissionError: the folder does not exist or cannot be written.
        IsADirectoryError: the path is a folder.
        TypeError: not an artefact.
    """
    if not isinstance(artefact, Artefact):
        raise TypeError(f"expected an Artefact, got {type(artefact).__name__}")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; an artefact is written to a file")
    tensors = {"images": artefact.images, "labels": artefact.labels}
    tensors |= {DECODER + name: tensor for name, tensor in artefact.decoder_tensors.items()}
    if artefact.soft_labels is not None:
        tensors["soft_labels"] = artefact.soft_labels
    if artefact.lr is not None:
        tensors["lr"] = torch.tensor(artefact.lr, dtype=torch.float64)
    recipe = {name: getattr(artefact, name) for name in RECIPE}
    if artefact.whitening is not None:
        whitening = artefact.whitening
        tensors |= {WHITENING + name: getattr(whitening, name) for name in ("shift", "matrix")}
        recipe["whitening"] = {"mode": whitening.mode, "length": whitening.length}
        if whitening.block:
            recipe["whitening"]["block"] = whitening.block
    if artefact.decoder is not None:
        recipe["decoder"] = artefact.decoder
    header = {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "sha256": signed_file.digest(tensors, json.dumps(recipe, sort_keys=True)),
    }
    signed_file.write(path, tensors, {KEY: json.dumps(header, sort_keys=True)})
    return path


def load(path: str | os.PathLike[str]) -> Artefact:
    """Read an artefact. Nothing is unpickled, and the contents are checked against a checksum.

    Args:
        path: of the file, `distilled.safetensors` in the folder of a run.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: not an artefact of ddfast, damaged or cut short, another version of the format,
            or contents that do not fit together; the message names the file.
    """
    path = Path(path)
    header, tensors = signed_file.read(path, KEY, "artefact")
    try:
        signed_file.check_version(header, FORMAT_VERSION)
        recipe = header["recipe"]
        missing = [name for name in ("images", "labels") if name not in tensors]
        missing += [name for name in RECIPE if name not in recipe]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        signed_file.check_contents(header, tensors, recipe)
        lr = tensors.get("lr")
        return Artefact(
            images=tensors["images"],
            labels=tensors["labels"],
            soft_labels=tensors.get("soft_labels"),
            lr=None if lr is None else lr.tolist(),
            decoder=recipe.get("decoder"),
            decoder_tensors={
                name.removeprefix(DECODER): tensor
                for name, tensor in tensors.items()
                if name.startswith(DECODER)
            },
            whitening=_whitening(recipe.get("whitening"), tensors),
            **{name: recipe[name] for name in RECIPE},
        )
    except KeyError as error:
        raise ValueError(f"{path} cannot be used: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def _whitening(recipe: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Whitening | None:
    if recipe is None:
        return None
    shift, matrix = (tensors[WHITENING + name] for name in ("shift", "matrix"))
    return Whitening(recipe["mode"], shift, matrix, recipe["length"], recipe.get("block", 0))
