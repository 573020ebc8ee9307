"""The wheel: what is in it, that it works from an empty folder, with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "benchmarks",
    "csrc",
    "ddfast",
    "docs",
    "examples",
    "kernels",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
]

USE = """
import contextlib, sys, warnings
# An editable install of the checkout in this environment must not fill in what the wheel lacks.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, ddfast
    from ddfast import losses
    a, b = torch.eye(3).requires_grad_(), torch.ones(3, 3)
    for _ in range(2):
        value = losses.gradient_distance([a], [b])
        value.backward()
with contextlib.redirect_stdout(None):
    answers = ddfast.backends()
print(round(value.item(), 4))
print(sum("compiled CPU kernels are missing" in str(w.message) for w in caught))
print(ddfast.__file__)
print(answers["CPU"])
print(answers["CUDA"])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is under version control, so that no build output gets in."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, folder / name, ignore=ignored)
        else:
            shutil.copy(here, folder / name)
    return folder


def build(source: Path, kind: str, out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "build", *([f"--{kind}"] if kind else []), "-o", out, source]
    # Isolated: neither torch nor anything else of this environment is there at build time.
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=out
    )


def use_installed(wheel: Path, folder: Path) -> list[str]:
    site, empty = folder / "site", folder / "empty"
    empty.mkdir(parents=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", site, wheel], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        text=True,
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2] == str(site / "ddfast" / "__init__.py")
    return lines


def expected_files(source: Path) -> set[str]:
    package = {str(p.relative_to(source)) for p in (source / "ddfast").rglob("*.py")}
    kernels = {f"ddfast/kernels/{p.name}" for p in (source / "kernels").glob("*.py")}
    # What writes the checkout's tables is not installed.
    scripts = {"accuracy.py", "adjoints.py", "peak_memory.py", "test_ratios.py"}
    scripts |= {"readme_table.py", "page_tables.py", "method_pages.py", "overview_tables.py"}
    found = {p.name for p in (source / "benchmarks").glob("*.py")} - scripts
    benchmarks = {f"ddfast/benchmarks/{name}" for name in found}
    stubs = {"ddfast/_C.pyi", "ddfast/_cuda.pyi"}
    data = {"ddfast/py.typed", "ddfast/methods/figures.csv"} | stubs
    return package | kernels | benchmarks | data


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Built from the source distribution, as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    done = build(source, "", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = out.glob("*.whl")
    return found


def test_file_list(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (top_level,) = (f for f in files if f.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["ddfast"]
        (metadata,) = (f for f in files if f.endswith(".dist-info/METADATA"))
        requirements = [
            line.split()[1]
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    names = {r.split(">")[0] for r in requirements}
    assert names == {"torch", "numpy", "safetensors", "tqdm", "jsonargparse"}
    plain = {f for f in files if ".dist-info/" not in f}
    compiled = {f for f in plain if f.endswith((".so", ".pyd"))}
    modules = ["ddfast/_C", "ddfast/_cuda"] if shutil.which("nvcc") else ["ddfast/_C"]
    assert sorted(f.split(".")[0] for f in compiled) == modules
    assert plain - compiled == expected_files(source)
    assert any(f.endswith(".dist-info/licenses/LICENSE") for f in files)


def test_source_distribution_holds_what_readme_links_to(wheel, source):
    (archive,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    for folder in ("docs", "examples"):
        expected = {p.relative_to(source).as_posix() for p in (source / folder).rglob("*.*")}
        assert expected and expected <= files


def test_installed_wheel_works_from_an_empty_folder(wheel, tmp_path):
    value, warnings, _, cpu, cuda = use_installed(wheel, tmp_path)
    assert (value, warnings) == ("1.268", "0")
    assert "C++, level" in cpu
    assert ("conv_kernel in CUDA C++" in cuda) == (shutil.which("nvcc") is not None)


@pytest.mark.parametrize(
    "environment",
    [{"DDFAST_NO_EXT": "1"}, {"CXX": "/nowhere/c++"}],
    ids=["left out", "no compiler"],
)
def test_without_the_extension(source, tmp_path, environment):
    out = tmp_path / "dist"
    out.mkdir()
    done = build(source, "wheel", out, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if "CXX" in environment:
        assert "no C++ compiler found" in done.stdout + done.stderr
    (wheel,) = out.glob("*-py3-none-any.whl")
    value, warnings, _, cpu, _ = use_installed(wheel, tmp_path)
    assert (value, warnings) == ("1.268", "1")
    assert cpu.startswith("reference (no compiled kernels")


def test_a_compile_error_is_not_hidden(source, tmp_path):
    done = build(source, "wheel", tmp_path, CXXFLAGS="--no-such-flag")
    assert done.returncode != 0
    assert "DDFAST_NO_EXT=1 installs ddfast without it" in done.stdout + done.stderr


def test_kernels_folder_on_the_path_is_refused():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "keep the ddfast checkout off sys.path" in done.stderr
