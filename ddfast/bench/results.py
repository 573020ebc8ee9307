"""Rows of measurements: as text, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

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


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Append rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerows(rows)
