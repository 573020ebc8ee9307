"""A picture of the synthetic set, written as PNG with the standard library alone."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ddfast.data.files import whole_file
from ddfast.data.normalisation import denormalise

__all__ = ["grid", "write_png"]

GAP = 2
BACKGROUND = 255
SMALLEST = 48  # images with a shorter side below this are enlarged


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> Path:
    """Write uint8 pixels, ``(H, W)`` for grey or ``(H, W, 3)`` for RGB, whole or not at all.

    Args:
        path: an existing file is replaced at once.
        pixels: what to write.

    Raises:
        TypeError, ValueError: pixels of another type or shape.
        FileNotFoundError, PermissionError: the folder does not exist or cannot be written.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}")
    if (pixels.ndim != 2 and pixels.shape[2:] != (3,)) or pixels.size == 0:
        raise ValueError(f"pixels must have shape (H, W) or (H, W, 3), got {pixels.shape}")
    height, width = pixels.shape[:2]
    colour_type = 2 if pixels.ndim == 3 else 0
    # Every row starts with the number of its filter; 0 is none.
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    with whole_file(path) as temporary:
        temporary.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", header)
            + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
            + _chunk(b"IEND", b"")
        )
    return Path(path)


def grid(
    images: Tensor,
    labels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    path: str | os.PathLike[str],
    per_row: int | None = None,
    rows: int | None = None,
) -> Path:
    """Write a picture of the synthetic set: a row for each class, in the order of the labels.

    Small images are enlarged by a whole number, pixel by pixel, until their shorter side reaches
    48 pixels. One channel is drawn in grey, three in RGB, and any other number as the grey of
    their mean.

    Args:
        images: normalised, floating-point ``(N, channels, H, W)``.
        labels: integers ``(N,)``, in any order.
        mean, std: one number a channel, as in :func:`ddfast.data.normalise`.
        path: the PNG to write; an existing one is replaced at once.
        per_row: at most so many images of a class; None for all.
        rows: at most so many classes; None for all.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: arguments that do not fit together, no images, NaN pixels.
        FileNotFoundError, PermissionError: the folder does not exist or cannot be written.
    """
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(
            "images must have shape (N, channels, H, W) and not be empty, "
            f"got {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(images)} integers, one for each image, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    for what, value in (("per_row", per_row), ("rows", rows)):
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    classes = labels.unique().tolist()[:rows]
    members = [(labels == label).nonzero()[:per_row, 0] for label in classes]
    pixels = [denormalise(images[each], mean, std).cpu().numpy() for each in members]

    channels, height, width = images.shape[1:]
    factor = max(1, -(-SMALLEST // min(height, width)))
    height, width = height * factor + GAP, width * factor + GAP
    columns = max(map(len, pixels))
    depth = 3 if channels == 3 else 1
    canvas = np.full(
        (len(pixels) * height + GAP, columns * width + GAP, depth), BACKGROUND, dtype=np.uint8
    )
    for row, several in enumerate(pixels):
        for column, image in enumerate(several):
            if channels not in (1, 3):
                image = np.rint(image.mean(axis=0, keepdims=True)).astype(np.uint8)
            large = image.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)
            top, left = row * height + GAP, column * width + GAP
            canvas[top : top + large.shape[0], left : left + large.shape[1]] = large
    return write_png(path, canvas if depth == 3 else canvas[:, :, 0])
