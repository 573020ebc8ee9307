"""Timing that can be believed: verify, interleave, take medians, state threads and machine.

Every benchmark in this folder builds `Case`s and hands them to `run`. Each provider's result is
checked against the first one's, the definition in float64, before anything is timed; a provider
outside its tolerance is reported as wrong and not timed. Providers then run in turn, round by round
in one process, so that a machine that slows down slows all of them, and a ratio is the median of
the per-round ratios. On CPU the clock is the calling thread's own when one thread is used (other
processes then steal less of the figure), else the wall clock; on CUDA, events.
"""

from __future__ import annotations

import datetime
import random
import statistics
import time
from collections.abc import Callable

import torch

import ddfast
from ddfast.bench.case import Case, relative_error
from ddfast.bench.machine import commit, device_name

COPY = "copy of as many bytes"


def timed(f: Callable[[], object], device: str, threads: int) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    # A provider that works in threads of its own names its clock.
    clock = getattr(f, "clock", time.thread_time if threads == 1 else time.perf_counter)
    start = clock()
    f()
    return (clock() - start) * 1e3


def copier(bytes_moved: int, device: str) -> Callable[[], object]:
    """A copy between two buffers that reads and writes so many bytes in all."""
    count = max(bytes_moved // 8, 1)
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    return lambda: target.copy_(source)


def measure(case: Case) -> list[dict[str, object]]:
    """Verify and time one case; one row a provider."""
    threads = torch.get_num_threads()
    exact = case.exact()
    rows: dict[str, dict[str, object]] = {}
    for name, f in case.providers.items():
        start = time.perf_counter()
        try:
            result = f()
        except Exception as problem:
            print(f"  {name}: failed: {type(problem).__name__}: {str(problem)[:200]}")
            rows[name] = {"verified": f"failed: {type(problem).__name__}"}
            continue
        first = (time.perf_counter() - start) * 1e3
        found = (case.error or relative_error)(result, exact)
        good = found <= case.tolerance
        rows[name] = {
            "first_call_ms": round(first, 3),
            "max_relative_error": f"{found:.2g}",
            "verified": "yes" if good else f"WRONG (allowed {case.tolerance:g})",
        }
    timed_names = [n for n, r in rows.items() if r["verified"] == "yes"]
    # The ceiling is measured in turn with the rest: its buffers are as cold as theirs.
    functions = {n: case.providers[n] for n in timed_names} | {
        COPY: copier(case.bytes, case.device)
    }
    times: dict[str, list[float]] = {n: [] for n in functions}
    order = random.Random(0)
    for _ in range(2):
        for f in functions.values():
            f()
    for _ in range(case.rounds):
        # Who comes after whom changes from round to round: a cold cache is shared by all.
        for n in order.sample(list(functions), len(functions)):
            times[n].append(timed(functions[n], case.device, threads))
    copied = statistics.median(times[COPY])
    baseline = next(iter(case.providers))
    for n in timed_names:
        ms = statistics.median(times[n])
        quartiles = statistics.quantiles(times[n], n=4)
        rate = case.bytes / ms / 1e6
        rows[n] |= {
            "median_ms": round(ms, 4),
            "low_ms": round(quartiles[0], 4),
            "high_ms": round(quartiles[2], 4),
            "gigabytes_per_second": round(rate, 2),
            "share_of_copy": round(copied / ms, 2),
        }
        if case.flops:
            rows[n]["gigaflops_per_second"] = round(case.flops / ms / 1e6, 1)
        if baseline in times:
            ratios = [b / t for b, t in zip(times[baseline], times[n], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            rows[n] |= {
                "ratio_to_eager": round(statistics.median(ratios), 2),
                "ratio_low": round(quartiles[0], 2),
                "ratio_high": round(quartiles[2], 2),
            }
    constant = {
        "operator": case.operator,
        "case": case.name,
        "mode": case.mode,
        "threads": threads,
        "device": device_name(case.device),
        "torch": torch.__version__,
        "ddfast": ddfast.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    return [constant | {"provider": n} | row for n, row in rows.items()]
