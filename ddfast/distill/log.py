"""What a run leaves behind while it goes: one line of JSON per iteration."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from ddfast.memory import peak_resident

SECONDS_BETWEEN_FLUSHES = 1.0


class Log:
    """`log.jsonl`, one line per iteration; after a resume every iteration still occurs once.

    Args:
        path: the file; appended to.
        iteration: the next iteration. Lines of it and of later ones, left behind by a run that was
            killed after its last checkpoint, are removed.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115 closed by close()
        self._file.seek(0)
        end = 0
        while _is_before(line := self._file.readline(), iteration):
            end += len(line)
        self._file.truncate(end)
        self._flushed = time.monotonic()

    def write(self, **values: Any) -> None:
        """A line of these values; numbers that are not finite, which JSON lacks, are null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


def _is_before(line: bytes, iteration: int) -> bool:
    """Whether this is a whole line of an earlier iteration."""
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < iteration
    except (ValueError, KeyError, TypeError):
        return False


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has used so far, of the GPU's memory if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
