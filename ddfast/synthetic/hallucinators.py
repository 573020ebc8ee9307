"""The synthetic set as HaBa stores it: bases, and small networks that each make an image of a base.

Source: Liu et al., Dataset Distillation via Factorization, NeurIPS 2022 (arXiv 2210.16774), section
3, and the authors' code. A hallucinator is a 3x3 convolution without padding, a scale and a shift
for every pixel of what it gives, and a transposed 3x3 convolution back to the size of the base.
Every base goes through every hallucinator: ipc bases and five hallucinators are 5 ipc images of a
class. Here they are a parametrisation that any method can learn; the paper's own loss, trajectory
matching with a contrast between hallucinators, is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

__all__ = ["NAMES", "hallucinate", "start"]

NAMES = ("inner.weight", "inner.bias", "scale", "shift", "outer.weight", "outer.bias")
"""Of the tensors; the first dimension of each runs over the hallucinators."""


def start(
    number: int,
    channels: int,
    size: tuple[int, int],
    generator: torch.Generator,
    base_channels: int | None = None,
) -> dict[str, Tensor]:
    """The published initial values: torch's default convolutions, scale 1 and shift 0.

    Args:
        number: of hallucinators.
        channels: of the images.
        size: (H, W) of bases and images, in pixels.
        generator: a CPU generator.
        base_channels: of the bases; None: as many as the images have.

    Returns:
        float32 tensors by `NAMES`, such as (number, channels, base_channels, 3, 3) for the inner
        weights. For 3x32x32 they hold 5568 numbers a hallucinator.

    Raises:
        ValueError: no hallucinator; images below 3 pixels.
    """
    if number < 1:
        raise ValueError(f"hallucinators: got {number}, expected at least 1")
    height, width = size[0] - 2, size[1] - 2
    if min(height, width) < 1:
        raise ValueError(f"size: got {size[0]}x{size[1]}, expected 3 pixels or more a side")
    inputs = channels if base_channels is None else base_channels
    shapes = {
        "inner.weight": ((channels, inputs, 3, 3), 9 * inputs),
        "inner.bias": ((channels,), 9 * inputs),
        "outer.weight": ((channels, channels, 3, 3), 9 * channels),
        "outer.bias": ((channels,), 9 * channels),
    }
    found = {
        name: torch.empty(number, *shape).uniform_(
            -1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator
        )
        for name, (shape, fan) in shapes.items()
    }
    found["scale"] = torch.ones(number, channels, height, width)
    found["shift"] = torch.zeros(number, channels, height, width)
    return {name: found[name] for name in NAMES}


def hallucinate(bases: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Every base through every hallucinator.

    Args:
        bases: (N, channels, H, W), floating.
        tensors: in the shapes in which `start` makes them, in the dtype of the bases.

    Returns:
        (N * number, channels, H, W), the images of one base after each other. Differentiable to
        every order, in the bases and the tensors.

    Raises:
        ValueError: a tensor is missing or does not fit.
    """
    missing = [name for name in NAMES if name not in tensors]
    if missing:
        raise ValueError(f"tensors: hallucinators lack {', '.join(missing)}")
    inner, inner_bias, scale, shift, outer, outer_bias = (tensors[name] for name in NAMES)
    if bases.dim() != 4 or inner.shape[2] != bases.shape[1]:
        raise ValueError(
            f"bases: got shape {tuple(bases.shape)}, expected (N, {inner.shape[2]}, H, W)"
        )
    if scale.shape[2:] != (bases.shape[2] - 2, bases.shape[3] - 2):
        raise ValueError(
            f"tensors: the hallucinators are for images of {scale.shape[2] + 2}x"
            f"{scale.shape[3] + 2} pixels, the bases have {bases.shape[2]}x{bases.shape[3]}"
        )
    made = [
        conv_transpose2d(
            conv2d(bases, inner[j], inner_bias[j]) * scale[j] + shift[j], outer[j], outer_bias[j]
        )
        for j in range(len(inner))
    ]
    return torch.stack(made, 1).flatten(0, 1)
