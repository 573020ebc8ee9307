"""Image files to one uint8 array: decoded once, kept in memory or packed in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.files import require, whole_file

__all__ = ["decode_all", "to_pixels"]

MODES = {1: "L", 3: "RGB"}


def to_pixels(image: Any, size: int | None, channels: int) -> np.ndarray:
    """A Pillow image as uint8 ``(channels, H, W)``.

    Converted to grey or RGB (transparency is dropped). With a ``size``, the shorter side is
    resized to it (bilinear, antialiased) and the centre is cut out, with the rounding that
    torchvision's Resize and CenterCrop use on Pillow images.

    Raises:
        ValueError: an image of more than 8 bits a channel, which would lose its upper bits.
    """
    pillow = require("PIL.Image", "reading image files", "pip install ddfast[images]")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"has more than 8 bits a channel (mode {image.mode}): convert it first")
    image = image.convert(MODES[channels])
    if size is not None:
        width, height = image.size
        if width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        if (width, height) != image.size:
            image = image.resize((width, height), pillow.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _decode(path: Path, size: int | None, channels: int) -> np.ndarray:
    pillow = require("PIL.Image", "reading image files", "pip install ddfast[images]")
    try:
        with pillow.open(path) as image:
            return to_pixels(image, size, channels)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _fingerprint(paths: Sequence[Path], root: Path, size: int | None, channels: int) -> str:
    """Changes whenever a file is added, removed, renamed or written, or the format changes."""
    digest = hashlib.sha256(f"ddfast 1 size={size} channels={channels}\n".encode())
    for path in paths:
        status = path.stat()
        line = f"{path.relative_to(root).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _fill(
    pixels: np.ndarray, first: np.ndarray, paths: Sequence[Path], size: int | None, channels: int
) -> None:
    def put(index: int) -> None:
        image = _decode(paths[index], size, channels) if index else first
        if image.shape != pixels.shape[1:]:
            raise ValueError(
                f"{paths[index]} has {image.shape[1]}x{image.shape[2]} pixels and {paths[0]} "
                f"{first.shape[1]}x{first.shape[2]}: pass size to bring all to one"
            )
        pixels[index] = image

    # Pillow releases the interpreter lock while it decodes. In blocks, so that an unreadable file
    # ends the work soon.
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), 1024):
            list(pool.map(put, range(start, min(start + 1024, len(paths)))))


def decode_all(
    paths: Sequence[Path],
    root: Path,
    size: int | None,
    channels: int = 3,
    cache: str | os.PathLike[str] | None = None,
) -> Tensor:
    """All image files as one uint8 tensor ``(N, channels, H, W)``.

    Args:
        paths: the files, in the order wanted.
        root: the folder all are in.
        size: pixels of each side of the result, see :func:`to_pixels`; None leaves images as they
            are, which must then all be alike.
        channels: 1 or 3.
        cache: a folder for the packed result, made if need be. The file's name contains a
            fingerprint of the images' names, sizes and times of change, so that it is written
            anew when one changes. With a cache the tensor is memory-mapped; writing to it
            changes this process's copy only.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: an unreadable image, or images of different sizes; the message names the file.
    """
    if channels not in MODES:
        raise ValueError(f"channels of image files must be 1 or 3, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not paths:
        raise ValueError(f"no image files in {root}")
    packed = None
    if cache is not None:
        packed = Path(cache) / f"{root.name}-{_fingerprint(paths, root, size, channels)}.npy"
        if packed.exists():
            return torch.from_numpy(np.load(packed, mmap_mode="c", allow_pickle=False))
    first = _decode(paths[0], size, channels)
    shape = (len(paths), *first.shape)
    if packed is None:
        pixels = np.empty(shape, dtype=np.uint8)
        _fill(pixels, first, paths, size, channels)
        return torch.from_numpy(pixels)
    packed.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(packed) as temporary:
        mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _fill(mapped, first, paths, size, channels)
        mapped.flush()
        del mapped
    return torch.from_numpy(np.load(packed, mmap_mode="c", allow_pickle=False))
