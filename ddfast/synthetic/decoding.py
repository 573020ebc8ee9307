"""From the images that are stored to those that networks are trained on, by a recipe.

A recipe is a mapping of plain values with the decoder's `name`, so that it can be kept with the
images. There is one decoder so far: `{"name": "multi_formation", "factor": 2, "kind": "single"}`,
with the arguments of `ddfast.synthetic.multi_formation.decode`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.synthetic import multi_formation

__all__ = ["check_decoder", "decode"]

DECODERS = ("multi_formation",)


def check_decoder(recipe: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raise ValueError unless `decode` can follow the recipe for images of this (height, width)."""
    settings = dict(recipe)
    name = settings.pop("name", None)
    if name not in DECODERS:
        raise ValueError(f"decoder: got {name!r}, expected one of {', '.join(DECODERS)}")
    factor = settings.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int) or not 1 <= factor <= min(size):
        raise ValueError(f"decoder: got factor {factor!r}, expected an integer in 1..{min(size)}")
    if settings.get("kind", "single") not in multi_formation.KINDS:
        raise ValueError(f"decoder: multi_formation has no kind {settings['kind']!r}")
    unknown = set(settings) - {"factor", "kind", "bound"}
    if unknown:
        raise ValueError(f"decoder: multi_formation has no {', '.join(sorted(unknown))}")


def decode(
    recipe: Mapping[str, Any], images: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Decode images that lie class after class.

    Args:
        recipe: see above.
        images: (N, channels, H, W).
        counts: images of each class, N together.

    Returns:
        The images to train on, class after class, differentiable in `images`; and for each of them
        which of the stored ones it came from, int64.

    Raises:
        ValueError: a recipe that cannot be followed.
    """
    check_decoder(recipe, (images.shape[-2], images.shape[-1]))
    settings = {name: value for name, value in recipe.items() if name != "name"}
    places = torch.arange(len(images), device=images.device)
    decoded, sources, _ = multi_formation.decode(images, places, counts=list(counts), **settings)
    return decoded, sources
