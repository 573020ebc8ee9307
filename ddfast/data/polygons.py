"""The images of :func:`ddfast.data.generated`: textured polygons drawn from hashes.

Every class is a handful of *prototypes*, each a textured polygon with its own colours. An image
shows one prototype of its class at a random place, size and angle, in jittered colours, on a
random wavy background, among smaller random polygons that belong to no class, under noise. A few
images of a class miss some of its prototypes and most of their variation, so they teach less than
many do.

All random numbers come from hashing (seed, class, split, index), and pixels from additions,
multiplications and table look-ups only: an image has the same bits whatever is generated with it,
in which order, on which machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ddfast.random import seed_of

__all__ = ["SPLITS", "paint_images"]

SPLITS = {"train": 0, "test": 1}
PROTOTYPES = 3  # a class
SIDES = 5  # of every polygon
DISTRACTORS = 2
NOISE = 0.08  # largest deviation of a pixel, as a part of the range 0..1

# Sine for 1024 angles. Rounded to 16 bits so that the last digit of the platform's sin cannot show.
SINE = np.array(
    [round(32767 * math.sin(2 * math.pi * step / 1024)) / 32767 for step in range(1024)],
    dtype=np.float32,
)

Polygons = dict[str, np.ndarray]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: 64 well-mixed bits from any 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash(key: np.ndarray, value: np.ndarray | int) -> np.ndarray:
    # One-dimensional at least: NumPy warns when a scalar wraps around, as these are meant to.
    step = np.atleast_1d(value).astype(np.uint64) + np.uint64(1)
    return _mix(key + step * np.uint64(0x9E3779B97F4A7C15))


def _uniform(key: np.ndarray) -> Callable[..., np.ndarray]:
    """A source of float32 numbers ``(len(key), count)``, new ones on every call."""
    drawn = 0

    def draw(low: float, high: float, count: int = 1) -> np.ndarray:
        nonlocal drawn
        bits = _hash(key[:, None], np.arange(drawn, drawn + count))
        drawn += count
        # 24 bits fit a float32 exactly.
        unit = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        return np.float32(low) + np.float32(high - low) * unit

    return draw


def _turn(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of an angle given in turns, from the table."""
    step = (angle * np.float32(1024)).astype(np.int64)
    return SINE[(step + 256) & 1023], SINE[step & 1023]


def _polygons(key: np.ndarray, channels: int) -> Polygons:
    """Random textured polygons in their own coordinates, roughly of radius 1."""
    draw = _uniform(key)
    # Normals point all around with some disorder, else the polygon would be open.
    angle = (np.arange(SIDES, dtype=np.float32) + draw(-0.35, 0.35, SIDES)) / np.float32(SIDES)
    return {
        "angle": angle + draw(0, 1),
        "distance": draw(0.5, 1.0, SIDES),
        "wave_angle": draw(0, 1, 2),
        "frequency": draw(0.4, 1.3, 2),
        "contrast": draw(0.5, 1.0),
        "colours": draw(0, 1, 2 * channels),
    }


