"""A bar below the rows that are printed as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class _Plain:
    """No bar; rows are printed."""

    def update(self) -> None: ...

    def write(self, text: str) -> None:
        print(text, flush=True)


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Any]:
    """Something with `update()`, one of `total` is done, and `write(text)`, to standard output."""
    if quiet:
        yield _Plain()
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Plain()
        return
    with tqdm(total=total, unit="benchmark", disable=None, dynamic_ncols=True) as bar:
        yield bar
