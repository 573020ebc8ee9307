"""`ddfast bench`: its flags, what it says, and the run that they ask for.

With argparse, so that `python -m ddfast.bench` works on a machine with little beside torch.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ddfast.bench import allocator, compare, plots, results
from ddfast.bench.case import MODES
from ddfast.bench.ceilings import Ceilings, in_words, measure_ceilings
from ddfast.bench.clock import Timer, timer
from ddfast.bench.machine import device_name, versions
from ddfast.bench.machine import in_words as machine_in_words
from ddfast.bench.measure import measure
from ddfast.bench.progress import progress
from ddfast.bench.registry import COVERS, Options, chosen, names
from ddfast.bench.schedule import Unit, measured
from ddfast.bench.sizes import SIZES, find
from ddfast.memory import parse_memory

MEMORY = {"cpu": "1GiB", "cuda": "8GiB"}
QUICK_SECONDS = 100.0
QUICK_SHARE = 16  # --quick leaves one part in so many of the memory: small cases

Row = dict[str, Any]


def run(
    words: Sequence[str],
    description: str = "",
    milliseconds: Timer | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measure what the flags ask for; print, write, compare and draw it.

    Args:
        milliseconds: of one call of a function; left out: the device's clock.
        clock: seconds, for the budget.

    Returns:
        0, or 1 where a result of ddfast was wrong or a case failed.

    Raises:
        ValueError: flags that are unknown or wrong.
        KeyboardInterrupt: as it came; what was measured until then is in the files.
    """
    options = _parsed(words, description)
    if options.list:
        print(_list())
        return 0
    if options.tuned_allocator:
        allocator.start_again()
    sizes = [None] if options.published else [find(name) for name in options.sizes]
    units: list[Unit] = [(name, size) for size in sizes for name in chosen(options.names)]
    older = results.read(options.compare) if options.compare else []
    if options.plot:
        plots.needed()
    torch.set_num_threads(options.threads)
    milliseconds = milliseconds or timer(options.device, options.threads)
    ceilings = measure_ceilings(options.device, milliseconds)
    print(machine_in_words(options.device, options.threads))
    print(in_words(ceilings), flush=True)
    rows: list[Row] = []
    try:
        left_out = _measure_all(units, options, ceilings, milliseconds, clock, rows)
    except KeyboardInterrupt:
        kept = " and ".join(str(file) for file in (options.out, options.json) if file)
        print(f"interrupted; {len(rows)} rows are in {kept or 'no file'}", file=sys.stderr)
        raise
    if left_out:
        print(f"left out, no time was left: more cases of {', '.join(left_out)}")
    if options.compare:
        print(compare.text(compare.compare(older, rows)))
    if options.plot and rows:
        for path in plots.draw(options.plot, rows, ceilings):
            print(f"{path} shows it")
    bad = [row for row in rows if _bad(row)]
    for row in bad:
        print(f"{results.heading(row)}, {row['provider']}: {row['verified']}", file=sys.stderr)
    return int(bool(bad))


def _measure_all(
    units: Sequence[Unit],
    options: argparse.Namespace,
    ceilings: Ceilings,
    milliseconds: Timer,
    clock: Callable[[], float],
    rows: list[Row],
) -> list[str]:
    """Measure, print and write case after case; returns the units that were not finished."""
    work = Options(
        options.device,
        options.threads,
        options.memory // (QUICK_SHARE if options.quick else 1),
        options.quick,
        options.no_compile,
        tuple(options.modes or MODES),
    )
    machine = versions() | {
        "device": device_name(options.device),
        "threads": options.threads,
        "ceilings": {"copies": ceilings.copies, "products": ceilings.products},
    }
    timed = functools.partial(_timed, ceilings=ceilings, milliseconds=milliseconds)
    left_out = []
    with progress(len(units), options.quiet) as bar:
        for done in measured(units, work, timed, clock, options.budget, options.modes):
            name, size = done.unit
            if done.ended:
                bar.update()
                if done.left_out:
                    left_out.append(f"{name} at {size.name}" if size else name)
                continue
            bar.write(results.block(done.rows))
            rows += done.rows
            if options.out:
                results.append(options.out, done.rows)
            if options.json:
                results.write_json(options.json, machine, rows)
    return left_out


