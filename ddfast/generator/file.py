"""The file of a trained generator: its weights, and in the header all that is known about it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddfast.data import signed_file
from ddfast.generator.network import Generator, folded

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1

# All metadata under one key, so that the same generator is the same bytes.
KEY = "ddfast generator"


def save(
    generator: Generator, path: str | os.PathLike[str], recipe: Mapping[str, Any] | None = None
) -> Path:
    """Write a generator, whole or not at all. The same generator gives the same bytes.

    Spectral normalisation is folded into the weights, which are those that make the images.

    Args:
        generator: ours; modules of other classes keep their own files.
        path: an existing file is replaced at once.
        recipe: what else there is to know, plain values; None for what `load` found.

    Raises:
        TypeError: not a :class:`Generator`, a recipe of values that are not plain.
        ValueError: a weight that is not finite.
        OSError: the folder does not exist or cannot be written.
    """
    if not isinstance(generator, Generator):
        raise TypeError(
            f"generator: got {type(generator).__name__}, expected ddfast.generator.Generator"
        )
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a generator is written to a file")
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in folded(generator).state_dict().items()
    }
    _check_finite(tensors)
    if recipe is None:
        recipe = getattr(generator, "recipe", {})
    try:
        known = json.loads(json.dumps(dict(recipe), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"recipe: got values that are not plain: {error}") from None
    contents = {"architecture": generator.architecture, "recipe": known}
    header = {
        "format_version": FORMAT_VERSION,
        **contents,
        "sha256": signed_file.digest(tensors, json.dumps(contents, sort_keys=True)),
    }
    signed_file.write(path, tensors, {KEY: json.dumps(header, sort_keys=True)})
    return path


def load(path: str | os.PathLike[str]) -> Generator:
    """Read a generator. Nothing is unpickled, and the contents are checked against a checksum.

    Args:
        path: of the file.

    Returns:
        The generator on the CPU in evaluation mode, without spectral normalisation, its weights
        frozen. Its attribute `recipe` says how it was made: data set, class names, mean, std,
        settings, fingerprint of the training images, versions.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: no generator of ddfast, damaged or cut short, another version of the format;
            the message names the file.
    """
    path = Path(path)
    header, tensors = signed_file.read(path, KEY, "generator")
    try:
        signed_file.check_version(header, FORMAT_VERSION)
        contents = {name: header[name] for name in ("architecture", "recipe")}
        signed_file.check_contents(header, tensors, contents)
        generator = Generator(**header["architecture"], spectral=False)
        generator.load_state_dict(tensors)
        _check_finite(tensors)
    except KeyError as error:
        raise ValueError(f"{path} cannot be used: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    generator.recipe = header["recipe"]
    return generator.eval().requires_grad_(False)


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"generator: {', '.join(bad[:3])} has values that are not finite")
