"""One case: what is verified, what is timed, and what the columns say. Time itself is made up."""

from __future__ import annotations

import itertools

import pytest
import torch

from ddfast.bench import Case
from ddfast.bench.ceilings import Ceilings
from ddfast.bench.clock import timer
from ddfast.bench.measure import COPY, measure
from ddfast.bench.peak import weigh


def case(providers, **more):
    return Case(
        "adding", "2 numbers", "forward", lambda: torch.tensor(3.0), providers, bytes=8, **more
    )


def right():
    return torch.tensor(3.0)


def also_right():
    return torch.tensor(3.0)


def takes(milliseconds):
    """A clock that knows how long each function takes, and calls it."""

    def timed(f):
        f()
        return milliseconds.get(f, 1.0)

    return timed


def by_provider(rows):
    return {row["provider"]: row for row in rows}


def test_times_ratios_and_shares():
    ceilings = Ceilings({1 << 20: 8e-6}, {"float32": 1e-3})
    times = takes({right: 4.0, also_right: 2.0})
    found = measure(case({"eager": right, "ddfast": also_right}, flops=100), ceilings, times)
    rows = by_provider(found)
    assert [row["provider"] for row in found] == ["eager", "ddfast"]
    assert rows["eager"]["ratio_to_eager"] == 1.0
    ours = rows["ddfast"]
    assert (ours["median_ms"], ours["low_ms"], ours["high_ms"]) == (2.0, 2.0, 2.0)
    assert (ours["ratio_to_eager"], ours["ratio_low"], ours["ratio_high"]) == (2.0, 2.0, 2.0)
    assert ours["interval"] == "95%" and ours["rounds"] == 15 == len(ours["times_ms"])
    assert ours["share_of_copy"] == 0.5  # the copy takes 1 ms by this clock
    # 8 bytes at 8e-6 GB/s take 1 ms, 100 operations at 1e-3 GFLOP/s 0.1 ms.
    assert (ours["floor_ms"], ours["bound"], ours["share_of_floor"]) == (1.0, "bandwidth", 0.5)
    assert ours["verified"] == "yes" and ours["commit"] == rows["eager"]["commit"]
    assert {"torch", "triton", "numpy", "python", "level", "device", "threads"} <= set(ours)


@pytest.mark.parametrize("value", [3.1, float("nan")])
def test_a_wrong_provider_is_not_timed(value):
    calls = []

    def wrong():
        calls.append(1)
        return torch.tensor(value)

    rows = by_provider(measure(case({"eager": right, "ddfast": wrong}), milliseconds=takes({})))
    assert rows["ddfast"]["verified"] == "WRONG (allowed 0.0001)"
    assert len(calls) == 1 and "median_ms" not in rows["ddfast"]
    assert rows["eager"]["verified"] == "yes"


def test_a_failing_provider_is_named_and_the_others_go_on():
    def fails():
        raise RuntimeError("no\nmemory")

    rows = by_provider(measure(case({"KeOps": fails, "ddfast": right}), milliseconds=takes({})))
    assert rows["KeOps"]["verified"] == "failed: RuntimeError: no memory"
    assert rows["ddfast"]["median_ms"] == 1.0
    # There is no ratio to a baseline that was not timed.
    assert "ratio_to_eager" not in rows["ddfast"]


def test_a_case_may_judge_errors_itself():
    judged = case({"eager": right}, error=lambda result, exact: 0.5, tolerance=0.4)
    assert measure(judged, milliseconds=takes({}))[0]["verified"] == "WRONG (allowed 0.4)"


def test_providers_take_turns_in_changing_order():
    said = []

    def timed(f):
        said.append(f)
        return 1.0

    measure(case({"eager": right, "ddfast": also_right}, rounds=12), milliseconds=timed)
    rounds = [tuple(said[i : i + 3]) for i in range(6, len(said), 3)]  # after two to warm up
    assert len(rounds) == 12
    assert all(len(set(each)) == 3 for each in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parametrize(("seconds", "rounds"), [(None, 15), (100.0, 15), (0.03, 10), (0.0, 3)])
def test_rounds_follow_from_the_time_that_is_left(seconds, rounds):
    one = measure(case({"eager": right}), None, takes({right: 2.0}), seconds)[0]
    assert one["rounds"] == rounds  # a round is 2 ms and the copy's 1 ms


def test_a_provider_may_have_a_clock_of_its_own():
    def slow():
        return torch.tensor(3.0)

    seconds = itertools.count(step=0.25)
    slow.clock = lambda: next(seconds)
    row = measure(case({"eager": slow}), milliseconds=timer("cpu", 1))[0]
    assert row["median_ms"] == 250.0


def test_memory_beyond_what_was_held():
    kept = torch.ones(1 << 22)

    def holds_two():
        first = kept + 1
        return (first + 1).sum()

    found = weigh(holds_two, "cpu")
    if found is None:
        pytest.skip("the system does not tell a process's peak")
    assert 31 << 20 < found < 40 << 20
    assert weigh(lambda: None, "cpu") < 1 << 20  # the peak before is forgotten


def test_the_copy_is_no_row():
    rows = measure(case({"eager": right}), milliseconds=takes({}))
    assert COPY not in by_provider(rows)
