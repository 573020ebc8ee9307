"""The sizes that the field reports: what a data set's images and the usual networks imply."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A data set as distillation meets it.

    Attributes:
        name: as on the command line.
        classes: of the data set.
        channels, side: of an image, (channels, side, side).
        batch_real: real images of a class in an outer iteration.
        ipc: synthetic images per class.
        width, depth: of the ConvNet.
    """

    name: str
    classes: int
    channels: int
    side: int
    batch_real: int
    ipc: int
    width: int
    depth: int


# Batch, width and depth are those of the published scripts of DC, DSA, DM and MTT: 256 real images
# per class, ConvNet of width 128 with three blocks at 32 pixels and four at 64. ImageNet-1K is the
# downsampled one of 64 pixels.
SIZES = {
    size.name: size
    for size in (
        Size("cifar10", 10, 3, 32, 256, 10, 128, 3),
        Size("cifar100", 100, 3, 32, 256, 10, 128, 3),
        Size("tiny-imagenet", 200, 3, 64, 256, 10, 128, 4),
        Size("imagenet-1k", 1000, 3, 64, 256, 10, 128, 4),
    )
}


def fitted(size: Size, memory_bytes: int, bytes_per_class: int) -> tuple[Size, str]:
    """The size with as many classes, else images of one class, as fit into memory.

    Args:
        memory_bytes: bytes that the work may take.
        bytes_per_class: bytes that it takes for one class at `size.batch_real` real images.

    Returns:
        (size, note): note says what was left out, such as "40 of 1000 classes"; "" if nothing.

    Raises:
        ValueError: a number of bytes below one.
    """
    for name, value in (("memory_bytes", memory_bytes), ("bytes_per_class", bytes_per_class)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    classes = min(size.classes, max(memory_bytes // bytes_per_class, 1))
    batch = size.batch_real
    if bytes_per_class > memory_bytes:
        batch = max(batch * memory_bytes // bytes_per_class, 1)
    parts = []
    if classes < size.classes:
        parts.append(f"{classes} of {size.classes} classes")
    if batch < size.batch_real:
        parts.append(f"{batch} of {size.batch_real} real images a class")
    return dataclasses.replace(size, classes=classes, batch_real=batch), ", ".join(parts)


def find(name: str) -> Size:
    """The size of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in SIZES:
        raise ValueError(f"sizes: got {name!r}, expected one of {', '.join(SIZES)}")
    return SIZES[name]
