"""The synthetic set as plain pixels, one function a parametrisation (others get their own file)."""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.sampling import random_selection

__all__ = ["pixels"]

INITS = ("real", "noise")


def pixels(
    dataset: Dataset, ipc: int, init: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The starting synthetic set: ``ipc`` images of each class.

    Args:
        dataset: gives shapes, classes and, for ``"real"``, the images.
        ipc: images per class.
        init: ``"real"``, random training images of each class, or ``"noise"``, standard normal
            pixels in normalised space.
        generator: a CPU generator.

    Returns:
        Images float32 ``(num_classes * ipc, channels, H, W)``, as networks see them, class 0
        first, and labels int64.

    Raises:
        ValueError: ``ipc`` below 1, an unknown ``init``, or with ``"real"`` a class that has
            fewer than ``ipc`` images; the message names it.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if ipc < 1:
        raise ValueError(f"ipc must be at least 1, got {ipc}")
    labels = torch.arange(dataset.num_classes).repeat_interleave(ipc)
    if init == "noise":
        shape = (len(labels), dataset.channels, *dataset.size)
        return torch.randn(shape, generator=generator, dtype=torch.float32), labels
    images, _ = random_selection(dataset, ipc, generator)
    return dataset.normalised(images), labels
