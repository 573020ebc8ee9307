"""Bytes that a call holds at most beyond what was held before it."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def weigh(f: Callable[[], object], device: str) -> int | None:
    """Call f and return the bytes, or None where the system does not tell.

    CUDA: of PyTorch's allocator. CPU: pages of the process, on Linux, after malloc gave back what
    it kept; what libraries keep from an earlier call is not counted.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim()()
    started = _restart()
    before = _status("VmRSS")
    f()
    peak = _status("VmHWM")
    return max(peak - before, 0) if started else None


def _restart() -> bool:
    """Make the present memory the peak; whether that worked."""
    try:
        RESET.write_text("5")  # proc(5): resets the peak of the resident set
    except OSError:
        return False
    return _status("VmHWM") > 0


def _status(name: str) -> int:
    """Bytes by the process's status; 0 where there is none."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


@functools.cache
def _trim() -> Callable[[], object]:
    """glibc's malloc_trim, or nothing with another C library."""
    if sys.platform == "linux":
        try:
            trim = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):
            return lambda: None
        return lambda: trim(0)
    return lambda: None
