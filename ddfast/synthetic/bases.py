"""The synthetic set as LinBa stores it: bases that all classes share, and coefficients.

Source: Deng and Russakovsky, Remember the Past: Distilling Datasets into Addressable Memories for
Neural Networks, NeurIPS 2022 (arXiv 2206.02916), section 3. With K bases b_k of 1/s of the images'
size and coefficients a of an image,

    x = upsampled_s(sum_k a_k b_k)          bilinear, align_corners False

It is a parametrisation that any method can learn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["combine", "fitted", "noise", "per_class"]


def per_class(
    ipc: int, classes: int, channels: int, size: tuple[int, int], bases: int, scale: int
) -> int:
    """Images of each class that fit into the storage of `ipc` images a class.

    The largest r with K (H/s) (W/s) channels + C r K <= C ipc H W channels.

    Args:
        ipc: images of each class, whose storage is to be filled.
        classes, channels: C, and those of an image.
        size: (H, W) of the images, in pixels.
        bases: K.
        scale: s.

    Raises:
        ValueError: the bases alone leave no room for one image of each class; a scale that is
            larger than the images.
    """
    if bases < 1:
        raise ValueError(f"bases: got {bases}, expected at least 1")
    height, width = smaller(size, scale)
    left = classes * ipc * channels * size[0] * size[1] - bases * channels * height * width
    found = left // (classes * bases)
    if found < 1:
        raise ValueError(
            f"bases: {bases} bases of {channels}x{height}x{width} leave no room for coefficients "
            f"in the storage of {ipc} images for each of {classes} classes"
        )
    return found


def smaller(size: tuple[int, int], scale: int) -> tuple[int, int]:
    """Height and width of the bases: the images' divided by `scale`, rounded up."""
    if not 1 <= scale <= min(size):
        raise ValueError(f"base_scale: got {scale}, expected 1 to {min(size)}")
    return -(-size[0] // scale), -(-size[1] // scale)


def noise(
    bases: int,
    rows: int,
    channels: int,
    size: tuple[int, int],
    scale: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Normal bases, and coefficients with which an image has unit variance before upsampling.

    Args:
        bases: how many.
        rows: of coefficients, one for each image.
        channels, size, scale: as for `per_class`.
        generator: a CPU generator.

    Returns:
        Bases float32 (bases, channels, ceil(H/s), ceil(W/s)) and coefficients (rows, bases).
    """
    b = torch.randn(bases, channels, *smaller(size, scale), generator=generator)
    return b, torch.randn(rows, bases, generator=generator) / math.sqrt(bases)


def fitted(images: Tensor, bases: int, scale: int) -> tuple[Tensor, Tensor]:
    """Bases and coefficients closest to given images in the least squares sense, made smaller.

    The leading singular vectors of the shrunk images; both factors get the root of the singular
    values, so that neither is much larger than the other. With more bases than the images can
    fill, the rest of the bases is zero, and so is their share: they can still learn, for each
    keeps a coefficient that is not.

    Args:
        images: (rows, channels, H, W), floating.
        bases: how many.
        scale: s.

    Returns:
        As `noise`.
    """
    small = interpolate(images, smaller((images.shape[2], images.shape[3]), scale), mode="area")
    u, s, v = torch.linalg.svd(small.flatten(1), full_matrices=False)
    count = min(bases, len(s))
    root = s[:count].sqrt()
    b = small.new_zeros(bases, *small.shape[1:])
    b[:count] = (root.unsqueeze(1) * v[:count]).view(count, *small.shape[1:])
    coefficients = small.new_full((len(images), bases), 1 / math.sqrt(bases))
    coefficients[:, :count] = u[:, :count] * root
    return b, coefficients


def combine(bases: Tensor, coefficients: Tensor, size: tuple[int, int]) -> Tensor:
    """The images of some rows of coefficients.

    Args:
        bases: (K, channels, h, w), floating.
        coefficients: (N, K), in the dtype of the bases.
        size: (H, W) of the images.

    Returns:
        (N, channels, H, W), differentiable to every order in both.

    Raises:
        ValueError: coefficients that do not fit the bases.
    """
    if coefficients.dim() != 2 or coefficients.shape[1] != len(bases):
        raise ValueError(
            f"coefficients: got shape {tuple(coefficients.shape)}, expected (N, {len(bases)})"
        )
    small = (coefficients @ bases.flatten(1)).view(len(coefficients), *bases.shape[1:])
    if tuple(bases.shape[2:]) == tuple(size):
        return small
    return interpolate(small, size, mode="bilinear", align_corners=False)
