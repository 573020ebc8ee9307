"""The tables of docs/methods/*.md: flags, published settings and measured accuracies.

They come from the methods' configs, resolved for stand-ins of the field's data sets, and from
ddfast/methods/figures.csv. `readme_table.py` writes them between markers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch

from ddfast import methods
from ddfast.data import Dataset
from ddfast.methods.config import Config

SETTINGS, PUBLISHED, FIGURES = "settings", "published", "figures"

SHARED = {field.name: field for field in dataclasses.fields(Config)}

# Name, classes, channels, pixels a side, training images.
DATASETS = (
    ("digits", 10, 1, 8, 1438),
    ("MNIST", 10, 1, 28, 60_000),
    ("FashionMNIST", 10, 1, 28, 60_000),
    ("SVHN", 10, 3, 32, 73_257),
    ("CIFAR10", 10, 3, 32, 50_000),
    ("CIFAR100", 100, 3, 32, 50_000),
    ("TinyImageNet", 200, 3, 64, 100_000),
)
IMAGENET = ("10 classes, 128 px", 10, 3, 128, 13_000)
IMAGENET_100 = ("100 classes, 224 px", 100, 3, 224, 126_689)
IMAGENET_1K = ("1000 classes, 64 px", 1000, 3, 64, 1_281_167)
MORE = {
    "mtt": (IMAGENET,),
    "tesla": (IMAGENET_1K,),
    "rat_bptt": (IMAGENET_1K,),
    "idm": (IMAGENET,),
    "idc": (IMAGENET, IMAGENET_100),
    "idc_i": (IMAGENET, IMAGENET_100),
    "ncfm": (IMAGENET,),
}
IPCS = {"dm": (1, 10, 50, 100), "datm": (1, 10, 50, 100, 500), "idc": (1, 10, 20, 50)}
PER_IPC = {"idc": ("lr_img",), "idc_i": ("lr_img",)}
"""Settings in proportion to ipc: what is shown is that of one image per class."""

RELATIVES = {
    "dsa": "dc",
    "dcc": "dc",
    "dsac": "dcc",
    "idc_i": "idc",
    **dict.fromkeys(("tesla", "ftd", "datm"), "mtt"),
}
"""Methods whose page leaves to another one what the two have in common."""

WITHOUT_FLIP = "digits, MNIST and SVHN"


@functools.cache
def stand_in(name: str, classes: int, channels: int, size: int, images: int) -> Dataset:
    """A data set of that name and shape, its images a single zero in memory."""
    pixels = torch.zeros((), dtype=torch.uint8).expand(images, channels, size, size)
    labels = torch.arange(images) % classes
    return Dataset(
        name=name,
        train_images=pixels,
        train_labels=labels,
        test_images=pixels[:1],
        test_labels=labels[:1],
        class_names=tuple(map(str, range(classes))),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )


def own_fields(config: type[Config]) -> list[dataclasses.Field[Any]]:
    """The fields that not every method has, and those that mean something else here."""
    found = []
    for field in dataclasses.fields(config):
        help, known = field.metadata["help"], SHARED.get(field.name)
        if known is None or (help != known.metadata["help"] and "no meaning" not in help):
            found.append(field)
    return found


@functools.cache
def resolved(name: str) -> dict[str, dict[int, dict[str, Any]]]:
    """By data set and ipc, what a method's settings are where none is given."""
    method = methods.find(name)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for shape in (*DATASETS, *MORE.get(name, ())):
        dataset = stand_in(*shape)
        found[shape[0]] = {}
        for ipc in IPCS.get(name, (1, 10, 50)):
            case = dict(vars(methods.resolve(method.config(ipc=ipc), dataset)))
            case |= {field: case[field] / ipc for field in PER_IPC.get(name, ())}
            found[shape[0]][ipc] = case
    return found