def _linear(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """``a x + b y + c`` on the pixel grid: ``(n, size, size)`` from coefficients ``(n,)``."""
    across = a[:, None] * axis
    down = b[:, None] * axis + c[:, None]
    return across[:, None, :] + down[:, :, None]


def _wave(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """A plane wave in -1..1 along ``(a, b)``, which count periods per unit of length."""
    phase = _linear(a * 1024, b * 1024, c * 1024, axis)
    return SINE[phase.astype(np.int32) & 1023]


def _paint(
    canvas: np.ndarray,
    shape: Polygons,
    place: np.ndarray,
    radius: np.ndarray,
    angle: np.ndarray,
    colours: np.ndarray,
    axis: np.ndarray,
) -> None:
    """Blend polygons into ``canvas`` ``(n, channels, size, size)``; ``place`` is ``(n, 2)``."""
    size = len(axis)
    x, y = place[:, 0], place[:, 1]
    edge: np.ndarray | None = None
    for side in range(SIDES):
        normal_x, normal_y = _turn(shape["angle"][:, side] + angle)
        beyond = _linear(
            normal_x,
            normal_y,
            -(normal_x * x + normal_y * y) - radius * shape["distance"][:, side],
            axis,
        )
        edge = beyond if edge is None else np.maximum(edge, beyond, out=edge)
    assert edge is not None
    # Covered from 0 to 1 across one pixel, which is 2 / size long.
    cover = np.clip(np.float32(0.5) - edge * np.float32(size / 2), 0, 1)
    texture = np.ones_like(cover)
    for wave in range(2):
        along_x, along_y = _turn(shape["wave_angle"][:, wave] + angle)
        frequency = shape["frequency"][:, wave] / radius
        along_x, along_y = along_x * frequency, along_y * frequency
        texture = texture * _wave(along_x, along_y, -(along_x * x + along_y * y), axis)
    mixture = np.float32(0.5) + (np.float32(0.5) * shape["contrast"])[:, :, None] * texture
    channels = canvas.shape[1]
    for channel in range(channels):
        first = colours[:, channel, None, None]
        second = colours[:, channels + channel, None, None]
        plane = canvas[:, channel]
        plane += cover * (first + (second - first) * mixture - plane)


def paint_images(
    seed: int, split: str, labels: np.ndarray, indices: np.ndarray, size: int, channels: int
) -> np.ndarray:
    """uint8 ``(n, channels, size, size)`` for ``n`` labels and indices."""
    number = len(labels)
    axis = ((2 * np.arange(size, dtype=np.float32) + 1) / np.float32(size) - 1).astype(np.float32)
    root = np.array([seed_of(seed, "generated images")], dtype=np.uint64)
    class_key = _hash(root, labels)
    key = _hash(_hash(class_key, SPLITS[split]), indices)
    draw = _uniform(_hash(key, 0))

    canvas = np.empty((number, channels, size, size), dtype=np.float32)
    base, swing = draw(0.3, 0.7, channels), draw(-0.15, 0.15, channels)
    cosine, sine = _turn(draw(0, 1)[:, 0])
    frequency = draw(0.3, 2.5)[:, 0]
    wave = _wave(cosine * frequency, sine * frequency, draw(0, 1)[:, 0], axis)
    for channel in range(channels):
        canvas[:, channel] = base[:, channel, None, None] + swing[:, channel, None, None] * wave

    for distractor in range(DISTRACTORS):
        other = _polygons(_hash(key, 100 + distractor), channels)
        place, radius = draw(-1, 1, 2), draw(0.15, 0.35)[:, 0]
        angle = draw(0, 1)[:, 0]
        _paint(canvas, other, place, radius, angle, other["colours"], axis)

    prototype = (draw(0, PROTOTYPES)[:, 0]).astype(np.int64)
    shape = _polygons(_hash(_hash(class_key, 1000), prototype), channels)
    place, radius = draw(-0.35, 0.35, 2), draw(0.55, 0.95)[:, 0]
    angle = draw(-0.12, 0.12)[:, 0] + 1
    colours = shape["colours"] + draw(-0.1, 0.1, 2 * channels)
    _paint(canvas, shape, place, radius, angle, colours, axis)

    # One 64-bit hash is noise for eight values.
    values = channels * size * size
    bits = _hash(_hash(key, 200)[:, None], np.arange(-(-values // 8)))
    noise = bits.astype("<u8").view(np.uint8)[:, :values].reshape(canvas.shape)
    canvas *= draw(0.8, 1.2)[:, :, None, None]
    canvas += (noise.astype(np.float32) - np.float32(127.5)) * np.float32(NOISE / 127.5)
    return np.clip(np.rint(canvas * np.float32(255)), 0, 255).astype(np.uint8)
