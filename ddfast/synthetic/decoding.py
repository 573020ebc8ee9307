"""From what is stored to the images that networks are trained on, by a recipe.

A recipe is a mapping of plain values with the decoder's `name`, so that it can be kept with the
images; beside the images it may need further tensors:

    {"name": "multi_formation", "factor": 2, "kind": "single"}
        the arguments of `ddfast.synthetic.multi_formation.decode`; no further tensors
    {"name": "hallucinators"}
        the images are bases; the tensors of `ddfast.synthetic.hallucinators`
    {"name": "bases", "height": 32, "width": 32}
        the images are bases that all classes share; tensor "coefficients", a row for each image
        that is made (`ddfast.synthetic.bases`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.synthetic import bases, hallucinators, multi_formation

__all__ = ["check_decoder", "decode", "labelled", "repeats"]

SETTINGS = {
    "multi_formation": {"factor", "kind", "bound", "fill"},
    "hallucinators": set(),
    "bases": {"height", "width"},
}


def check_decoder(recipe: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Raise unless `decode` can follow a recipe.

    Args:
        recipe: see there.
        size: (H, W) of the stored images, in pixels.

    Raises:
        ValueError: naming what cannot be followed.
    """
    settings = dict(recipe)
    name = settings.pop("name", None)
    if name not in SETTINGS:
        raise ValueError(f"decoder: got {name!r}, expected one of {', '.join(SETTINGS)}")
    if name == "multi_formation":
        factor = settings.get("factor")
        if isinstance(factor, bool) or not isinstance(factor, int) or not 1 <= factor <= min(size):
            raise ValueError(
                f"decoder: got factor {factor!r}, expected an integer in 1..{min(size)}"
            )
        if settings.get("kind", "single") not in multi_formation.KINDS:
            raise ValueError(f"decoder: multi_formation has no kind {settings['kind']!r}")
    if name == "bases":
        for side, least in zip(("height", "width"), size, strict=True):
            value = settings.get(side)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"decoder: got {side} {value!r}, expected at least {least}")
    unknown = set(settings) - SETTINGS[name]
    if unknown:
        raise ValueError(f"decoder: {name} has no {', '.join(sorted(unknown))}")


def labelled(recipe: Mapping[str, Any] | None) -> str:
    """The tensor that has a row for each label: "images", but for shared bases "coefficients".

    Args:
        recipe: as for `decode`.
    """
    return "coefficients" if recipe is not None and recipe["name"] == "bases" else "images"


def repeats(recipe: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> int:
    """Images that are made of one row, at most.

    Args:
        recipe, tensors: as for `decode`.
    """
    if recipe is None or recipe["name"] == "bases":
        return 1
    if recipe["name"] == "hallucinators":
        return len(tensors["scale"])
    factor = int(recipe["factor"])
    if recipe.get("kind") == "multi":
        return sum(each**2 for each in range(1, factor + 1))
    return factor**2


def decode(
    recipe: Mapping[str, Any] | None,
    images: Tensor,
    counts: Sequence[int],
    tensors: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode what is stored, class after class.

    Args:
        recipe: the decoder's "name" ("multi_formation", "hallucinators" or "bases") with its
            settings; None: the images as they are.
        images: (N, channels, H, W), floating.
        counts: rows of each class, of the images or of what else is `labelled`.
        tensors: what the recipe needs beside the images, in their dtype: for hallucinators in the
            shapes of `ddfast.synthetic.hallucinators.start`, for bases "coefficients" (rows, N).

    Returns:
        The images to train on, (M, channels, H, W), class after class, differentiable in the images
        and tensors; and for each of them the row that it came from, int64 (M,).

    Raises:
        ValueError: a recipe that cannot be followed.
    """
    rows = sum(counts)
    places = torch.arange(rows, device=images.device)
    if recipe is None:
        return images, places
    check_decoder(recipe, (images.shape[-2], images.shape[-1]))
    tensors = tensors or {}
    settings = {name: value for name, value in recipe.items() if name != "name"}
    if recipe["name"] == "hallucinators":
        made = hallucinators.hallucinate(images, tensors)
        return made, places.repeat_interleave(len(made) // max(rows, 1))
    if recipe["name"] == "bases":
        if "coefficients" not in tensors:
            raise ValueError("tensors: bases lack coefficients")
        size = settings["height"], settings["width"]
        return bases.combine(images, tensors["coefficients"], size), places
    decoded, sources, _ = multi_formation.decode(images, places, counts=list(counts), **settings)
    return decoded, sources
