"""The process that a long run lives in: its device, its signals, what it says."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm


class Stoppable(Protocol):
    """Something that runs until it finds `stop` set."""

    stop: bool


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device; for None a GPU if there is one, else the CPU.

    Raises:
        ValueError: it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {str(device)!r}, which cannot be used: {error}") from None
    return found


def clear(place: Path) -> None:
    """Remove what a killed process left half written."""
    for path in place.glob(".*.????????"):
        path.unlink(missing_ok=True)


def say(progress: bool, text: str) -> None:
    """A line on stderr, above the bar, unless the run is to be quiet."""
    if progress:
        tqdm.write(text, file=sys.stderr)


def warn_of_changes(before: dict[str, Any], now: dict[str, Any], stacklevel: int) -> None:
    """Warn if a resumed run goes on under other conditions than it was begun with."""
    changed = [
        f"{name} {value} instead of {before.get(name)}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"going on with {', '.join(changed)}: results may differ in the last digits",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms inside the block, where there are any."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # costs time, changes nothing
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def signals(run: Stoppable) -> Iterator[None]:
    """SIGINT and SIGTERM end the run at its next update; a second one kills it, as SIGKILL would.

    The first only leaves a note, so that no exception can strike in the middle of saving.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if run.stop:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        run.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
