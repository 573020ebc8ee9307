"""Finding the files of a data set, writing files whole or not at all, optional packages."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["find_folder", "require", "whole_file"]


def require(module: str, use: str, install: str) -> Any:
    """Import an optional module, or say what it is needed for and how to get it.

    Raises:
        ImportError: the module is not there; the message names ``install``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{use} needs {module.split('.')[0]}: {install}") from error


def find_folder(
    data_path: str | os.PathLike[str] | None,
    folders: Sequence[str],
    files: Sequence[str | tuple[str, ...]],
    name: str,
    source: str,
) -> tuple[Path, list[Path]]:
    """The first of several folders under ``data_path`` that holds all the files.

    Args:
        data_path: given by the user.
        folders: folders to try, relative to ``data_path``; ``""`` is ``data_path`` itself.
        files: names inside the folder; a tuple is a list of spellings of which one must exist.
        name: the data set, for the message.
        source: the official archive, for the message.

    Returns:
        The folder, and the path of each of ``files`` in it.

    Raises:
        ValueError: no ``data_path``.
        FileNotFoundError: what was expected where, what is missing, and where it comes from.
    """
    if data_path is None:
        raise ValueError(f"{name} is read from local files: data_path must say where they are")
    root = Path(data_path)
    spellings = [(entry,) if isinstance(entry, str) else entry for entry in files]
    missing: dict[Path, list[str]] = {}
    for relative in folders:
        folder = root / relative
        found = [
            next((folder / s for s in some if (folder / s).exists()), None) for some in spellings
        ]
        paths = [path for path in found if path is not None]
        if len(paths) == len(spellings):
            return folder, paths
        missing[folder] = [
            " or ".join(some) for some, path in zip(spellings, found, strict=True) if path is None
        ]
    # The folder that came closest is the one the user most likely means.
    closest = min(missing, key=lambda folder: (len(missing[folder]), not folder.is_dir()))
    wanted = ", ".join(" or ".join(some) for some in spellings)
    places = " or ".join(str(folder) for folder in missing)
    raise FileNotFoundError(
        f"{name} not found. Expected the files {wanted} in {places}; "
        f"missing in {closest}: {', '.join(missing[closest])}. {source}"
    )


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends without an error.

    A reader never sees half a file: until the end the old one stays, and on an error the
    temporary one is removed.

    Raises:
        FileNotFoundError, PermissionError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} of {target.name} does not exist")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
