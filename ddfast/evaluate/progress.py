"""The progress bar of an evaluation."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm

__all__ = ["bar"]


@contextlib.contextmanager
def bar(total: int, title: str, progress: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over images; what it yields may be called from any thread."""
    lock = threading.Lock()
    shown = tqdm(
        total=total,
        desc=title,
        unit="image",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )

    def advance(images: int) -> None:
        with lock:
            shown.update(images)

    try:
        yield advance
    finally:
        shown.close()
