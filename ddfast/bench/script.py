"""The command line of one file of benchmarks, which measures its published cases."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ddfast.bench import allocator
from ddfast.bench.case import Case
from ddfast.bench.measure import measure
from ddfast.bench.results import append, table


def run(cases: Callable[[argparse.Namespace], Iterable[Case]], description: str) -> None:
    """Command line of one benchmark file: measure its cases, print the table, append to a CSV."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="append the rows to this CSV file")
    parser.add_argument("--quick", action="store_true", help="few rounds, small cases only")
    parser.add_argument("--only", default="", help="cases whose name and mode contain this")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(allocator.FLAG, action="store_true", help="raise glibc's thresholds first")
    options = parser.parse_args()
    if options.tuned_allocator:
        allocator.start_again()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for case in cases(options):
        if allocator.tuned():
            case.mode += "; allocator tuned"
        if options.only not in f"{case.name}; {case.mode}":
            continue
        if options.quick:
            case.rounds = min(case.rounds, 5)
        print(f"{case.operator}: {case.name}, {case.mode}", file=sys.stderr, flush=True)
        rows += measure(case)
    print(table(rows))
    if options.out is not None:
        append(options.out, rows)
