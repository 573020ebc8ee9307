"""Timing that can be believed: verify, interleave, take medians, state threads and machine."""

from ddfast.bench.case import Case, compiled
from ddfast.bench.machine import commit, device_name
from ddfast.bench.script import run

__all__ = ["Case", "commit", "compiled", "device_name", "run"]
