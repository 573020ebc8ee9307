"""glibc's malloc with thresholds under which large activations are kept instead of returned.

With its default thresholds glibc returns every large block to the system and faults it in again.
"""

from __future__ import annotations

import os
import sys

THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
FLAG = "--tuned_allocator"


def tuned() -> bool:
    """Whether this process was started with these thresholds."""
    return THRESHOLDS.items() <= os.environ.items()


def label() -> str:
    """What a mode's name ends with under these thresholds."""
    return "; allocator tuned" if tuned() else ""


def start_again() -> None:
    """Replace this process by one with the thresholds, which malloc reads at the start only.

    The command line is the same without the flag that asked for it.
    """
    rest = [word for word in sys.orig_argv[1:] if word != FLAG]
    os.execve(sys.executable, [sys.executable, *rest], os.environ | THRESHOLDS)
