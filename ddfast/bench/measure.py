"""One case: verify, weigh, then time all providers in turn.

Each provider's result is checked against the definition in float64 before anything is timed; a
provider outside its tolerance is reported as wrong and not timed. Providers then run in turn, round
by round in one process and in a new random order each round, so that a machine that slows down
slows all of them; a ratio is the median of the per-round ratios. Medians and ratios have bootstrap
95 % intervals, or from fewer than six rounds the range, with the confidence that it has.
"""

from __future__ import annotations

import datetime
import gc
import math
import random
import time
from collections.abc import Callable

import torch

from ddfast.bench import ceilings as machine_ceilings
from ddfast.bench import intervals
from ddfast.bench.case import Case, has_nan, relative_error
from ddfast.bench.ceilings import Ceilings, copier
from ddfast.bench.clock import Timer, synchronize, timer
from ddfast.bench.machine import device_name, versions
from ddfast.bench.peak import weigh

COPY = "copy of as many bytes"
FEWEST_ROUNDS = 3
SHORTEST = 1e-6  # milliseconds, so that no ratio is one to zero

Row = dict[str, object]


def measure(
    case: Case,
    ceilings: Ceilings | None = None,
    milliseconds: Timer | None = None,
    seconds: float | None = None,
) -> list[Row]:
    """Verify and time one case.

    Args:
        ceilings: of the machine, for the share of its floor.
        milliseconds: of one call of a function; left out: the device's clock.
        seconds: that the timed rounds should take; fewer rounds than the case asks for if need be,
            three at least.

    Returns:
        One row for each provider, by the columns of `ddfast.bench.results` and "times_ms".
    """
    threads = torch.get_num_threads()
    milliseconds = milliseconds or timer(case.device, threads)
    rows = _verified(case)
    good = [name for name, row in rows.items() if row["verified"] == "yes"]
    for name in good:
        peak = weigh(case.providers[name], case.device)
        rows[name]["peak_mib"] = "" if peak is None else round(peak / 2**20, 2)
    # The copy is timed in turn with the rest: its buffers are as cold as theirs.
    functions = {name: case.providers[name] for name in good}
    functions[COPY] = copier(case.bytes, case.device)
    times = _timed(functions, case.rounds, milliseconds, seconds)
    copied = times.pop(COPY)
    baseline = times.get(next(iter(case.providers)))
    for name in good:
        rows[name] |= _figures(case, times[name], copied, baseline, ceilings)
    constant = {
        "operator": case.operator,
        "case": case.name,
        "mode": case.mode,
        "size": case.size,
        "dtype": case.dtype,
        "threads": threads,
        "device": device_name(case.device),
        "date": datetime.date.today().isoformat(),
    }
    return [constant | versions() | {"provider": name} | row for name, row in rows.items()]


def _verified(case: Case) -> dict[str, Row]:
    """Every provider's first call and error."""
    exact = case.exact()
    rows: dict[str, Row] = {}
    for name, f in case.providers.items():
        start = time.perf_counter()
        try:
            result = f()
            synchronize(case.device)
            first = (time.perf_counter() - start) * 1e3
            found = (case.error or relative_error)(result, exact)
            found = math.nan if has_nan(result) else found
        except Exception as problem:
            said = " ".join(str(problem).split())[:200]
            rows[name] = {"verified": f"failed: {type(problem).__name__}: {said}"}
            continue
        # Not `found > tolerance`: NaN is wrong, too.
        good = found <= case.tolerance
        rows[name] = {
            "first_call_ms": round(first, 3),
            "max_relative_error": f"{found:.2g}",
            "verified": "yes" if good else f"WRONG (allowed {case.tolerance:g})",
        }
    return rows


def _timed(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    milliseconds: Timer,
    seconds: float | None,
) -> dict[str, list[float]]:
    """Milliseconds of each function in each round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    # Twice: the second round of calls finds memory and caches as the timed ones do.
    for _ in range(2):
        one_round = sum(milliseconds(f) for f in functions.values()) / 1e3
        if seconds is not None and 2 * one_round > seconds:
            break
    if seconds is not None:
        rounds = min(rounds, max(int(seconds / max(one_round, 1e-9)), FEWEST_ROUNDS))
    order = random.Random(0)
    gc.collect()  # rather than in the middle of a call
    for _ in range(rounds):
        # Who comes after whom changes from round to round: a cold cache is shared by all.
        for name in order.sample(list(functions), len(functions)):
            times[name].append(max(milliseconds(functions[name]), SHORTEST))
    return times


def _figures(
    case: Case,
    times: list[float],
    copied: list[float],
    baseline: list[float] | None,
    ceilings: Ceilings | None,
) -> Row:
    """The columns that follow from the times."""
    ms, low, high = intervals.median(times)
    row: Row = {
        "median_ms": round(ms, 4),
        "low_ms": round(low, 4),
        "high_ms": round(high, 4),
        "interval": intervals.label(len(times)),
        "rounds": len(times),
        "gigabytes_per_second": float(f"{case.bytes / ms / 1e6:.4g}"),
        "share_of_copy": round(intervals.median(copied)[0] / ms, 2),
        "times_ms": times,
    }
    if case.flops:
        row["gigaflops_per_second"] = float(f"{case.flops / ms / 1e6:.4g}")
    if baseline is not None:
        ratio, low, high = intervals.ratio(baseline, times)
        row |= {
            "ratio_to_eager": round(ratio, 2),
            "ratio_low": round(low, 2),
            "ratio_high": round(high, 2),
        }
    if ceilings is not None:
        least, bound = machine_ceilings.floor(ceilings, case.bytes, case.flops, case.dtype)
        row |= {
            "floor_ms": float(f"{least:.3g}"),
            "share_of_floor": float(f"{least / ms:.3g}"),
            "bound": bound,
        }
    return row
