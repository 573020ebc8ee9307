"""A data set of noise, made in memory, for work whose time does not depend on what images show."""

from __future__ import annotations

import torch

from ddfast.bench.sizes import Size
from ddfast.data import Dataset


def noise(size: Size, classes: int, per_class: int) -> Dataset:
    """So many classes of so many training images each, and one test image a class."""
    random = torch.Generator().manual_seed(0)
    shape = (classes * per_class, size.channels, size.side, size.side)
    images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    labels = torch.arange(classes)
    return Dataset(
        name="noise",
        train_images=images,
        train_labels=labels.repeat_interleave(per_class),
        test_images=images[::per_class],
        test_labels=labels,
        class_names=tuple(map(str, range(classes))),
        mean=(0.5,) * size.channels,
        std=(0.29,) * size.channels,  # of uniform numbers
    )