def _timed(case: Any, seconds: float, ceilings: Ceilings, milliseconds: Timer) -> list[Row]:
    return measure(case, ceilings, milliseconds, seconds)


def _bad(row: Row) -> bool:
    """A wrong or failed result of ddfast's, or a case that could not be built."""
    ours = not row["provider"] or str(row["provider"]).startswith("ddfast")
    return ours and row["verified"] != "yes"


def _list() -> str:
    """Every benchmark and what it covers, every size."""
    lines = []
    for name in names():
        covered = ", ".join(operator for operator in COVERS.get(name, ()) if operator != name)
        lines.append(f"{name:26}{covered}".rstrip())
    lines.append("")
    for size in SIZES.values():
        lines.append(
            f"{size.name:26}{size.classes} classes, {size.channels}x{size.side}x{size.side}, "
            f"{size.batch_real} real and {size.ipc} synthetic images a class, ConvNet of width "
            f"{size.width} with {size.depth} blocks"
        )
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Errors are a ValueError of one line."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{message}; `{self.prog} --help` lists the flags")


def _parsed(words: Sequence[str], description: str) -> argparse.Namespace:
    """The flags, checked.

    Raises:
        ValueError: unknown or wrong ones.
    """
    parser = _Parser("ddfast bench", description=description, allow_abbrev=False)
    flag = parser.add_argument
    flag("names", nargs="*", metavar="NAME", help="operators, method:dm, methods (default: all)")
    flag("--list", action="store_true", help="print the names and the sizes")
    flag("--sizes", default="cifar10", metavar="NAMES", help=f"of {', '.join(SIZES)}, or all")
    flag("--modes", metavar="NAMES", help=f"of {', '.join(MODES)} (default: all)")
    flag("--published", action="store_true", help="the published tables' cases instead of a size")
    flag("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    flag("--threads", type=int, default=1, metavar="INT", help="on the CPU (default: 1)")
    flag("--memory", metavar="AMOUNT", help="that a case may take (default: 1GiB, 8GiB on a GPU)")
    flag("--quick", action="store_true", help="small cases, few rounds, no torch.compile, 100 s")
    flag("--budget", type=float, metavar="SECONDS", help="in all, about: fewer rounds and cases")
    flag("--no_compile", action="store_true", help="leave torch.compile out")
    flag(allocator.FLAG, action="store_true", help="start again with glibc's thresholds raised")
    flag("--out", type=Path, metavar="FILE", help="append the rows to this CSV file")
    flag("--json", type=Path, metavar="FILE", help="write rows with every time to this JSON file")
    flag("--compare", type=Path, metavar="FILE", help="an older CSV file to compare with")
    flag("--plot", type=Path, metavar="FOLDER", help="draw speeds and roofline there")
    flag("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_intermixed_args(list(words))
    options.sizes = _names("sizes", options.sizes, list(SIZES))
    options.modes = _names("modes", options.modes, list(MODES)) if options.modes else None
    if options.threads < 1:
        raise ValueError(f"threads: got {options.threads}, expected at least 1")
    if options.quick:
        options.no_compile = True
        options.budget = options.budget or QUICK_SECONDS
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"budget: got {options.budget}, expected seconds above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but PyTorch sees no NVIDIA GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.memory = parse_memory(options.memory or MEMORY[options.device])
    return options


def _names(flag: str, text: str, known: list[str]) -> list[str]:
    """Names joined by commas, or all of them."""
    if text == "all":
        return known
    found = [word.strip() for word in text.split(",")]
    for word in found:
        if word not in known:
            raise ValueError(f"{flag}: got {word!r}, expected some of {', '.join(known)}, or all")
    return found
