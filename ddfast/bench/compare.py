"""An older file of results against new rows: what became faster, and whether that is certain.

The ratio of two medians, old over new, gets an interval from theirs by the method of variance
estimates recovery on a logarithmic scale (Zou and Donner, "Construction of confidence limits about
effect measures: a general approach", Statistics in Medicine 27, 2008). A machine that is slower on
one day than on another moves all times, so the speed beside the baseline, which ran in the same
rounds, is compared as well. The rule: "faster" or "slower" is said if the interval of the times
excludes 1 and, of all rows but the baseline's own, that of the speeds beside the baseline excludes
1 on the same side; "same" otherwise. No verdict is given where the machine differs, where a file
has quartiles instead of intervals, or from fewer than six rounds, of which no 95 % interval can be
had. Rows of another number of threads are not compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddfast.bench.intervals import FEWEST
from ddfast.bench.results import heading, number

Row = Mapping[str, Any]
Interval = tuple[float, float, float]

KEY = ("operator", "case", "mode", "size", "provider", "threads")


@dataclass(frozen=True)
class Comparison:
    """One row's change.

    Attributes:
        row: the new row.
        times: old over new median time (estimate, low, high); above 1 is faster.
        beside: the same of the speed beside the baseline; None for the baseline itself.
        verdict: "faster", "slower", "same", or why there is none.
    """

    row: Row
    times: Interval
    beside: Interval | None
    verdict: str


def ratio(above: Interval, below: Interval) -> Interval:
    """The ratio of two independent positive estimates with an interval, each (value, low, high)."""
    (a, a_low, a_high), (b, b_low, b_high) = (map(math.log, x) for x in (above, below))
    down = math.hypot(a - a_low, b_high - b)
    up = math.hypot(a_high - a, b - b_low)
    middle = a - b
    return math.exp(middle), math.exp(middle - down), math.exp(middle + up)


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Comparison]:
    """Every new row that was timed in both; of several old ones with the same key, the last."""
    before = {_key(row): row for row in old if row["verified"] == "yes"}
    timed = [row for row in new if row["verified"] == "yes"]
    return [_compared(before[_key(row)], row) for row in timed if _key(row) in before]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in KEY)


def _compared(then: Row, now: Row) -> Comparison:
    times = ratio(_interval(then, "median_ms", "ms"), _interval(now, "median_ms", "ms"))
    beside = None
    # The baseline's speed beside itself is 1 in every round.
    if all(_number(row, "ratio_to_eager") and not _is_baseline(row) for row in (then, now)):
        beside = ratio(
            _interval(now, "ratio_to_eager", "ratio"), _interval(then, "ratio_to_eager", "ratio")
        )
    return Comparison(now, times, beside, _verdict(then, now, times, beside))


def _is_baseline(row: Row) -> bool:
    return all(_number(row, f"ratio_{name}") == 1 for name in ("to_eager", "low", "high"))


def _verdict(then: Row, now: Row, times: Interval, beside: Interval | None) -> str:
    if then["device"] != now["device"]:
        return "another machine"
    if not (then.get("interval") and now.get("interval")):
        return "no intervals"
    if min(_number(then, "rounds"), _number(now, "rounds")) < FEWEST:
        return "too few rounds"
    intervals = [times] if beside is None else [times, beside]
    if all(low > 1 for _, low, _ in intervals):
        return "faster"
    if all(high < 1 for _, _, high in intervals):
        return "slower"
    return "same"


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return 0.0 if value in ("", None) else float(value)


def _interval(row: Row, name: str, ends: str) -> Interval:
    """An estimate and its bounds; rounding to 0 in the file is no reason to fail."""
    values = [_number(row, column) for column in (name, f"low_{ends}", f"high_{ends}")]
    if ends == "ratio":
        values = [_number(row, column) for column in (name, "ratio_low", "ratio_high")]
    middle, low, high = (max(value, 1e-9) for value in values)
    return middle, min(low, middle), max(high, middle)


def text(comparisons: Sequence[Comparison]) -> str:
    """All of them, case by case, the rule, and how many of each verdict."""
    if not comparisons:
        return "compare: no row of the older file is among the new ones"
    lines = []
    previous = ""
    for found in comparisons:
        title = heading(found.row)
        if title != previous:
            lines.append(title)
            previous = title
        parts = [f"  {found.row['provider']:26}", f"{found.verdict:15}"]
        parts.append(f"{_words(found.times):24} as fast as before")
        if found.beside is not None:
            parts.append(f"; beside the baseline {_words(found.beside)}")
        lines.append("".join(parts))
    counts = Counter(found.verdict for found in comparisons)
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    lines.append(
        "(faster, slower: the 95 % interval of old over new time excludes 1, and that of the speed "
        "beside the baseline on the same side; else same)"
    )
    if "another machine" in counts:
        lines.append("warning: the older file is of another machine; its times do not compare")
    return "\n".join(lines)


def _words(interval: Interval) -> str:
    return "{} x [{}, {}]".format(*map(number, interval))
