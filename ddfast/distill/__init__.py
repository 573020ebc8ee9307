"""Running a method on a data set: the loop with its checkpoints, log, progress and pictures."""

from __future__ import annotations

from ddfast.distill.folder import unfinished
from ddfast.distill.loop import ARTEFACT, distill

__all__ = ["ARTEFACT", "distill", "unfinished"]
