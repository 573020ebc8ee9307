"""CutMix (Yun et al., ICCV 2019): a box of each image is replaced by that of another one.

As IDC and the methods after it train their networks: with some probability a whole batch is mixed,
with one box and one permutation. The share of the image that the box is to leave is uniform in
[0, 1), the published Beta(1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["box", "cutmix"]


def cutmix(
    images: Tensor, generators: Sequence[torch.Generator], probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix several batches, each by itself.

    The loss of image i is then `share * loss(its label) + (1 - share) * loss(label of partner[i])`.

    Args:
        images: `(batches, n, channels, H, W)`, not changed.
        generators: a CPU generator for each batch. As many numbers are drawn from it whether the
            batch is mixed or not.
        probability: of a batch to be mixed.

    Returns:
        The images, in `images`' shape; `partner`, int64 `(batches, n)`, whose box image i has got
        (its own if its batch is not mixed); `share`, `(batches,)` in the images' dtype, of the
        pixels that are still its own. The last two on the images' device.

    Raises:
        ValueError: a number of generators that is not the number of batches.
    """
    if len(generators) != len(images):
        raise ValueError(
            f"generators: got {len(generators)}, expected {len(images)}, one for each batch"
        )
    count, (height, width) = images.shape[1], images.shape[-2:]
    partners = torch.arange(count).repeat(len(images), 1)
    share = torch.ones(len(images), dtype=images.dtype)
    boxes: dict[int, tuple[slice, slice]] = {}
    for place, generator in enumerate(generators):
        coin, *where = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        order = torch.randperm(count, generator=generator)
        if coin < probability:
            rows, columns = boxes[place] = box(where, (height, width))
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            partners[place], share[place] = order, 1 - area / (height * width)
    partners = partners.to(images.device)
    if boxes:
        mixed = images.clone()
        for place, (rows, columns) in boxes.items():
            mixed[place, ..., rows, columns] = images[place][partners[place]][..., rows, columns]
        images = mixed
    return images, partners, share.to(images.device)


def box(uniform: Sequence[float], size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the box.

    Args:
        uniform: three numbers in [0, 1): the share to keep, and the centre's row and column.
        size: (height, width) of the images. Each side of the box is sqrt(1 - share) of the image's,
            rounded down to an even number, and cut where it leaves the image.
    """
    keep, *centre = uniform
    found = []
    for u, side in zip(centre, size, strict=True):
        middle, half = int(u * side), int(side * math.sqrt(1 - keep)) // 2
        found.append(slice(max(middle - half, 0), min(middle + half, side)))
    return found[0], found[1]
