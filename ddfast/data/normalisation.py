"""From uint8 pixels to normalised floats and back; mean and standard deviation of a channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["channel_statistics", "denormalise", "normalise", "statistics_of"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# The constants of the DC family's scripts (methods notes, section 1.2). Two conventions exist for
# CIFAR-100: these, and CIFAR-10's, which MTT, TESLA, DATM and IDC use. Images saved in normalised
# space only make sense with the constants they were made with.
PUBLISHED: dict[str, Statistics] = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashionmnist": ((0.2861,), (0.3530,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def channel_statistics(images: Tensor) -> Statistics:
    """Mean and population standard deviation of each channel, for pixels scaled to 0..1.

    Exact sums of integers, so neither the order of the images nor the number of threads matters.

    Args:
        images: uint8 ``(N, channels, H, W)``; may be memory-mapped, it is read in chunks.

    Returns:
        ``(mean, std)``, each one float a channel.

    Raises:
        TypeError: images that are not uint8.
        ValueError: a channel that has the same value everywhere, by which nothing can be divided.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    chunk = max(1, (1 << 24) // max(1, images[0].numel()))
    for start in range(0, len(images), chunk):
        block = images[start : start + chunk].numpy()
        for channel in range(channels):
            counts[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
    mean: list[float] = []
    std: list[float] = []
    for channel, histogram in enumerate(counts.tolist()):
        # Python's integers do not overflow: the numerators are exact.
        number = sum(histogram)
        total = sum(value * count for value, count in enumerate(histogram))
        squares = sum(value * value * count for value, count in enumerate(histogram))
        spread = number * squares - total * total
        if spread == 0:
            raise ValueError(f"channel {channel} of the images has the same value in every pixel")
        mean.append(total / (number * 255))
        std.append(math.sqrt(spread / (number * number)) / 255)
    return tuple(mean), tuple(std)


def statistics_of(images: Tensor, choice: str) -> Statistics:
    """The mean and std named by ``choice``: ``"computed"`` from ``images``, or published ones.

    Raises:
        ValueError: an unknown choice, or one for another number of channels.
    """
    if choice == "computed":
        return channel_statistics(images)
    if choice not in PUBLISHED:
        known = ", ".join(["computed", *PUBLISHED])
        raise ValueError(f"statistics must be one of {known}; got {choice!r}")
    mean, std = PUBLISHED[choice]
    if len(mean) != images.shape[1]:
        raise ValueError(
            f"statistics {choice!r} are for {len(mean)} channels, the images have {images.shape[1]}"
        )
    return mean, std


def _columns(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """mean and std as ``(channels, 1, 1)`` tensors on the images' device."""
    if images.dim() not in (3, 4):
        raise ValueError(
            "images must have shape (N, channels, H, W) or (channels, H, W), "
            f"got {tuple(images.shape)}"
        )
    channels = images.shape[-3]
    for what, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"{what} must have one number for each of {channels} channels, got {len(values)}"
            )
    first, second = (
        torch.tensor(tuple(values), dtype=dtype, device=images.device).view(-1, 1, 1)
        for values in (mean, std)
    )
    return first, second


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(images / 255 - mean) / std`` per channel, in that order of operations.

    The order makes float32 results bit-equal to the usual ToTensor and Normalize. Half precisions
    are computed in float32 and rounded once.

    Args:
        images: uint8 ``(N, channels, H, W)`` or ``(channels, H, W)``.
        mean, std: one number a channel, for pixels scaled to 0..1.
        dtype: a floating-point type.

    Returns:
        A new tensor of the same shape in ``dtype``.

    Raises:
        TypeError: images that are not uint8, a dtype that is not floating-point.
        ValueError: mean or std of the wrong length.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shift, scale = _columns(images, mean, std, compute)
    return images.to(compute).div_(255).sub_(shift).div_(scale).to(dtype)


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images as uint8 pixels: ``(images * std + mean) * 255``, rounded and clamped.

    Args:
        images: floating-point ``(N, channels, H, W)`` or ``(channels, H, W)``.
        mean, std: one number a channel, as in :func:`normalise`.

    Returns:
        uint8, the same shape. Undoes :func:`normalise` exactly in float32 and float64.

    Raises:
        TypeError: images that are not floating-point.
        ValueError: a NaN pixel, mean or std of the wrong length.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point, got {images.dtype}")
    compute = torch.float64 if images.dtype == torch.float64 else torch.float32
    shift, scale = _columns(images, mean, std, compute)
    pixels = images.detach().to(compute).mul(scale).add_(shift).mul_(255)
    if torch.isnan(pixels).any():
        raise ValueError("images has NaN pixels, which have no colour")
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
