"""The definition of frequencies that are drawn and never stored: a counter-based generator.

Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011: Philox
4x32-10 turns a counter of four 32-bit words into four random words. Here the counters of features
64g .. 64g + 63 of frequency m of class c are (16g + i, m, stream + c, 0), i = 0 .. 15, and the key
is the seed, its low word first. Word w of counter i belongs to feature 64g + 16w + i: so a vector
of 16 counters makes 4 vectors of 16 features that lie side by side. Words 0 and 1, and words 2 and
3, make two normal values (Box and Muller, 1958):

    u = ((word >> 9) + 1/2) / 2^23                   never 0 or 1, exact in float32
    sqrt(-2 ln u_0) cos(2 pi u_1),   sqrt(-2 ln u_0) sin(2 pi u_1)

The words are the same everywhere; the normal values are those of float64 to a few units in the last
place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Multipliers of the first and third word, and what is added to the key in every round.
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
#: Features that one row of counters makes, and blocks among them.
GROUP, BLOCKS = 64, 16


@dataclass(frozen=True)
class Frequencies:
    """Frequencies from N(0, scale^2), generated where they are used and never stored.

    The distribution of NCFM (Wang et al., CVPR 2025) without a sampling network.

    Attributes:
        count: of the frequencies of a class.
        seed: 0 .. 2^63 - 1; the same seed gives the same frequencies.
        scale: standard deviation.
        stream: of the first class; class c has stream + c, so that a part of the classes can be
            given the frequencies it has among all of them.
    """

    count: int
    seed: int
    scale: float = 1.0
    stream: int = 0


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product, which need not fit into int64."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words of random bits per counter, all of them int64 below 2^32."""
    a, b, c, d = counter
    for step in range(10):
        low_key, high_key = ((k + step * s) & WORD for k, s in zip(key, KEY_STEPS, strict=True))
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ low_key, low_c, high_a ^ d ^ high_key, low_a
    return a, b, c, d


def words(count: int, width: int, seed: int, stream: int, classes: int, device: object) -> Tensor:
    """Random words, int64 (classes, count, groups, 4, 16): those of `width` features and more."""

    def numbers(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int64, device=device)  # type: ignore[call-overload]

    groups = -(-width // GROUP)
    c = (numbers(classes) + stream).view(-1, 1, 1, 1)
    block = numbers(groups * BLOCKS).view(1, 1, groups, BLOCKS)
    shape = torch.broadcast_tensors(block, numbers(count).view(1, -1, 1, 1), c, c * 0)
    return torch.stack(philox(tuple(shape), (seed & WORD, seed >> 32)), 3)


def frequencies(
    count: int,
    width: int,
    seed: int,
    scale: float,
    stream: int,
    classes: int,
    dtype: torch.dtype,
    device: object = "cpu",
) -> Tensor:
    """The frequencies themselves, (classes, count, width), computed in float64."""
    uniform = ((words(count, width, seed, stream, classes, device) >> 9).double() + 0.5) / 2**23
    radius = (-2 * uniform[:, :, :, 0::2].log()).sqrt()
    angle = 2 * math.pi * uniform[:, :, :, 1::2]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], 4).flatten(2)
    # (classes, count, groups, 2 pairs, 2 of a pair, 16)
    return (scale * normal[..., :width]).to(dtype)
