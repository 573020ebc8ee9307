"""Writes the tables of README.md and docs/methods/*.md, and all benchmark rows to RESULTS.md.

python benchmarks/readme_table.py          # rewrite the part between the two markers
python benchmarks/readme_table.py --check  # exit 1 if they are not what the CSVs say
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import method_pages

from ddfast.methods import methods

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, ACCURACIES = "benchmarks", "accuracies"


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
            times = "–"  # where the baseline itself was wrong and not timed
            if r["ratio_to_eager"]:
                ratio, low, high = (number(r[f"ratio_{x}"]) for x in ("to_eager", "low", "high"))
                times = f"{ratio} ({low} to {high})"
            share = f"{100 * float(r['share_of_copy']):.0f} %"
            cells = [
                *shown,
                r["provider"],
                number(r["median_ms"]),
                times,
                share,
            ]
            parts.append(f"| {' | '.join(cells)} | {number(r['first_call_ms'])} |")
        parts.append("")
    return "\n".join(parts)


# What README.md shows of each operator: cases that begin with one of these.
SHOWN = {
    "gradient_matching": ("full", "s16, 10", "s8, 10", "s16, 100"),
    "gradient_distance": ("ConvNet-3 width 128", "ResNet-18, 1 "),
    "class_mean_distance": ("C=10, n=256, m=10, d=2048", "C=100"),
    "augment": ("256x3x32x32", "10x3x32x32"),
    "norm_relu_pool": ("64x128x32x32, channels_last", "10x128x16x16, channels_last"),
    "class_weight_grad": ("128->128, 16x16, C=1, n=256", "128->128, 16x16, C=10, n=10"),
    "multi_formation": ("100x3x32x32",),
    "mmd": ("gaussian", "energy"),
    "characteristic_function": ("",),
    "distribution_matching": ("full",),
    "trajectory": ("",),
    "unroll": ("",),
    "experts": ("ConvNetD2W32", "MLP"),
}


def summary(table: list[dict[str, str]]) -> str:
    """The baseline and ddfast's default provider, for the cases that are SHOWN."""
    lines = [
        "| operator | case | eager, ms | ddfast, ms | times eager's speed (quartiles) |\n"
        "|---|---|--:|--:|--:|"
    ]
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for r in table:
        cases.setdefault((r["operator"], r["case"], r["mode"], r["threads"]), []).append(r)
    for (operator, case, mode, _), found in cases.items():
        if not case.startswith(SHOWN.get(operator, ("",))):
            continue
        eager = next((r for r in found if r["provider"] == "eager"), found[0])
        named = {r["provider"]: r for r in found if r["provider"].startswith("ddfast")}
        default = named.get("ddfast auto") or named.get("ddfast, stacked")
        ours = default or next(iter(named.values()), None)
        if ours is None or "yes" not in ours["verified"] or "yes" not in eager["verified"]:
            continue
        ratio, low, high = (number(ours[f"ratio_{x}"]) for x in ("to_eager", "low", "high"))
        times = f"{number(eager['median_ms'])} | {number(ours['median_ms'])}"
        lines.append(f"| {operator} | {case}; {mode} | {times} | {ratio} ({low} to {high}) |")
    return "\n".join(lines) + "\n"


def accuracies(file: Path) -> str:
    """One row for each method, data set and ipc, in the methods' order."""
    with file.open(newline="", encoding="utf-8") as text:
        found = list(csv.DictReader(text))
    methods = list(dict.fromkeys(r["method"] for r in found))
    lines = [
        "| data | ipc | method | protocol | random selection | distilled | full data | iterations "
        "| seconds |\n|---|--:|---|---|--:|--:|--:|--:|--:|"
    ]
    order = ("digits", "generated")
    for r in sorted(
        found,
        key=lambda r: (order.index(r["dataset"]), int(r["ipc"]), methods.index(r["method"])),
    ):
        name = r["method"].upper().replace("_", "-")
        cells = [r["dataset"], r["ipc"], name, f"`{r['protocol']}`", r["random"], r["distilled"]]
        lines.append("| " + " | ".join([*cells, r["full"], r["iterations"], r["seconds"]]) + " |")
    return "\n".join(lines) + "\n"


def updated(readme: str, name: str, table: str) -> str:
    """A text with the part between the markers replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = readme.split(begin)
    return head + begin + "\n" + table + "\n" + end + rest.split(end)[1]


def main() -> int:
    table = rows(ROOT / "benchmarks" / "results")
    readme, results = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
    text = updated(readme.read_text(), BENCHMARKS, summary(table))
    text = updated(text, ACCURACIES, accuracies(ROOT / "ddfast" / "methods" / "figures.csv"))
    wanted = {readme: text, results: f"# Every provider of every benchmark\n\n{markdown(table)}"}
    for name in methods():
        page = ROOT / "docs" / "methods" / f"{name}.md"
        wanted[page] = page.read_text()
        for marker, made in method_pages.tables(name).items():
            wanted[page] = updated(wanted[page], marker, made)
    if "--check" in sys.argv[1:]:
        return int(any(not p.exists() or p.read_text() != t for p, t in wanted.items()))
    for path, content in wanted.items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
