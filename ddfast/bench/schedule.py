"""Benchmark after benchmark, size after size, within a budget of time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddfast.bench import allocator
from ddfast.bench.case import Case
from ddfast.bench.registry import Options, cases_of
from ddfast.bench.sizes import Size

EXPECTED = 3  # cases of a benchmark at a size: forward, backward, double
QUICK_ROUNDS = 9
CASE_SECONDS = 30.0  # for the rounds of a case without a budget, unless three take longer

Unit = tuple[str, Size | None]
"""A benchmark and a size, or None for its published cases."""


@dataclass(frozen=True)
class Done:
    """What came of one case, or of a unit that has ended.

    Attributes:
        unit: of which the case is.
        rows: of the case; of a case that could not be built, one that says so.
        ended: the unit has no more cases.
        left_out: it has, but no time was left.
    """

    unit: Unit
    rows: list[dict[str, Any]]
    ended: bool = False
    left_out: bool = False


def measured(
    units: Sequence[Unit],
    options: Options,
    timed: Callable[[Case, float], list[dict[str, Any]]],
    clock: Callable[[], float],
    budget: float | None = None,
    modes: Sequence[str] | None = None,
) -> Iterator[Done]:
    """Measure all cases of all units, one after the other.

    Every unit gets an equal share of the time that is left when it begins, and measures one case
    at least; what it does not need goes to those after it.

    Args:
        timed: from a case and the seconds that its rounds should take to its rows.
        clock: seconds.
        budget: seconds in all; None: as long as it takes.
        modes: the only ones to measure; None: all.
    """
    end = None if budget is None else clock() + budget
    # What is there already, PyTorch's modules mostly, need not be looked at by every collection.
    gc.collect()
    gc.freeze()
    try:
        for at, unit in enumerate(units):
            share = None if end is None else (end - clock()) / (len(units) - at)
            yield from _unit(unit, options, timed, clock, share, modes)
    finally:
        gc.unfreeze()


def _unit(
    unit: Unit,
    options: Options,
    timed: Callable[[Case, float], list[dict[str, Any]]],
    clock: Callable[[], float],
    share: float | None,
    modes: Sequence[str] | None,
) -> Iterator[Done]:
    begun, made, left_out = clock(), 0, False
    try:
        for case in cases_of(*unit, options):
            if modes is not None and case.mode not in modes:
                continue
            seconds = CASE_SECONDS
            if share is not None:
                left = begun + share - clock()
                if made and left <= 0:
                    left_out = True
                    break
                seconds = max(left, 0.0) / max(EXPECTED - made, 2)
            if options.quick:
                case.rounds = min(case.rounds, QUICK_ROUNDS)
            case.mode += allocator.label()
            rows = timed(case, seconds)
            made += 1
            del case
            _tidy(options.device)
            yield Done(unit, rows)
    except Exception as problem:
        said = " ".join(str(problem).split())[:200]
        row = {"operator": unit[0], "case": "next case" if made else "", "mode": "", "provider": ""}
        yield Done(unit, [row | {"verified": f"failed: {type(problem).__name__}: {said}"}])
    _tidy(options.device)
    yield Done(unit, [], ended=True, left_out=left_out)


def _tidy(device: str) -> None:
    """What a case leaves behind must not weigh on the next."""
    if "torch._dynamo" in sys.modules:
        # Past some shapes of one function torch.compile silently stops compiling it.
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
