"""Writes the benchmark table of README.md from benchmarks/results/*.csv, slower rows included.

python benchmarks/readme_table.py          # rewrite the part between the two markers
python benchmarks/readme_table.py --check  # exit 1 if README.md is not what the CSV says
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def rows(folder: Path) -> list[dict[str, str]]:
    """All rows of all result files."""
    found: list[dict[str, str]] = []
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="") as text:
            found += list(csv.DictReader(text))
    return found


def number(text: str) -> str:
    """Three significant digits."""
    value = float(text)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(table: list[dict[str, str]]) -> str:
    """One Markdown table per machine and number of threads."""
    parts = []
    machines = dict.fromkeys((r["device"], r["threads"], r["torch"], r["date"]) for r in table)
    for machine in machines:
        device, threads, torch, date = machine
        parts.append(f"{device}; {threads} thread{'s' * (threads != '1')}; torch {torch}; {date}\n")
        parts.append(
            "| operator | case | provider | ms | times eager's speed (quartiles) | share of copy "
            "bandwidth | first call, ms |\n|---|---|---|--:|--:|--:|--:|"
        )
        previous = None
        for r in table:
            if (r["device"], r["threads"], r["torch"], r["date"]) != machine:
                continue
            what = (r["operator"], f"{r['case']}; {r['mode']}")
            shown = what if what != previous else ("", "")
            previous = what
            if r["verified"] != "yes":
                parts.append(
                    f"| {shown[0]} | {shown[1]} | {r['provider']} | {r['verified']} | | | |"
                )
                continue
            ratio, low, high = (number(r[f"ratio_{x}"]) for x in ("to_eager", "low", "high"))
            share = f"{100 * float(r['share_of_copy']):.0f} %"
            cells = [
                *shown,
                r["provider"],
                number(r["median_ms"]),
                f"{ratio} ({low} to {high})",
                share,
            ]
            parts.append(f"| {' | '.join(cells)} | {number(r['first_call_ms'])} |")
        parts.append("")
    return "\n".join(parts)


def updated(readme: str, table: str) -> str:
    """README.md with the part between the markers replaced."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = updated(before, markdown(rows(ROOT / "benchmarks" / "results")))
    if "--check" in sys.argv[1:]:
        return int(after != before)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
