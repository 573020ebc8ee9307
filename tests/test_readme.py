"""README.md only states what a reader can reproduce: its code runs, its table is the CSVs'."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code, tmp_path):
    # The examples may draw random inputs as a reader would, so in a process of their own.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_benchmark_table_is_that_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run python benchmarks/readme_table.py"


def test_linked_files_exist():
    links = re.findall(r'(?:\]\(|src=")(?!http)([^)#"]+)', README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_of_the_makefile_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"\bmake (\w+)", README))
    assert {"demo", "test"} <= named <= targets


def test_first_screen():
    """What it is, the picture, the table and the two commands, before anything else."""
    first = README.split("\n## ")[0]
    for part in ("distillation", "docs/digits.png", "random", "make demo", "make test"):
        assert part in first
    assert len(first.splitlines()) <= 45
