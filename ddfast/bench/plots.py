"""Two pictures of some rows: speeds beside the baseline, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddfast.bench.ceilings import Ceilings
from ddfast.bench.results import baselines

Row = Mapping[str, Any]

MOST_PIXELS = 60_000  # in height; matplotlib draws no more than 2 ** 16


def needed() -> None:
    """Raise where the pictures could not be drawn, before hours of measuring.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'ddfast[report]'") from None


def draw(folder: Path, rows: Sequence[Row], ceilings: Ceilings) -> list[Path]:
    """Write speed.png, and roofline.png where arithmetic was counted; returns what was written.

    Raises:
        ImportError: matplotlib is missing.
    """
    needed()
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if row["verified"] == "yes"]
    written = []
    if any(row.get("ratio_to_eager") for row in good):
        written.append(_speeds(folder / "speed.png", good))
    if any(row.get("gigaflops_per_second") for row in good):
        written.append(_roofline(folder / "roofline.png", good, ceilings))
    return written


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot: it keeps figures, and a display, of the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _speeds(path: Path, rows: Sequence[Row]) -> Path:
    """A bar for each provider of each case but the baselines, with its interval."""
    first = baselines(rows)
    bars = [row for row in rows if row.get("ratio_to_eager") and not any(row is b for b in first)]
    height = 1 + 0.22 * len(bars)
    figure, axes = _figure(10, height)
    for at, row in enumerate(bars):
        middle, low, high = (float(row[f"ratio_{name}"]) for name in ("to_eager", "low", "high"))
        colour = "tab:green" if str(row["provider"]).startswith("ddfast") else "tab:grey"
        axes.barh(at, middle - 1, left=1, color=colour)  # to the right is faster
        axes.plot([low, high], [at, at], color="black", linewidth=1)
    names = [f"{r['operator']}: {r['case']}, {r['mode']}; {r['provider']}" for r in bars]
    axes.set_yticks(range(len(bars)), names, fontsize=6)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times the baseline's speed, with its interval")
    axes.set_title(_machine(rows), fontsize=8)
    figure.savefig(path, dpi=min(150, MOST_PIXELS / height))
    return path


def _roofline(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> Path:
    """GFLOP/s over FLOPs per byte, under what the machine copies and multiplies at most."""
    points = [row for row in rows if row.get("gigaflops_per_second")]
    figure, axes = _figure(8, 6)
    copying = ceilings.copies[max(ceilings.copies)]
    ends = [2.0**-4, 2.0**14]
    for dtype in sorted({str(row.get("dtype") or "float32") for row in points}):
        peak = ceilings.products.get(dtype)
        if peak:
            ridge = peak / copying
            xs = sorted([*ends, ridge])
            axes.plot(xs, [min(x * copying, peak) for x in xs], label=f"ceiling, {dtype}")
    operators = list(dict.fromkeys(str(row["operator"]) for row in points))
    for at, operator in enumerate(operators):
        for ours, marker in ((True, "o"), (False, "x")):
            some = [
                row
                for row in points
                if row["operator"] == operator and str(row["provider"]).startswith("ddfast") == ours
            ]
            rates = [float(row["gigaflops_per_second"]) for row in some]
            widths = [float(row["gigabytes_per_second"]) for row in some]
            xs = [r / max(w, 1e-9) for r, w in zip(rates, widths, strict=True)]
            label = operator if ours else None
            axes.scatter(xs, rates, marker=marker, s=18, color=f"C{at % 10}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that has to move")
    axes.set_ylabel("GFLOP/s (o ddfast, x others)")
    axes.set_title(_machine(rows), fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def _machine(rows: Sequence[Row]) -> str:
    row = rows[0]
    threads = f"{row['threads']} thread{'s' * (str(row['threads']) != '1')}"
    return f"{row['device']}; {threads}; torch {row['torch']}; {row['commit']}"
