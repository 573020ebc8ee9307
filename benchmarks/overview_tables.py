"""README's overview of the methods, and what things take in memory beside the eager way."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ddfast.methods import Method

Row = dict[str, str]

NAMES = {"it_gan": "IT-GAN", "idc_i": "IDC-I", "linba": "LinBa", "rat_bptt": "RaT-BPTT"} | {
    "frepo": "FRePo"
}


def shown(method: str) -> str:
    """A method's name as its paper writes it."""
    return NAMES.get(method, method.upper())


def methods_table(methods: dict[str, Method], figures: Iterable[Row]) -> str:
    """One row a method: paper, what it matches, and the digits' accuracies."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in figures:
        found.setdefault((row["method"], row["dataset"], row["ipc"]), []).append(row)
    lines = [
        "| method | paper | matches | ipc 1 | ipc 10 | full data | seconds |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for name, method in methods.items():
        one, ten = (found.get((name, "digits", ipc), []) for ipc in ("1", "10"))
        # A method's own protocol comes first, and its row is the one that counts here.
        first, second = ((rows[0] if rows else None) for rows in (one, ten))
        measured = [row for row in (first, second) if row is not None]
        paper = method.title.removeprefix(f"{shown(name)}: ")
        cells = [
            f"[{shown(name)}](docs/methods/{name}.md)",
            paper,
            method.matches,
            *(f"{row['distilled']} ({row['random']})" if row else "–" for row in (first, second)),
            measured[-1]["full"] if measured else "–",
            ", ".join(row["seconds"] for row in measured) or "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def others_table(figures: Sequence[Row], order: Sequence[str]) -> str:
    """The rows that the overview has not: other data, more images, second protocols."""
    seen: set[tuple[str, ...]] = set()
    lines = [
        "| data | ipc | method | protocol | random selection | distilled | full data | iterations "
        "| seconds |\n|---|--:|---|---|--:|--:|--:|--:|--:|"
    ]
    rest = []
    for row in figures:
        key = row["method"], row["dataset"], row["ipc"]
        if key in seen or row["dataset"] != "digits":
            rest.append(row)
        seen.add(key)
    for r in sorted(rest, key=lambda r: (r["dataset"], int(r["ipc"]), order.index(r["method"]))):
        cells = [r["dataset"], r["ipc"], shown(r["method"]), f"`{r['protocol']}`", r["random"]]
        cells += [r["distilled"], r["full"], r["iterations"], r["seconds"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(file: Path) -> list[Row]:
    """The measured accuracies."""
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def iterations_table(rows: Iterable[Row]) -> str:
    """An outer iteration of each method, on the kernels and on their plain PyTorch definitions."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["operator"].startswith("method:") and row["verified"] == "yes":
            found.setdefault((row["operator"], row["case"]), {})[row["provider"]] = row
    lines = [
        "| method | case | reference, ms | ddfast, ms | times as fast (95 % interval) "
        "| peak memory, MiB |\n|---|---|--:|--:|--:|--:|"
    ]
    for (operator, case), by_provider in found.items():
        if not {"reference", "ddfast"} <= set(by_provider):
            continue
        plain, ours = by_provider["reference"], by_provider["ddfast"]
        times = " | ".join(f"{float(r['median_ms']):.3g}" for r in (plain, ours))
        ends = "{ratio_to_eager} ({ratio_low} to {ratio_high})".format(**ours)
        weights = f"{float(plain['peak_mib']):.0f}, {float(ours['peak_mib']):.0f}"
        lines.append(
            f"| {shown(operator.removeprefix('method:'))} | {case} | {times} | {ends} | {weights} |"
        )
    return "\n".join(lines) + "\n"


def memory_table(folder: Path) -> str:
    """Peak memory beside the eager way, from the JSON files of the memory benchmarks."""
    lines = ["| what | eager | ddfast |", "|---|--:|--:|"]
    for what, eager, ours in [*_unrolled(folder), *_discrepancies(folder), *_matching(folder)]:
        lines.append(f"| {what} | {eager} | {ours} |")
    return "\n".join(lines) + "\n"


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def _pairs(
    rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any], eager: str, value: str
) -> list[tuple[dict[str, Any], float, float]]:
    """The rows of ddfast with its own number and that of the eager way."""
    baseline = {key(r): r[value] for r in rows if r["provider"] == eager}
    return [
        (r, baseline[key(r)], r[value])
        for r in rows
        if r["provider"] == "ddfast" and key(r) in baseline
    ]


def _unrolled(folder: Path) -> list[tuple[str, str, str]]:
    rows = _read(folder, "unroll_memory.json")
    found = _pairs(rows, lambda r: (r["width"], r["steps"]), "eager, TESLA", "above_one_step_mib")
    return [
        (
            f"trajectory loss, ConvNet-3 width {r['width']}, T = {r['steps']} steps, above one "
            "step (eager: TESLA's way)",
            f"{eager:.0f} MiB",
            f"{ours:.0f} MiB",
        )
        for r, eager, ours in found
        if r["steps"] in (10, 40)
    ]


def _discrepancies(folder: Path) -> list[tuple[str, str, str]]:
    rows = _read(folder, "mmd_memory.json")
    found = _pairs(rows, lambda r: (r["rows"], r["width"]), "eager", "above_inputs_mib")
    return [
        (
            f"mmd and its gradient, n = m = {r['rows']}, d = {r['width']}, above the inputs",
            f"{eager:.0f} MiB",
            f"{ours:.0f} MiB",
        )
        for r, eager, ours in found
    ]


def _matching(folder: Path) -> list[tuple[str, str, str]]:
    found = _read(folder, "peak_memory.json")
    lines = []
    for what in dict.fromkeys(name.rsplit("; ", 1)[0] for name in found if "; " in name):
        cells = []
        for provider in ("eager", "ddfast"):
            result = found.get(f"{what}; {provider}", "–")
            if isinstance(result, dict):
                result = f"{(result['peak'] - result['before']) / 2**20:.0f} MiB"
            cells.append(result)
        lines.append((f"gradient matching, {what}, above images and targets", *cells))
    return lines
