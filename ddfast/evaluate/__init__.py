"""What a set of images is worth: networks trained on it by a published protocol, and tested."""

from __future__ import annotations

from ddfast.evaluate.compare import evaluate
from ddfast.evaluate.presets import PROTOCOLS, protocol
from ddfast.evaluate.protocols import Protocol, steps_matched
from ddfast.evaluate.report import Report, Row
from ddfast.evaluate.sets import random_sets
from ddfast.evaluate.train import NotFinite, accuracy, train_networks

__all__ = [
    "PROTOCOLS",
    "NotFinite",
    "Protocol",
    "Report",
    "Row",
    "accuracy",
    "evaluate",
    "protocol",
    "random_sets",
    "steps_matched",
    "train_networks",
]
