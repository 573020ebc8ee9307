"""An older file of results against new rows: what became faster, and whether that is certain.

The ratio of two medians, old over new, gets an interval from theirs by the method of variance
estimates recovery on a logarithmic scale (Zou and Donner, "Construction of confidence limits about
effect measures: a general approach", Statistics in Medicine 27, 2008). A machine that is slower
on one day than on another moves all times, so the speed beside the baseline, which ran in the same
rounds, is compared as well. The rule: "faster" or "slower" is said if both intervals, that of the
times and that of the speeds beside the baseline, exclude 1 on the same side; "same" otherwise. The
baselines themselves are not judged: by how much they changed, the machine (or PyTorch) did. No
verdict is given where the machine differs, where a file has quartiles instead of intervals, or from
fewer than six rounds, of which no 95 % interval can be had. Rows of another number of threads are
not compared.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddfast.bench.intervals import FEWEST
from ddfast.bench.results import baselines, heading, number

Row = Mapping[str, Any]
Interval = tuple[float, float, float]

KEY = ("operator", "case", "mode", "size", "provider", "threads")


@dataclass(frozen=True)
class Comparison:
    """One row's change.

    Attributes:
        row: the new row.
        times: old over new median time (estimate, low, high); above 1 is faster.
        beside: the same of the speed beside the baseline; None where there is none.
        verdict: "faster", "slower", "same", "baseline", or why there is none.
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


def compare(old: Iterable[Row], new: Sequence[Row]) -> list[Comparison]:
    """Every new row that was timed in both; of several old ones with the same key, the last."""
    before = {_key(row): row for row in old if row["verified"] == "yes"}
    first = {_key(row) for row in baselines(new)}
    return [
        _compared(before[_key(row)], row, _key(row) in first)
        for row in new
        if row["verified"] == "yes" and _key(row) in before
    ]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in KEY)


def _compared(then: Row, now: Row, baseline: bool) -> Comparison:
    times = ratio(_interval(then, "median_ms", "ms"), _interval(now, "median_ms", "ms"))
    beside = None
    if not baseline and all(_number(row, "ratio_to_eager") for row in (then, now)):
        beside = ratio(
            _interval(now, "ratio_to_eager", "ratio"), _interval(then, "ratio_to_eager", "ratio")
        )
    return Comparison(now, times, beside, _verdict(then, now, baseline, times, beside))


def _verdict(then: Row, now: Row, baseline: bool, times: Interval, beside: Interval | None) -> str:
    if then["device"] != now["device"]:
        return "another machine"
    if baseline:
        return "baseline"
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
    """An estimate and its bounds; that the file rounded one to 0 is no reason to fail."""
    low, high = ("ratio_low", "ratio_high") if ends == "ratio" else ("low_ms", "high_ms")
    middle, low_end, high_end = (max(_number(row, column), 1e-9) for column in (name, low, high))
    return middle, min(low_end, middle), max(high_end, middle)


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
        "(faster, slower: both 95 % intervals, of old over new time and of the speed beside the "
        "baseline, exclude 1 on the same side; else same)"
    )
    machine = [found.times[0] for found in comparisons if found.verdict == "baseline"]
    if machine:
        middle = number(statistics.median(machine))
        lines.append(f"baselines: {middle} x as fast as before, which is the machine's part")
    if "another machine" in counts:
        lines.append("warning: the older file is of another machine; its times do not compare")
    return "\n".join(lines)


def _words(interval: Interval) -> str:
    return "{} x [{}, {}]".format(*map(number, interval))
