"""The command line of one file of benchmarks, which measures its published cases."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ddfast.bench import allocator
from ddfast.bench.case import Case
from ddfast.bench.ceilings import in_words, measure_ceilings
from ddfast.bench.clock import timer
from ddfast.bench.measure import measure
from ddfast.bench.results import append, block


def run(cases: Callable[[Any], Iterable[Case]], description: str) -> None:
    """Command line of one benchmark file: measure its cases, print them, append to a CSV.

    Args:
        cases: of the options.
        description: for the help.
    """
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
    milliseconds = timer(options.device, options.threads)
    ceilings = measure_ceilings(options.device, milliseconds)
    print(in_words(ceilings), file=sys.stderr)
    gc.freeze()  # PyTorch's modules need not be looked at by every collection
    try:
        for case in cases(options):
            if options.only not in f"{case.name}; {case.mode}":
                continue
            case.mode += allocator.label()
            if options.quick:
                case.rounds = min(case.rounds, 5)
            rows = measure(case, ceilings, milliseconds)
            print(block(rows), flush=True)
            if options.out is not None:
                append(options.out, rows)
    finally:
        gc.unfreeze()
