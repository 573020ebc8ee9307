"""Instruction-set levels: forced by one variable, free of shared code, portable to compile."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddfast import backend
from ddfast.testing import at_level, levels

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


def test_the_portable_level_is_always_there_and_the_best_is_chosen():
    assert levels()[-1] == "portable"
    done = run("from ddfast import backend; print(backend.compiled.level())")
    assert done.stdout.split() == [levels()[0]]


@pytest.mark.parametrize("level", levels())
def test_the_variable_forces_a_level(level):
    done = run("import ddfast; print(ddfast.backends()['CPU'])", DDFAST_CPU_LEVEL=level)
    assert f"level {level} (" in done.stdout


def test_an_unknown_level_is_refused_by_name():
    done = run("import ddfast", DDFAST_CPU_LEVEL="sse9")
    assert done.returncode != 0
    assert "DDFAST_CPU_LEVEL: unknown instruction-set level 'sse9'" in done.stderr
    assert "portable" in done.stderr


def test_at_level_restores():
    before = backend.compiled.level()
    with at_level("portable"):
        assert backend.compiled.level() == "portable"
    assert backend.compiled.level() == before


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("level", ["v3", "v4"])
def test_a_level_exports_only_its_own_names(kernel, level, tmp_path):
    """A weak symbol would let the linker use AVX-512 code in the portable kernels."""
    cxx, nm = shutil.which("g++"), shutil.which("nm")
    if not (IS_X86 and cxx and nm):
        pytest.skip("needs g++ and nm on x86-64")
    target = tmp_path / "kernel.o"
    flags = [
        "-std=c++17",
        "-O2",
        "-fopenmp",
        "-fno-exceptions",  # as setup.py
        f"-march=x86-64-{level}",
        f"-DDDFAST_LEVEL=x86_64_{level}",
    ]
    subprocess.run([cxx, *flags, "-c", kernel, "-o", target], check=True)
    text = subprocess.run([nm, "-C", target], check=True, capture_output=True, text=True).stdout
    # T, W, V, D, B, R: defined and visible to the linker.
    visible = re.findall(r"^[0-9a-f]+ [TWVDBRu] (.*)$", text, flags=re.M)
    assert visible
    assert all(f"x86_64_{level}" in name for name in visible), visible


COMPILERS = {
    "clang": ["clang++", "-std=c++17", "-O2", "-Wall", "-Werror"],
    "aarch64": ["aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-Wall", "-Werror"],
    "without OpenMP": ["g++", "-std=c++17", "-O2", "-Wall", "-Werror"],
    "x86-64-v2": ["g++", "-std=c++17", "-O2", "-march=x86-64-v2", "-fopenmp", "-Wall", "-Werror"],
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("name", COMPILERS)
def test_compiles_elsewhere(kernel, name, tmp_path):
    command = COMPILERS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    if name == "x86-64-v2" and not IS_X86:
        pytest.skip("not an x86-64 machine")
    done = subprocess.run(
        [*command, "-c", kernel, "-o", tmp_path / "k.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
