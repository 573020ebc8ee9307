"""What an evaluation found: the rows, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddfast.data.files import whole_file
from ddfast.evaluate.protocols import Protocol

__all__ = ["Report", "Row"]

JSON = "report.json"
MARKDOWN = "report.md"


@dataclass(frozen=True)
class Row:
    """Networks of one architecture, trained on one kind of set.

    Attributes:
        name: `"distilled"`, `"distilled, soft labels"`, `"random selection"` or `"full data"`, with
            `krr` of many images `"full data, random subset"`.
        model: name of the architecture.
        protocol: how they were trained.
        images: in each set, as it was trained on.
        ipc: images per class that are stored, the mean if classes differ. More are trained on
            where a stored image is decoded to several.
        ratio: the stored images as a share of the training images, from 0 to 1.
        accuracies: in percent, for each set those of its networks.
        seconds: of training and testing; rows that were trained together share the time by their
            numbers of networks.
        peak_memory: bytes, the most the process had used by then (on a GPU, of its memory).
    """

    name: str
    model: str
    protocol: Protocol
    images: int
    ipc: float
    ratio: float
    accuracies: tuple[tuple[float, ...], ...]
    seconds: float
    peak_memory: int

    @property
    def networks(self) -> int:
        """How many were tested."""
        return sum(len(each) for each in self.accuracies)

    @property
    def mean(self) -> float:
        """Of the accuracies of all networks, in percent."""
        return statistics.fmean(value for each in self.accuracies for value in each)

    @property
    def std(self) -> float:
        """Population standard deviation (ddof 0) over all networks, as the DC family reports it."""
        return statistics.pstdev([value for each in self.accuracies for value in each])

    @property
    def accuracy(self) -> str:
        """`mean ± std` in percent with one decimal."""
        return f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        dataset: name of the data set.
        split: which of its images the networks were tested on, `"test"` or `"validation"`.
        method: what made the distilled set; empty if unknown.
        seed: of the evaluation.
        rows: one for each kind of set and model.
        seconds: of the whole evaluation.
        machine: device, threads and versions.
    """

    dataset: str
    split: str
    method: str
    seed: int
    rows: tuple[Row, ...]
    seconds: float
    machine: dict[str, Any]

    def row(self, name: str, model: str | None = None) -> Row:
        """The row of a set; of the first model if none is given.

        Args:
            name: as in :class:`Row`.
            model: as in :class:`Row`.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name and model in (None, row.model):
                return row
        raise KeyError(f"no row {name!r}" + ("" if model is None else f" of {model}"))

    def to_json(self) -> str:
        """Everything, with mean, std and number of networks of each row worked out."""
        content = dataclasses.asdict(self)
        for row, plain in zip(self.rows, content["rows"], strict=True):
            plain.update(mean=row.mean, std=row.std, networks=row.networks)
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """A table with a line that says how to read it."""
        head = ("set", "model", "protocol", "accuracy (%)", "networks", "ipc", "ratio", "seconds")
        lines = [" | ".join(head), " | ".join(["---"] * 3 + ["---:"] * 5)]
        for row in self.rows:
            name = row.name
            if self.method and name.startswith("distilled"):
                name = name.replace("distilled", self.method, 1)
            sets, each = len(row.accuracies), len(row.accuracies[0])
            cells = (
                name,
                row.model,
                _described(row.protocol),
                row.accuracy,
                f"{each}" if sets == 1 else f"{sets} sets x {each}",
                f"{row.ipc:.4g}",
                f"{100 * row.ratio:.3g} %",
                f"{row.seconds:.1f}",
            )
            lines.append(" | ".join(cells))
        table = "\n".join(f"| {line} |" for line in lines)
        return (
            f"{table}\n\n{self.dataset}, accuracy on its {self.split} images: mean ± population "
            f"standard deviation over all networks. {self.seconds:.1f} s in all on "
            f"{self.machine['device']} with {self.machine['threads']} threads, at most "
            f"{max(row.peak_memory for row in self.rows) / 2**20:.0f} MiB.\n"
        )

    def write_report(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.json` and `report.md`, each whole or not at all.

        Args:
            folder: made if need be.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((JSON, self.to_json()), (MARKDOWN, self.to_markdown())):
            with whole_file(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        return folder


def _described(protocol: Protocol) -> str:
    if protocol.reg is not None:
        return f"{protocol.name}, reg {protocol.reg:g}"
    return f"{protocol.name}, {protocol.passes} epochs"
