"""What README.md and docs/ state is so: their code runs, their links lead somewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
import runpy
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import ddfast.ops
from ddfast.ops.registry import library

ROOT = Path(__file__).resolve().parents[1]
README, OPERATORS = ROOT / "README.md", ROOT / "docs" / "operators"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```$", flags=re.S | re.M)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples(page: Path) -> list[types.CodeType]:
    """The Python code of a page; tracebacks show the page's own lines."""
    text = page.read_text(encoding="utf-8")
    return [
        compile("\n" * text.count("\n", 0, found.start(1)) + found[1], str(page), "exec")
        for found in CODE.finditer(text)
    ]


# A reader may draw random numbers as torch offers them, and so may the pages.
@pytest.mark.uses_global_random_state
@pytest.mark.parametrize("page", [p for p in PAGES if CODE.search(p.read_text())], ids=named)
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """A page's examples in their order, those of README.md each by itself; without a warning."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    for example in examples(page):
        if page == README:
            module = types.ModuleType("page")
        monkeypatch.setitem(sys.modules, "page", module)  # where a dataclass looks its types up
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            exec(example, module.__dict__)
    if page == README:
        assert not capsys.readouterr().err


def prose(page: Path) -> str:
    """A page without code and display maths, what is left on its own lines."""
    code = re.compile(r"```.*?```|`[^`]*`", flags=re.S)
    return code.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_linked_files_exist(page):
    text = prose(page)
    links = re.findall(r'(?:\]\(|src=")(?!\w+:)([^)#"\s]+)', text)
    assert links or page != README
    for link in links:
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_maths_within_a_line_is_left_alone_by_markdown(page):
    """GitHub's Markdown takes the backslash from `\\,` and `\\|`, and stars and underlines too."""
    text = prose(page)
    assert text.count("$") % 2 == 0
    for maths in re.findall(r"\$([^$]+)\$", text):
        assert not re.search(r"\n|\\[^a-zA-Z]|\*|[^\w]_", maths), maths


# --- docs/operators -------------------------------------------------------------------------------

#: Pages of what runs on the operators and is none.
ENGINES = {"unroll", "student", "class_gradients", "features", "empirical_nngp"}


def test_every_operator_has_a_page():
    names = {m.name for m in pkgutil.iter_modules(ddfast.ops.__path__)} - {"registry"}
    modules = {n for n in names if hasattr(importlib.import_module(f"ddfast.ops.{n}"), "declare")}
    pages = {page.stem: page.read_text(encoding="utf-8") for page in OPERATORS.glob("*.md")}
    index = pages.pop("README")
    assert set(pages) == modules | ENGINES
    for operator in sorted(full.removeprefix("ddfast::") for full in library._op_defs):
        assert any(f"`{operator}`" in text for text in pages.values()), operator
    for page in pages:
        assert f"({page}.md)" in index, page


@pytest.mark.parametrize(
    "page", sorted(p for p in OPERATORS.glob("*.md") if p.stem != "README"), ids=named
)
def test_every_page_has_its_parts(page):
    """What a reader who knows one page looks for on another; short enough to be read."""
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"^## (.*)$", text, flags=re.M)
    wanted = "Derivatives", "Edge cases", "Measured", "Example", "Sources"
    assert [part for part in parts if part in wanted] == list(wanted)
    assert 40 <= text.count("\n") <= 120
    assert CODE.search(text)


def test_measured_figures_are_those_of_the_results(monkeypatch):
    # In this process: what the script imports is here already.
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["page_tables.py", "--check"])
    script = runpy.run_path(str(ROOT / "benchmarks" / "page_tables.py"))
    assert script["main"]() == 0, "run python benchmarks/page_tables.py"
