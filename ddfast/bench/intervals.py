"""Medians and ratios of medians with intervals, by resampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

CONFIDENCE = 0.95
RESAMPLES = 2000

FEWEST = 6
"""Rounds below which no interval of the median reaches 95 %, as 1 - 2 ** (1 - rounds) shows."""


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """The median with its bootstrap 95 % interval: (median, low, high).

    Raises:
        ValueError: there are no values.
    """
    found = numpy.asarray(values, dtype=numpy.float64)
    if not found.size:
        raise ValueError("values: got none, expected at least one")
    # Always the same draws, from a generator of its own: the same times give the same interval.
    draws = numpy.random.default_rng(0).integers(0, found.size, (RESAMPLES, found.size))
    medians = numpy.median(found[draws], axis=1)
    low, high = numpy.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(numpy.median(found)), float(low), float(high)


def label(rounds: int) -> str:
    """What an interval of the median of so many times really is: of few, no 95 % can be had."""
    return f"{min(CONFIDENCE, 1 - 2.0 ** (1 - rounds)):.0%}"


def ratio(baseline: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast the other is, round by round: the median ratio and its interval.

    Both were timed in the same rounds, so that what slows a round down slows both.

    Raises:
        ValueError: not as many times of one as of the other, or none.
    """
    if len(baseline) != len(other):
        raise ValueError(f"other: got {len(other)} times, expected {len(baseline)} as of baseline")
    return median([b / t for b, t in zip(baseline, other, strict=True)])
