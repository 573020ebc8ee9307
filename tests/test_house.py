"""Rules for every file of the repository: short, finished, and nothing of one machine in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_OURS = {"build", "dist", "runs", "gpu-results"}  # what builds and runs leave behind
SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
TEXTS = SOURCES | {".md", ".toml", ".txt", ".csv", ".json", ".sh", ".yaml", ".in", ""}

MOST_LINES = 400
LONGER = {
    "csrc/module.cpp": "the table of all bindings: one idea, and each operator adds to it",
}

# In two parts, so that this file is not found by itself.
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
ONE_MACHINE = re.compile(r"(?<![\w.$}/-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|tm" + r"p)(?![\w-])")


def below(folder: Path) -> Iterator[Path]:
    """Files below a folder; not hidden ones, nor those of links."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir() and not path.name.endswith(".egg-info"):
            yield from below(path)
        elif path.is_file():
            yield path


FILES = {
    str(path.relative_to(ROOT)): path
    for path in below(ROOT)
    if path.suffix in TEXTS and path.relative_to(ROOT).parts[0] not in NOT_OURS
}


def found(pattern: re.Pattern[str], text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def test_the_files_are_found() -> None:
    for name in ("ddfast/cli.py", "kernels/mmd.py", "csrc/module.cpp", "README.md", "setup.py"):
        assert name in FILES
    assert "tests/test_house.py" in FILES and "Makefile" in FILES
    assert set(LONGER) <= set(FILES)


def test_files_are_short_enough_to_read() -> None:
    lines = {name: len(FILES[name].read_text().splitlines()) for name in FILES}
    long = {name: n for name, n in lines.items() if n > MOST_LINES and Path(name).suffix in SOURCES}
    assert set(long) == set(LONGER), "split what is too long by idea; strike what is no longer so"


@pytest.mark.parametrize("pattern", [UNFINISHED, ONE_MACHINE], ids=["unfinished", "one machine"])
def test_no_file_has_it(pattern) -> None:
    assert {n: lines for n in FILES if (lines := found(pattern, FILES[n].read_text()))} == {}


def test_the_patterns_find_what_they_are_for() -> None:
    word = "TO" + "DO"
    assert found(UNFINISHED, f"a = 1\n# {word}: more\n{word}S = 3") == [f"# {word}: more"]
    for place in ("wo" + "rk", "ro" + "ot", "tm" + "p", "ho" + "me"):
        for line in (f"cd /{place}/main", f'"/{place}"', f"at /{place}.", f"(/{place}/a)"):
            assert found(ONE_MACHINE, line) == [line]
        for line in (f"https://x.org/{place}/", f"$DIR/{place}", f"a/{place}", f"/{place}ing"):
            assert found(ONE_MACHINE, line) == []
