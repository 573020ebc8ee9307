"""Which implementation answers an operator: compiled C++, Triton, or the PyTorch reference.

The dispatcher chooses by device: CPU tensors go to C++, CUDA tensors to Triton, everything else to
the reference. `use_backend("reference")` overrides it, for tests and doubt.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

try:
    from ddfast import _C as _compiled
except ImportError as _error:
    compiled: Any = None
    compiled_missing = str(_error)
else:
    compiled = _compiled
    compiled_missing = ""

#: Forces one instruction-set level of the C++ kernels: a name that `ddfast.backends()` lists.
LEVEL_VARIABLE = "DDFAST_CPU_LEVEL"

if compiled is not None and LEVEL_VARIABLE in os.environ:
    try:
        compiled.set_level(os.environ[LEVEL_VARIABLE])
    except ValueError as _error:
        raise ValueError(f"{LEVEL_VARIABLE}: {_error}") from None

BACKENDS = ("auto", "reference")
_forced = "auto"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Answer every operator from one backend inside the block, in all threads.

    Args:
        name: "reference" (plain PyTorch, any device and dtype) or "auto" (by device).

    Raises:
        ValueError: unknown name.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def reference_forced() -> bool:
    """Whether `use_backend("reference")` is in force."""
    return _forced == "reference"


@functools.cache
def cpu_kernels() -> Any | None:
    """The compiled module, or None with one warning where it was not built."""
    if compiled is None:
        warnings.warn(
            f"ddfast's compiled CPU kernels are missing ({compiled_missing}); the slower PyTorch "
            "reference answers. Reinstall ddfast with a C++ compiler on the path to build them.",
            RuntimeWarning,
            stacklevel=2,
        )
    return compiled


@functools.cache
def triton_kernels(operator: str) -> ModuleType | None:
    """The Triton kernels of one operator, or None with one warning where triton is missing."""
    try:
        return importlib.import_module(f"ddfast.kernels.{operator}")
    except ImportError as error:
        warnings.warn(
            f"ddfast's GPU kernels of {operator} cannot be loaded ({error}); the slower PyTorch "
            "reference answers on CUDA.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def backends() -> dict[str, str]:
    """Print, and return, what answers on each device and why.

    Returns:
        {"CPU": ..., "CUDA": ..., "other": ...}: the backend, with levels or the reason it is
        missing.
    """
    if compiled is None:
        cpu = f"reference (no compiled kernels: {compiled_missing})"
    else:
        levels = ", ".join(compiled.levels())
        cpu = f"C++, level {compiled.level()} (available: {levels}; {LEVEL_VARIABLE} forces one)"
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        cuda = f"reference (no triton: {error})"
    else:
        cuda = f"Triton {triton.__version__}"
        if not torch.cuda.is_available():
            cuda += " (no CUDA device here)"
    try:
        importlib.import_module("ddfast._cuda")
        cuda += "; conv_kernel in CUDA C++"
    except ImportError:
        cuda += "; conv_kernel by the reference (no ddfast._cuda, which needs nvcc to be built)"
    answers = {"CPU": cpu, "CUDA": cuda, "other": "reference"}
    if reference_forced():
        answers = dict.fromkeys(answers, 'reference (forced by use_backend("reference"))')
    for device, answer in answers.items():
        print(f"{device:6} {answer}")
    return answers
