"""Writes the measured figures into the tables of docs/operators/.

A page chooses the rows, by case and provider, and this script fills in what was measured:

    <!-- measured: OPERATOR -->
    (a line of this script's: processor, torch and date)

    | case; mode | provider | ms | times eager's speed |

python benchmarks/page_tables.py          # rewrite the figures
python benchmarks/page_tables.py --check  # exit 1 if they are not what benchmarks/results/ says
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ddfast.benchmarks.readme_table import number, rows

ROOT = Path(__file__).resolve().parents[1]
HEADER = "| case; mode | provider | ms | times eager's speed |\n|---|---|--:|--:|\n"
TABLE = re.compile(
    r"<!-- measured: (\w+) -->\n(.*?)\n\n\| case[^\n]*\n\|-[^\n]*\n((?:\|[^\n]*\n)+)", re.S
)


def case_of(row: dict[str, str]) -> str:
    """As RESULTS.md has it."""
    return "; ".join(part for part in (row["case"], row["mode"], row.get("size")) if part)


def filled(page: str, name: str, table: list[dict[str, str]]) -> str:
    """The page with its figures.

    Raises:
        ValueError: a row that nobody has measured, rows of one table from several machines, or a
            marker without a table behind it.
    """
    known = {(r["operator"], case_of(r), r["provider"]): r for r in table if r["threads"] == "1"}

    def write(found: re.Match[str]) -> str:
        operator, lines = found[1], []
        machines: dict[str, None] = {}
        for line in found[3].splitlines():
            case, provider = (cell.strip() for cell in line.split("|")[1:3])
            row = known.get((operator, case, provider))
            if row is None:
                raise ValueError(f"{name}: no measurement of {operator}, {case}, by {provider}")
            machines[f"One thread; {row['device']}; torch {row['torch']}; {row['date']}."] = None
            if row["verified"] != "yes":
                figures = f"{row['verified']} |"
            else:
                ratio = number(row["ratio_to_eager"]) if row["ratio_to_eager"] else "–"
                figures = f"{number(row['median_ms'])} | {ratio}"
            lines.append(f"| {case} | {provider} | {figures} |\n")
        if len(machines) > 1:
            raise ValueError(f"{name}: one table of rows from {', '.join(machines)}")
        return f"<!-- measured: {operator} -->\n{next(iter(machines))}\n\n{HEADER}{''.join(lines)}"

    text, tables = TABLE.subn(write, page)
    if tables != page.count("<!-- measured:"):
        raise ValueError(f"{name}: {tables} tables behind {page.count('<!-- measured:')} markers")
    return text


def main() -> int:
    table = rows(ROOT / "benchmarks" / "results")
    check, stale = "--check" in sys.argv[1:], False
    for path in sorted((ROOT / "docs" / "operators").glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = filled(before, path.name, table)
        stale |= before != after
        if not check:
            path.write_text(after, encoding="utf-8")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
