"""README.md only states what a reader can reproduce: its tables are the CSVs'."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_benchmark_table_is_that_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run python benchmarks/readme_table.py"


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
