"""docs/methods has a page for every method, and what stands there is what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast import data, methods
from ddfast.generator import train as generator
from ddfast.methods.config import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"
NAMES = list(methods.methods())
HEADINGS = (
    *("Objective", "Algorithm", "Settings", "Deviations and switches", "Evaluation"),
    *("Measured here", "Use", "Source"),
)
TRAJECTORIES = ("mtt", "tesla", "ftd", "datm")


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    return page(name).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_pages_are_the_methods() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted([*NAMES, "README"])


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_all_parts(name) -> None:
    assert tuple(re.findall(r"^## (.*)$", page(name), flags=re.M)) == HEADINGS
    assert section(name, "Objective").lstrip().startswith("```math")
    assert f"ddfast distill {name} " in section(name, "Use")
    assert f"`{methods.find(name).protocol}`" in section(name, "Evaluation")
    by_hand = re.sub(r"(<!-- (\w+): begin -->\n).*?(<!-- \2: end -->)", "", page(name), flags=re.S)
    assert 40 <= len(by_hand.splitlines()) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_settings_mention_every_field_of_the_method(name) -> None:
    shared = {field.name for field in dataclasses.fields(Config)}
    text = section(name, "Settings")
    for field in dataclasses.fields(methods.find(name).config):
        if field.name not in shared:
            assert f"`--{field.name}`" in text, field.name


@pytest.mark.parametrize("name", NAMES)
def test_flags_that_a_page_names_exist(name) -> None:
    """Of the method, of the commands, or of the expert's and the generator's training."""
    fields = dataclasses.fields(methods.find(name).config)
    known = {each for field in fields for each in (field.name, *field.metadata["aliases"])}
    known |= {
        "model",
        "out",
        "memory",
        "protocol",
        "device",
        "evaluate",
        "optimiser",
        "alpha",
        "adaptive",
    }
    known |= {"method"}  # of an official script
    assert set(re.findall(r"--(\w+)", page(name).replace("<!--", "").replace("-->", ""))) <= known


def test_links_lead_somewhere() -> None:
    for path in PAGES.glob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (PAGES / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_page_names_exist(name) -> None:
    for place in re.findall(r"`((?:ddfast|tests|benchmarks)/[\w/.]+)`", page(name)):
        assert (ROOT / place).exists(), place


def rows() -> dict[str, list[str]]:
    """Of the overview: paper, what is matched, operators, by method."""
    lines = re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (.*) \|$", page("README"), flags=re.M)
    return {name: rest.split(" | ") for name, rest in lines}


def test_the_overview_has_every_method() -> None:
    assert list(rows()) == NAMES
    for name, (title, matches, _) in rows().items():
        known = methods.find(name)
        assert (title, matches) == (known.title, known.matches)


class _Operators(TorchDispatchMode):
    """Names of the operators of ddfast that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ddfast":
            ending = r"(_(bwd|tangent|adjoint|bandwidth))+$"
            self.seen.add(re.sub(ending, "", func._opname))
        return func(*args, **(kwargs or {}))


FEW: dict[str, dict[str, Any]] = {
    "cafe": {"outer_most": 2, "inner_most": 1},
    **{name: {"outer_loop": 2, "inner_loop": 1} for name in ("dc", "dsa")},
    "dcc": {"outer_loop": 2, "inner_loop": 1, "outer_warmup": 0},
    "dsac": {"outer_loop": 2, "inner_loop": 1, "outer_warmup": 0},
    **{name: {"inner_loop": 2, "n_data": 4} for name in ("idc", "idc_i")},
    **{name: {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 1} for name in TRAJECTORIES},
    "idm": {"model_train_steps": 1},
    "ncfm": {"num_premodel": 1, "pretrain_epochs": 1},
    "dd": {"distill_epochs": 1},
    "linba": {"inner_steps": 2},
    "rat_bptt": {"window": 1, "totwindow": 2},
    "rfad": {"n_models": 2, "iterations": 2},
    "it_gan": {"inversion_steps": 1},
}


def called(name: str, place: Path, make_experts, **settings: Any) -> set[str]:
    """Operators in an iteration of a method, with its preparation."""
    dataset = data.generated(classes=3, size=16, train_per_class=8, test_per_class=1)
    model = {"rfad": "ConvNetD1W4NN", "frepo": "FRePoNetD1W4"}.get(name, "ConvNetD2W4")
    settings = {"ipc": 2, "model": model, **FEW.get(name, {}), **settings}
    if name in TRAJECTORIES:
        settings["experts"] = str(make_experts(dataset, model))
    if name == "it_gan":
        made = generator.Config(iterations=1, width=4, width_discriminator=4)
        generator.train(dataset, made, place, progress=False, device="cpu")
        settings["generator"] = str(place / generator.GENERATOR)
    known = methods.find(name)
    config = methods.resolve(known.config(**settings), dataset)
    run = methods.start(config, dataset, 1 << 30, dtype=torch.float32)
    known.check(run)
    with _Operators() as operators:
        list(known.prepare(run))
        known.step(run)
    return operators.seen


@pytest.mark.parametrize("name", NAMES)
def test_the_overview_names_the_operators_that_are_called(name, tmp_path, make_experts) -> None:
    named = set(re.findall(r"`(\w+)`", rows()[name][2]))
    if name in ("kip", "ls"):
        seen = called(name, tmp_path, make_experts, kernel="ntk-fc1")
        seen |= called(name, tmp_path, make_experts, kernel="ntk-conv1")
    else:
        seen = called(name, tmp_path / "made", make_experts)
        for operator in ("class_conv", "class_input_grad", "norm_relu_pool", "first_block"):
            assert f"`{operator}`" in page("README") and operator in seen
            seen.remove(operator)
    assert seen == named
