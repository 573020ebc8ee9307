"""Old against new: the ratio's interval and when something is said."""

from __future__ import annotations

import pytest

from ddfast.bench.compare import compare, ratio, text


def row(provider="ddfast", ms=(1.0, 0.9, 1.1), beside=(4.0, 3.8, 4.2), **more):
    return {
        "operator": "mmd",
        "case": "gaussian",
        "mode": "forward",
        "size": "",
        "provider": provider,
        "threads": 1,
        "device": "some processor",
        "verified": "yes",
        "interval": "95%",
        "rounds": 15,
        **dict(zip(("median_ms", "low_ms", "high_ms"), ms, strict=True)),
        **dict(zip(("ratio_to_eager", "ratio_low", "ratio_high"), beside, strict=True)),
        **more,
    }


BASELINE = row("eager", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))


def verdict(old, new):
    """Of the second row of a case, whose first is the baseline."""
    baseline, found = compare([BASELINE, old], [BASELINE, new])
    assert baseline.verdict == "baseline" and baseline.beside is None
    return found.verdict


def test_ratio_of_two_intervals():
    middle, low, high = ratio((2.0, 1.0, 4.0), (1.0, 1.0, 1.0))
    assert (middle, low, high) == (pytest.approx(2), pytest.approx(1), pytest.approx(4))
    # Both are uncertain by a factor of 2: together by 2 to the power of the square root of 2.
    middle, low, high = ratio((2.0, 1.0, 4.0), (1.0, 0.5, 2.0))
    assert (low, high) == (pytest.approx(2 / 2**2**0.5), pytest.approx(2 * 2**2**0.5))


def test_faster_and_slower_need_both_intervals():
    fast = row(ms=(0.5, 0.45, 0.55), beside=(8.0, 7.5, 8.5))
    assert verdict(row(), fast) == "faster"
    assert verdict(fast, row()) == "slower"
    # The machine is twice as fast: beside the baseline nothing changed.
    assert verdict(row(), row(ms=(0.5, 0.45, 0.55))) == "same"
    # The times' intervals overlap too much.
    assert verdict(row(), row(ms=(0.95, 0.85, 1.05), beside=(8.0, 7.5, 8.5))) == "same"
    assert verdict(row(), row()) == "same"


def test_the_baseline_is_not_judged():
    new = row("eager", (2.0, 2.0, 2.0), (1.0, 1.0, 1.0))
    found = compare([BASELINE], [new])
    assert found[0].verdict == "baseline"
    assert "baselines: 0.5 x as fast as before" in text(found)


def test_without_a_baseline_the_times_decide():
    none = {"ratio_to_eager": "", "ratio_low": "", "ratio_high": ""}
    assert verdict(row(**none), row(ms=(0.5, 0.45, 0.55), **none)) == "faster"


def test_no_verdict_where_none_can_be_given():
    fast = {"ms": (0.5, 0.45, 0.55), "beside": (8.0, 7.5, 8.5)}
    assert verdict(row(device="another"), row(**fast)) == "another machine"
    assert verdict(row(interval=""), row(**fast)) == "no intervals"
    assert verdict(row(rounds=5), row(**fast)) == "too few rounds"
    found = compare([row(device="another")], [BASELINE, row(**fast)])
    assert "warning: the older file is of another machine" in text(found)


def test_only_what_is_in_both_and_was_timed():
    assert compare([row(threads=2)], [row()]) == []
    assert compare([row(verified="WRONG (allowed 1e-05)", median_ms="")], [row()]) == []
    assert "no row of the older file" in text([])


def test_rows_as_a_csv_file_has_them():
    old = {name: str(value) for name, value in row().items()}
    assert verdict(old, row(ms=(0.5, 0.45, 0.55), beside=(8.0, 7.5, 8.5))) == "faster"