def text(value: Any) -> str:
    """As it is written on the command line."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return f"{float(f'{value:.4g}'):g}" if isinstance(value, float) else f"`{value}`"


def table(head: Iterable[str], lines: Iterable[Iterable[str]], numbers: int = 0) -> str:
    """Markdown; the last `numbers` columns are set to the right."""
    names = list(head)
    rules = ["---"] * (len(names) - numbers) + ["--:"] * numbers
    rows = [names, rules, *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in map(list, rows))


def of_all(cases: Iterable[Any]) -> str:
    """The one value of all data sets and ipc, or where to look."""
    values = list(dict.fromkeys(cases))
    if len(values) == 1:
        return text(values[0])
    full = next((v for v in values if isinstance(v, str) and "flip" in v.split("_")), "")
    if set(values) == {full, "_".join(part for part in full.split("_") if part != "flip")}:
        return f"`{full}`, without flip for {WITHOUT_FLIP}"
    return ""


def described(name: str) -> dict[str, list[str]]:
    """Of every flag that a method has of its own what it is, and its value where left out."""
    found = [case for by_ipc in resolved(name).values() for case in by_ipc.values()]
    return {
        field.name: [
            f"`--{field.name}`",
            field.metadata["help"],
            of_all(case[field.name] for case in found) or "by data set",
        ]
        for field in own_fields(methods.find(name).config)
    }


def settings(name: str) -> str:
    """What the flags are that every method has, and every flag that this one has of its own."""
    found = [case for by_ipc in resolved(name).values() for case in by_ipc.values()]
    own, common = described(name), []
    for field in dataclasses.fields(methods.find(name).config):
        if field.name not in SHARED or field.name in own or field.metadata["group"] != "method":
            continue
        value = of_all(case[field.name] for case in found)
        shown = field.name != "lr_decoder" and "no meaning" not in field.metadata["help"]
        if shown and value not in ("", text(None)):
            common.append(f"`--{field.name}` {value}")
    said = f"Defaults of the flags that all methods have: {', '.join(common)}."
    if name in RELATIVES:
        relative = described(RELATIVES[name])
        alike = [flag for flag, line in own.items() if relative.get(flag) == line]
        flags = ", ".join(f"`--{flag}`" for flag in alike)
        said += f" As for [{RELATIVES[name]}]({RELATIVES[name]}.md) are {flags}."
        own = {flag: line for flag, line in own.items() if flag not in alike}
    if not own:
        return said + "\n"
    return f"{said}\n\n{table(('flag', 'what it is', 'default'), own.values())}"


def published(name: str) -> str:
    """What depends on the data set and ipc: those with the same values in one row."""
    found, config = resolved(name), methods.find(name).config
    cases = [case for by_ipc in found.values() for case in by_ipc.values()]
    skipped = {"dataset", "ipc", "data_options", "lr_decoder"}
    if "model" not in [field.name for field in own_fields(config)]:
        skipped.add("model")  # the rule that all methods share
    columns = [
        field
        for field in cases[0]
        if field not in skipped and not of_all(case[field] for case in cases)
    ]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for dataset, by_ipc in found.items():
        rows: dict[tuple[str, ...], list[int]] = {}
        for ipc, case in by_ipc.items():
            rows.setdefault(tuple(text(case[c]) for c in columns), []).append(ipc)
        key = tuple((tuple(ipcs), values) for values, ipcs in rows.items())
        alike.setdefault(key, []).append(dataset)
    lines = [
        [
            "all" if len(names) == len(found) else ", ".join(names),
            ", ".join(map(str, ipcs)),
            *values,
        ]
        for rows_of, names in alike.items()
        for ipcs, values in rows_of
    ]
    per_ipc = PER_IPC.get(name, ())
    head = [f"`{c}`" + " / ipc" * (c in per_ipc) for c in columns]
    return table(("data", "ipc", *head), lines, len(columns))


def figures(name: str) -> str:
    """The rows of figures.csv, the digits first."""
    rows = methods.figures(name)
    if not rows:
        return "Not measured yet.\n"
    columns = ("random", "distilled", "full", "iterations", "seconds")
    head = ("data", "ipc", "evaluated in", "random selection", "distilled", "full data")
    rows.sort(key=lambda row: (row["dataset"], int(row["ipc"])))
    return table(
        (*head, "iterations", "seconds"),
        (
            [row["dataset"], row["ipc"], f"`{row['model']}`", *(row[c] for c in columns)]
            for row in rows
        ),
        len(columns),
    )


def tables(name: str) -> dict[str, str]:
    """A method's tables, by the name of their markers."""
    made = {SETTINGS: settings(name), PUBLISHED: published(name), FIGURES: figures(name)}
    return {marker: table.rstrip("\n") for marker, table in made.items()}
