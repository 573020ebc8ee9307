"""What of the steps of a student is kept for their reverse: on the device, the host, or in part.

Steps are numbered from 0. A history is filled in ascending order by `put`, and read by `reverse`
as often as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddfast.unroll.optimisers import State

HISTORIES = ("device", "host", "checkpoints")

Redo = Callable[[State, int], tuple[State, State]]
"""From the state before a step and its number to (what the step's reverse needs, state after)."""


class Kept:
    """The record of every step.

    Args:
        on_host: keep them in main memory, and bring one step at a time back.
    """

    def __init__(self, on_host: bool) -> None:
        self.on_host = on_host
        self.records: list[tuple[int, State]] = []

    def put(self, number: int, before: State, record: State) -> None:
        self.records.append((number, tuple(map(_to_host, record)) if self.on_host else record))

    def reverse(self, device: torch.device, redo: Redo) -> Iterator[tuple[int, State]]:
        for number, record in reversed(self.records):
            yield number, tuple(x.to(device, non_blocking=True) for x in record)


class Checkpoints:
    """The state before every k-th step, k the square root of their number; the others again.

    Two square roots of what `Kept` takes, and the steps a second time.
    """

    def __init__(self, steps: int) -> None:
        self.every = spacing(steps)
        self.seen = 0
        self.states: list[tuple[int, State]] = []
        self.last = 0

    def put(self, number: int, before: State, record: State) -> None:
        if self.seen % self.every == 0:
            self.states.append((number, before))
        self.seen, self.last = self.seen + 1, number

    def reverse(self, device: torch.device, redo: Redo) -> Iterator[tuple[int, State]]:
        end = self.last
        for first, state in reversed(self.states):
            records = []
            for number in range(first, end + 1):
                record, state = redo(state, number)
                records.append((number, record))
            end = first - 1
            while records:
                yield records.pop()


def spacing(steps: int) -> int:
    """Steps from one checkpoint to the next."""
    return max(1, math.isqrt(max(steps - 1, 0)) + 1)


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return host.copy_(x, non_blocking=True)
