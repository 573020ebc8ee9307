"""Safetensors files that say what they are: plain values in the header, and a checksum over all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddfast._version import __version__
from ddfast.data.files import whole_file

__all__ = ["check_contents", "check_version", "digest", "read", "write"]


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 over a text and every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, whole or not at all: whatever was there stays until the end.

    safetensors writes several metadata in random order: for the same bytes there must be one.

    Raises:
        FileNotFoundError, PermissionError: the folder does not exist or cannot be written.
    """
    content = save(dict(tensors), dict(metadata))
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def read(path: Path, key: str, what: str) -> tuple[Any, dict[str, Tensor]]:
    """The header under a key, and the tensors. Nothing is unpickled, nothing checked yet.

    Args:
        path: of the file.
        key: of its metadata.
        what: it is, such as "artefact", for the messages.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: no such file of ours, or it is damaged or cut short.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {what} at {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the {what}'s file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or it is damaged or cut short: {error}"
        ) from None
    if key not in metadata:
        raise ValueError(f"{path} is no {what} of ddfast: its metadata have no {key!r}")
    try:
        return json.loads(metadata[key]), tensors
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def check_version(header: Mapping[str, Any], version: int) -> None:
    """Raise unless a file has this version of its format.

    Raises:
        KeyError: the header has no "format_version".
        ValueError: saying which version it has.
    """
    if header["format_version"] != version:
        raise ValueError(
            f"it has format version {header['format_version']!r}, and ddfast {__version__} reads "
            f"version {version}"
        )


def check_contents(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], signed: object
) -> None:
    """Raise unless the contents are those that were signed.

    Args:
        header: of the file.
        tensors: of the file.
        signed: the plain values over which, with the tensors, the checksum goes.

    Raises:
        KeyError: the header has no "sha256".
        ValueError: they are not.
    """
    if header["sha256"] != digest(tensors, json.dumps(signed, sort_keys=True)):
        raise ValueError("its contents do not match its checksum: it is damaged")
