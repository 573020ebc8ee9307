"""Medians and their intervals."""

from __future__ import annotations

import numpy
import pytest

from ddfast.bench import intervals


def test_one_value_has_no_width():
    assert intervals.median([3.0]) == (3.0, 3.0, 3.0)


def test_the_median_is_within():
    middle, low, high = intervals.median([5.0, 1.0, 2.0, 9.0, 3.0, 4.0, 7.0])
    assert middle == 4.0 and 1.0 <= low < 4.0 < high <= 9.0


def test_the_same_times_give_the_same_interval():
    random = numpy.random.default_rng(3)
    samples = [list(random.normal(size=40)) for _ in range(20)]
    assert list(map(intervals.median, samples)) == list(map(intervals.median, samples))


def test_intervals_hold_what_they_promise():
    random = numpy.random.default_rng(1)
    held = 0
    for _ in range(200):
        _, low, high = intervals.median(list(random.lognormal(size=21)))
        held += low <= 1.0 <= high
    # 95 % of 200, three standard deviations of a binomial off at most.
    assert 180 <= held <= 199


def test_a_ratio_is_taken_round_by_round():
    # The machine slows down by a thousand, and the other takes half as long in every round.
    baseline = [1.0, 10.0, 100.0, 1000.0, 1.0, 10.0]
    assert intervals.ratio(baseline, [t / 2 for t in baseline]) == (2.0, 2.0, 2.0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="values: got none"):
        intervals.median([])
    with pytest.raises(ValueError, match="other: got 1 times, expected 2"):
        intervals.ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("rounds", "label"), [(3, "75%"), (5, "94%"), (6, "95%"), (51, "95%")])
def test_few_rounds_do_not_promise_more_than_they_hold(rounds, label):
    assert intervals.label(rounds) == label
    random = numpy.random.default_rng(2)
    times = random.normal(size=rounds)
    low, high = intervals.median(list(times))[1:]
    if rounds < intervals.FEWEST:
        assert (low, high) == (times.min(), times.max())
