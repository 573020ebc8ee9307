"""Timing that can be believed: verify, interleave, take medians, state threads and machine.

Every benchmark in this folder builds `Case`s and hands them to `run`. Each provider's result is
checked against the first one's, the definition in float64, before anything is timed; a provider
outside its tolerance is reported as wrong and not timed. Providers then run in turn, round by round
in one process, so that a machine that slows down slows all of them, and a ratio is the median of
the per-round ratios. On CPU the clock is the calling thread's own when one thread is used (other
processes then steal less of the figure), else the wall clock; on CUDA, events.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import ddfast
from ddfast.testing import error, flatten

COPY = "copy of as many bytes"
COLUMNS = [
    "operator",
    "case",
    "provider",
    "mode",
    "median_ms",
    "low_ms",
    "high_ms",
    "ratio_to_eager",
    "ratio_low",
    "ratio_high",
    "gigabytes_per_second",
    "share_of_copy",
    "first_call_ms",
    "max_relative_error",
    "verified",
    "threads",
    "device",
    "torch",
    "ddfast",
    "commit",
    "date",
    "gigaflops_per_second",
]


@dataclass
class Case:
    """One row group: the same work done by several providers.

    Attributes:
        exact: called once; the result in float64 that every provider is judged by.
        providers: name -> function without arguments; the first is the baseline ("eager").
        bytes: the fewest bytes the work must move, inputs read once and outputs written once.
        tolerance: largest allowed error relative to the largest entry of each result.
        error: another measure of a result's error than that, from (result, exact).
        flops: floating-point operations of the work, where arithmetic is what bounds it.
    """

    operator: str
    name: str
    mode: str
    exact: Callable[[], object]
    providers: dict[str, Callable[[], object]]
    bytes: int
    tolerance: float = 1e-4
    rounds: int = 15
    device: str = "cpu"
    error: Callable[[object, object], float] | None = None
    flops: int = 0
    rows: list[dict[str, object]] = field(default_factory=list)


def relative_error(result: object, exact: object) -> float:
    """Largest error over all tensors, each relative to its own largest entry."""
    worst = 0.0
    for ours, wanted in zip(flatten(result), flatten(exact), strict=True):  # type: ignore[arg-type]
        scale = float(wanted.detach().abs().max()) if wanted.numel() else 1.0
        worst = max(worst, error(ours, wanted) / (scale or 1.0))
    return worst


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


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return (
                    line.split(":", 1)[1].strip() + f", {torch.backends.cpu.get_cpu_capability()}"
                )
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, '+' behind it if files differ; empty outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def table(rows: Iterable[dict[str, object]]) -> str:
    """The rows as aligned text."""
    rows = list(rows)
    names = ["case", "mode", "provider", "median_ms", "ratio_to_eager", "share_of_copy", "verified"]
    if any("gigaflops_per_second" in row for row in rows):
        names.insert(5, "gigaflops_per_second")
    lines = [names] + [[str(row.get(n, "")) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def run(cases: Callable[[argparse.Namespace], Iterable[Case]], description: str) -> None:
    """Command line of one benchmark file: measure its cases, print the table, append to a CSV."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="append the rows to this CSV file")
    parser.add_argument("--quick", action="store_true", help="few rounds, small cases only")
    parser.add_argument("--only", default="", help="cases whose name and mode contain this")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for case in cases(options):
        if options.only not in f"{case.name}; {case.mode}":
            continue
        if options.quick:
            case.rounds = min(case.rounds, 5)
        print(f"{case.operator}: {case.name}, {case.mode}", file=sys.stderr, flush=True)
        rows += measure(case)
    print(table(rows))
    if options.out is not None:
        append(options.out, rows)


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def compiled(f: Callable[..., object]) -> Callable[..., object]:
    """torch.compile for one shape: no silent switch to dynamic shapes."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    return torch.compile(f, fullgraph=False)


__all__ = ["Case", "Tensor", "compiled", "run"]
