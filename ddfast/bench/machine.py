"""What a measurement was made on and with."""

from __future__ import annotations

import functools
import importlib
import platform
import subprocess
from pathlib import Path

import numpy
import torch

import ddfast
from ddfast import backend


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return (
                    line.split(":", 1)[1].strip() + f", {torch.backends.cpu.get_cpu_capability()}"
                )
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """Short hash of ddfast's checkout, '+' behind it if files differ; empty outside one."""
    here = Path(__file__).resolve()
    top = _git(here.parent, "rev-parse", "--show-toplevel")
    # An installed ddfast may lie in an environment in somebody else's checkout.
    if not top or not Path(top, "ddfast", "bench", here.name).exists():
        return ""
    return _git(here.parent, "describe", "--always", "--dirty=+")


def _git(folder: Path, *words: str) -> str:
    """What git says there; "" without git or outside a checkout."""
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def versions() -> dict[str, str]:
    """Of everything that the times depend on; "" for what is missing.

    "level" is the instruction set of the C++ kernels that answers.
    """
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = ""
    return {
        "torch": torch.__version__,
        "triton": triton,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "level": backend.compiled.level() if backend.compiled is not None else "",
        "ddfast": ddfast.__version__,
        "commit": commit(),
    }


def in_words(device: str, threads: int) -> str:
    """One line, which says whether ddfast has kernels of its own here."""
    of = versions()
    if device == "cuda":
        kernels = f"Triton {of['triton']}" if of["triton"] else "none, the reference answers"
    else:
        kernels = f"C++, {of['level']}" if of["level"] else "none, the reference answers"
    plural = "s" * (threads != 1)
    return (
        f"{device_name(device)}; {threads} thread{plural}; torch {of['torch']}; kernels: {kernels}"
    )
