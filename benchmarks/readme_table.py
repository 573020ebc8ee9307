"""Writes the tables of README.md and docs/methods/*.md, and all benchmark rows to RESULTS.md.

python benchmarks/readme_table.py          # rewrite the part between the two markers
python benchmarks/readme_table.py --check  # exit 1 if they are not what the CSVs say
"""

from __future__ import annotations

import sys
from pathlib import Path

from ddfast.bench import results
from ddfast.benchmarks import method_pages
from ddfast.benchmarks import overview_tables as overview
from ddfast.methods import methods

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, ITERATIONS, MEMORY = "benchmarks", "iterations", "memory"
METHODS, ACCURACIES = "methods", "accuracies"
QUARTILES = "*"


def rows(folder: Path) -> list[dict[str, str]]:
    """All rows of all result files."""
    return [row for file in sorted(folder.glob("*.csv")) for row in results.read(file)]


def spread(table: list[dict[str, str]]) -> str:
    """What the numbers behind a ratio are: older files have quartiles."""
    kinds = {bool(r["interval"]) for r in table if r["verified"] == "yes"}
    if kinds == {True, False}:
        return f"95 % interval, or quartiles{QUARTILES}"
    return "95 % interval" if True in kinds else "quartiles"


def ratio(r: dict[str, str], table: list[dict[str, str]]) -> str:
    """How many times as fast as the baseline, with its spread."""
    middle, low, high = (number(r[f"ratio_{x}"]) for x in ("to_eager", "low", "high"))
    mark = QUARTILES if spread(table).endswith(QUARTILES) and not r["interval"] else ""
    if r["interval"] not in ("", "95%"):  # of few rounds
        mark = f", {r['interval'].rstrip('%')} %"
    return f"{middle} ({low} to {high}{mark})"


def number(text: str) -> str:
    """Three significant digits."""
    value = float(text)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(table: list[dict[str, str]]) -> str:
    """One Markdown table per machine and number of threads; a case's first row is its baseline."""
    parts = []
    machines: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for r in table:
        machines.setdefault((r["device"], r["threads"], r["torch"], r["date"]), []).append(r)
    for (device, threads, torch, date), found in machines.items():
        parts.append(f"{device}; {threads} thread{'s' * (threads != '1')}; torch {torch}; {date}\n")
        speed = f"times the first's speed ({spread(found)})"
        heads = ["operator", "case", "provider", "ms", speed]
        heads += ["share of copy bandwidth", "first call, ms"]
        newer = any(r["interval"] for r in found)
        heads += ["share of its floor", "peak memory, MiB"] if newer else []
        parts.append(f"| {' | '.join(heads)} |\n|---|---|---|{'--:|' * (len(heads) - 3)}")
        previous = None
        for r in found:
            names = (r["case"], r["mode"], r["size"])
            what = (r["operator"], "; ".join(name for name in names if name))
            shown = what if what != previous else ("", "")
            previous = what
            cells = [*shown, r["provider"], *measured(r, found)]
            parts.append(f"| {' | '.join(cells)} |" + " |" * (len(heads) - len(cells)))
        parts.append("")
    return "\n".join(parts)


def measured(r: dict[str, str], table: list[dict[str, str]]) -> list[str]:
    """What a row says of its provider: a few cells, or only that it was wrong."""
    if r["verified"] != "yes":
        return [r["verified"]]
    # No ratio where the baseline itself was wrong and not timed.
    times = ratio(r, table) if r["ratio_to_eager"] else "–"
    cells = [number(r["median_ms"]), times, percent(r["share_of_copy"]), number(r["first_call_ms"])]
    if r["interval"]:
        floor = r["share_of_floor"] and f"{percent(r['share_of_floor'])} ({r['bound']})"
        cells += [floor, r["peak_mib"] and number(r["peak_mib"])]
    return cells


def percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"


# What README.md shows of each operator: cases that begin with one of these.
SHOWN = {
    "gradient_matching": ("full", "s16, 10", "s8, 10", "s16, 100"),
    "gradient_distance": ("ConvNet-3 width 128", "ResNet-18, 1 "),
    "class_mean_distance": ("C=10, n=256, m=10", "C=100"),
    "augment": ("256x3x32x32", "10x3x32x32"),
    "norm_relu_pool": ("64x128x32x32, channels_last", "10x128x16x16, channels_last"),
    "class_weight_grad": ("128->128, 16x16, C=1, n=256", "128->128, 16x16, C=10, n=10"),
    "multi_formation": ("100x3x32x32",),
    "mmd": ("gaussian", "energy"),
    "characteristic_function": ("",),
    "distribution_matching": ("full",),
    "trajectory": ("",),
    "kernel_matrix": ("fc 3", "conv"),
    "unroll": ("",),
    "experts": ("ConvNetD2W32", "MLP"),
}


def milliseconds(r: dict[str, str]) -> float:
    return float(r["median_ms"])


def summary(table: list[dict[str, str]]) -> str:
    """The baseline and ddfast's default provider, for the cases that are SHOWN."""
    lines = [
        "| operator | case | eager, ms | fastest other, ms | ddfast, ms "
        f"| times eager's speed ({spread(table)}) |\n|---|---|--:|--:|--:|--:|"
    ]
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for r in table:
        key = (r["operator"], r["case"], r["mode"], r["size"], r["threads"])
        cases.setdefault(key, []).append(r)
    for (operator, case, mode, size, _), found in cases.items():
        # Methods are compared with ddfast's own reference backend, not with other code.
        if operator.startswith("method:") or not case.startswith(SHOWN.get(operator, ("",))):
            continue
        eager = next((r for r in found if r["provider"] == "eager"), found[0])
        named = {r["provider"]: r for r in found if r["provider"].startswith("ddfast")}
        default = named.get("ddfast auto") or named.get("ddfast, stacked")
        ours = default or next(iter(named.values()), None)
        if ours is None or "yes" not in ours["verified"] or "yes" not in eager["verified"]:
            continue
        others = [r for r in found if r["provider"] not in named and r["verified"] == "yes"]
        other = min((r for r in others if r is not eager), key=milliseconds, default=None)
        rival = f"{number(other['median_ms'])} ({other['provider']})" if other else ""
        times = f"{number(eager['median_ms'])} | {rival} | {number(ours['median_ms'])}"
        what = "; ".join(part for part in (case, mode, size) if part)
        lines.append(f"| {operator} | {what} | {times} | {ratio(ours, table)} |")
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
    figures = overview.figures(ROOT / "ddfast" / "methods" / "figures.csv")
    text = updated(text, METHODS, overview.methods_table(methods(), figures))
    text = updated(text, ACCURACIES, overview.others_table(figures, list(methods())))
    text = updated(text, ITERATIONS, overview.iterations_table(table))
    text = updated(text, MEMORY, overview.memory_table(ROOT / "benchmarks" / "results"))
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
