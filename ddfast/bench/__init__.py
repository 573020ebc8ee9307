"""Timing that can be believed: verify, interleave, take medians, state threads and machine."""

from ddfast.bench.case import Case, compiled
from ddfast.bench.clock import graphed
from ddfast.bench.machine import commit, device_name
from ddfast.bench.registry import Options
from ddfast.bench.script import run
from ddfast.bench.sizes import SIZES, Size, fitted

__all__ = [
    "SIZES",
    "Case",
    "Options",
    "Size",
    "commit",
    "compiled",
    "device_name",
    "fitted",
    "graphed",
    "run",
]
