"""Rows of measurements: as text, as CSV, as JSON."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# The first 22 are those of the files that are older than the rest; in those, low and high are
# quartiles. Where "interval" is not empty they are its bounds.
COLUMNS = [
    *("operator", "case", "provider", "mode"),
    *("median_ms", "low_ms", "high_ms", "ratio_to_eager", "ratio_low", "ratio_high"),
    *("gigabytes_per_second", "share_of_copy", "first_call_ms", "max_relative_error", "verified"),
    *("threads", "device", "torch", "ddfast", "commit", "date", "gigaflops_per_second"),
    *("interval", "rounds", "floor_ms", "share_of_floor", "bound", "peak_mib", "dtype", "size"),
    *("triton", "numpy", "python", "level"),
]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, newer or older; columns that it lacks are empty.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS[:4]) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path}: got a file without {', '.join(sorted(missing))}, expected the CSV of "
                "`ddfast bench --out`"
            )
        return [dict.fromkeys(COLUMNS, "") | {k: v or "" for k, v in row.items()} for row in reader]


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file; an older one gets the columns that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != COLUMNS:
            _write(path, read(path))
    else:
        _write(path, [])
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore").writerows(rows)


def _write(path: Path, rows: Sequence[Row]) -> None:
    draft = path.with_name(path.name + ".part")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)


def write_json(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The machine, its ceilings, and the rows with every single time ("times_ms")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"machine": machine, "rows": list(rows)}, indent=1) + "\n")
    os.replace(draft, path)


def baselines(rows: Sequence[Row]) -> list[Row]:
    """The first row of each case, which the others are compared with."""
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        names = ("operator", "case", "mode", "size", "threads")
        first.setdefault(tuple(str(row.get(name) or "") for name in names), row)
    return list(first.values())


def heading(row: Row) -> str:
    """What the rows of a case have in common."""
    size = f"; {row['size']}" if row.get("size") else ""
    return f"{row['operator']}: {row['case']}, {row['mode']}{size}"


def block(rows: Sequence[Row]) -> str:
    """The rows of one case as aligned text, under a heading."""
    lines = [heading(rows[0])]
    width = max(len(str(row["provider"])) for row in rows)
    for row in rows:
        start = f"  {row['provider']:{width}}"
        if row["verified"] != "yes":
            lines.append(f"{start}  {row['verified']}")
            continue
        parts = [_time(row), _speed(row)]
        parts.append(f"{share(row):>4} of {row['bound']}" if row.get("bound") else " " * 17)
        if row.get("peak_mib") not in ("", None):
            parts.append(f"{float(row['peak_mib']):9.1f} MiB")
        lines.append(f"{start}  {'  '.join(parts)}".rstrip())
    return "\n".join(lines)


def share(row: Row) -> str:
    """Of the floor, in percent."""
    return f"{100 * float(row['share_of_floor']):.0f} %"


def _time(row: Row) -> str:
    interval = f"[{number(row['low_ms'])}, {number(row['high_ms'])}]"
    return f"{number(row['median_ms']):>8} ms {interval:18}"


def _speed(row: Row) -> str:
    if row.get("ratio_to_eager") in ("", None):
        return " " * 24
    low, high = (number(row[f"ratio_{end}"]) for end in ("low", "high"))
    interval = "" if low == high == "1" else f"[{low}, {high}]"
    return f"{number(row['ratio_to_eager']):>6} x {interval:15}"


def number(value: Any) -> str:
    """Three significant digits, without an exponent."""
    found = float(value)
    return f"{found:.0f}" if abs(found) >= 100 else f"{found:.3g}"
