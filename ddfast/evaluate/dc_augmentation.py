"""The augmentation of DC's evaluation: for each image one of crop, scale, rotate, noise.

Only the `dc` protocol uses it, on MNIST and with batch normalisation. What the official code does:
crops move by -4 to 3 pixels and fill with the channel means of the batch; scales lie between 0.8
and 1.2, each axis its own, by nearest neighbours, and fill with 0; rotations are by whole degrees
from -45 to 44, by cubic splines, and fill with the mean of the batch; noise has a standard
deviation of 0.001.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["OPERATIONS", "dc_augment", "dc_operations", "rotated"]

OPERATIONS = ("crop", "scale", "rotate", "noise")
CROP = 4
SCALE = 0.2
ROTATE = 45
NOISE = 0.001


def dc_operations(strategy: str) -> list[str]:
    """The operations a strategy names.

    Raises:
        ValueError: an unknown operation.
    """
    names = strategy.split("_")
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(
                f"strategy must consist of {', '.join(OPERATIONS)}, got {name!r} in {strategy!r}"
            )
    return names


def dc_augment(images: Tensor, strategy: str, generator: torch.Generator) -> Tensor:
    """One operation for each image, drawn with equal chances from the strategy.

    Args:
        images: floating-point `(N, channels, H, W)`, normalised; not changed.
        strategy: names out of `OPERATIONS`, joined by `_`.
        generator: a CPU generator.

    Returns:
        A new tensor of the same shape; no gradients.

    Raises:
        ValueError: an unknown operation.
    """
    names = dc_operations(strategy)
    count, _, height, width = images.shape
    chosen = torch.randint(len(names), (count,), generator=generator)
    out = images.detach().clone()
    means = images.detach().mean((0, 2, 3))
    for place, name in enumerate(names):
        which = (chosen == place).nonzero()[:, 0]
        if not len(which):
            continue
        here = which.to(images.device)
        x = out[here]
        if name == "crop":
            rows, columns = (
                torch.arange(side) + torch.randint(-CROP, CROP, (len(x), 1), generator=generator)
                for side in (height, width)
            )
            x = _picked(x, rows, columns, means)
        elif name == "scale":
            low, span = 1 - SCALE, 2 * SCALE
            factors = low + span * torch.rand((2, len(x)), generator=generator, dtype=torch.float64)
            sizes = (factors * torch.tensor([[height], [width]])).long()
            rows, columns = _scaled(sizes, (height, width))
            x = _picked(x, rows, columns, torch.zeros_like(means))
        elif name == "rotate":
            degrees = torch.randint(-ROTATE, ROTATE, (len(x),), generator=generator)
            x = rotated(x, degrees, means.mean())
        else:
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + NOISE * noise.to(x)
        out[here] = x
    return out


def _picked(x: Tensor, rows: Tensor, columns: Tensor, fill: Tensor) -> Tensor:
    """Pixels at `rows` `(N, H)` and `columns` `(N, W)`; outside, the channel's `fill`."""
    height, width = x.shape[2:]
    rows, columns = rows.to(x.device), columns.to(x.device)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2)
    inside = inside & ((columns >= 0) & (columns < width)).unsqueeze(1)
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    # The indexed dimensions come first: (N, H, W, channels).
    picked = x[
        image, :, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    ]
    return torch.where(inside.unsqueeze(1), picked.permute(0, 3, 1, 2), fill.view(1, -1, 1, 1))


def _scaled(sizes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Source rows and columns after scaling to `sizes` `(2, N)`, both centred on one canvas."""
    canvas = torch.maximum(sizes.amax(0), torch.tensor(max(size))).unsqueeze(1)
    found = []
    for new, side in zip(sizes, size, strict=True):
        new = new.unsqueeze(1)
        place = torch.arange(side) + (canvas - side) // 2 - (canvas - new) // 2
        # Nearest neighbours: the source of pixel i of n is floor(i * side / n).
        source = torch.div(place * side, new, rounding_mode="floor")
        found.append(torch.where((place >= 0) & (place < new), source, -1))
    return found[0], found[1]


def rotated(x: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Each image turned about its centre and cut to its size, as `scipy.ndimage.rotate` does.

    Cubic B-splines with mirrored borders; outside the image, `fill`.

    Args:
        x: floating-point `(N, channels, H, W)`.
        degrees: int64 `(N,)`.
        fill: one number.
    """
    height, width = x.shape[2:]
    coefficients = _prefilter(height).to(x) @ x @ _prefilter(width).to(x).T
    # Few angles, many images: the geometry of each angle is worked out once.
    out = torch.empty_like(x)
    for angle in degrees.unique().tolist():
        which = (degrees == angle).nonzero()[:, 0].to(x.device)
        row, column, inside = _turned(angle, height, width)
        (row_taps, row_weights), (column_taps, column_weights) = (
            _taps(row, height),
            _taps(column, width),
        )
        taps = (row_taps.unsqueeze(-1) * width + column_taps.unsqueeze(-2)).to(x.device)
        weights = (row_weights.unsqueeze(-1) * column_weights.unsqueeze(-2)).to(x)
        planes = coefficients[which].flatten(2)[:, :, taps.flatten()]
        turned = (planes.view(*planes.shape[:2], height, width, 16) * weights.flatten(2)).sum(-1)
        out[which] = torch.where(inside.to(x.device), turned, fill.to(x))
    return out


@functools.lru_cache(maxsize=16)
def _prefilter(side: int) -> Tensor:
    """From samples to the coefficients of the cubic B-spline through them: (side, side)."""
    spline = torch.eye(side, dtype=torch.float64) * 4
    for place in range(side):
        for neighbour in (place - 1, place + 1):
            mirrored = abs(neighbour) if neighbour < side else 2 * (side - 1) - neighbour
            spline[place, max(mirrored, 0)] += 1
    return torch.linalg.inv(spline / 6)


def _turned(angle: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pixels of the turned and cropped image lie in the original, and whether inside."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # The turned image in full, of which the middle is kept.
    tall = int(height * abs(cos) + width * abs(sin) + 0.5)
    wide = int(width * abs(cos) + height * abs(sin) + 0.5)
    down = torch.arange(height, dtype=torch.float64) + int((tall - height) / 2) - (tall - 1) / 2
    right = torch.arange(width, dtype=torch.float64) + int((wide - width) / 2) - (wide - 1) / 2
    row = cos * down[:, None] + sin * right[None] + (height - 1) / 2
    column = -sin * down[:, None] + cos * right[None] + (width - 1) / 2
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    return row, column, inside


def _taps(position: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The four coefficients under a cubic B-spline at `position`, mirrored at the borders."""
    first = position.floor()
    t = position - first
    weights = torch.stack(
        (
            (1 - t) ** 3 / 6,
            (4 - 6 * t**2 + 3 * t**3) / 6,
            (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6,
            t**3 / 6,
        ),
        -1,
    )
    taps = first.long().unsqueeze(-1) + torch.arange(-1, 3)
    period = max(1, 2 * (side - 1))
    taps = taps.remainder(period)
    return torch.where(taps < side, taps, period - taps), weights
