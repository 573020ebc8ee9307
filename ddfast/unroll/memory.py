"""How much memory an unrolled student takes, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddfast.engine.chain import recognise
from ddfast.engine.gradients import plan
from ddfast.memory import FIRST_ORDER, SECOND_ORDER, activation_bytes, in_words
from ddfast.unroll.arguments import ADJOINTS
from ddfast.unroll.history import HISTORIES, spacing
from ddfast.unroll.optimisers import SGD, Optimiser

_PLAIN = SGD()

# Measured on ConvNets of width 64 and 128 with 100 images of 3x32x32, one thread of a CPU.
FIXED = 46 << 20  # what libraries and the allocator keep for themselves
FUSED_PIECE = (4.0, 4.0)  # numbers held per image of a piece, in (convolution outputs, inputs)
GRAPH_STEP = (2.2, 1.8)  # numbers that the graph of a step keeps per image
GRAPH_MORE = 0.5  # steps' worth of memory that the backward pass of a graph takes beside it
VECTORS = 8  # (P,) at a time beside the history


def estimate_memory(
    net: nn.Module,
    image_shape: Sequence[int],
    batch: int,
    steps: int,
    adjoint: str = "exact",
    *,
    optimiser: Optimiser = _PLAIN,
    learns_lr: bool = True,
    history: str = "device",
    window: int | None = None,
    images: int | None = None,
    memory: int | str | None = None,
    path: str = "auto",
) -> int:
    """Peak bytes of :func:`ddfast.unroll.unroll` and its gradient, over what it is given.

    Measured on CPUs; within 15 % on the cases of benchmarks/bench_unroll.py.

    Args:
        net: the student.
        image_shape: (channels, H, W).
        batch: images of a step.
        steps: T.
        images: of the whole set, whose gradient is dense (`batch`).
        learns_lr: whether the learning rate has a derivative.
        adjoint, optimiser, history, window, memory, path: as in `unroll`.

    Returns:
        Bytes on the student's device; a history on the host of a GPU's student is not counted.

    Raises:
        ValueError: an unknown adjoint or history.
    """
    if adjoint not in ADJOINTS:
        raise ValueError(f"adjoint: got {adjoint!r}, expected one of {', '.join(ADJOINTS)}")
    if history not in HISTORIES:
        raise ValueError(f"history: got {history!r}, expected one of {', '.join(HISTORIES)}")
    parameter = next(net.parameters())
    size = parameter.element_size()
    vector = size * sum(p.numel() for p in net.parameters())
    image = torch.Size(image_shape).numel() * size
    count = batch if images is None else images
    differentiated = steps if window is None else window
    fixed = VECTORS * vector + 2 * count * image + 3 * batch * image
    chain = None if path == "general" else recognise(net)
    if adjoint == "graph":
        if chain is None:
            each = activation_bytes(net, _three(image_shape)) * SECOND_ORDER
        else:
            each = size * _weighted(chain.elements(tuple(image_shape)), GRAPH_STEP)
        return int(fixed + FIXED + (differentiated + GRAPH_MORE) * (batch * each + 4 * vector))
    kept = _history_bytes(optimiser, learns_lr, history, differentiated, vector)
    if parameter.device.type == "cuda" and history == "host":
        kept = vector
    if chain is None:
        each = activation_bytes(net, _three(image_shape))
        piece = batch * each * SECOND_ORDER
        if memory is not None or batch * each * SECOND_ORDER > 1 << 30:
            shape = torch.empty((1, *image_shape), dtype=parameter.dtype, device="meta")
            piece = min(piece, plan(net, shape, memory, path).second * each * SECOND_ORDER)
        return int(fixed + FIXED + kept + max(piece, FIRST_ORDER * each))
    blank = torch.empty((1, *image_shape), dtype=parameter.dtype)
    steps_plan = plan(net, blank, memory, path)
    most = min(steps_plan.second, steps_plan.together)
    pieces = -(-batch // most)
    together = -(-batch // pieces)
    each = size * _weighted(chain.elements(tuple(image_shape)), FUSED_PIECE)
    return int(fixed + kept + FIXED + together * each)


def _history_bytes(
    optimiser: Optimiser, learns_lr: bool, history: str, steps: int, vector: int
) -> int:
    """Of the records of so many steps, as `ddfast.unroll.history` keeps them."""
    records = optimiser.vectors(learns_lr) * steps
    if history == "checkpoints":
        every = spacing(steps)
        state = len(optimiser.begin(torch.empty(0)))
        records = state * -(-steps // every) + optimiser.vectors(learns_lr) * every
    return records * vector


def _weighted(elements: tuple[int, int], weights: tuple[float, float]) -> float:
    return elements[0] * weights[0] + elements[1] * weights[1]


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


def fitting(
    budget: int, net: nn.Module, image_shape: Sequence[int], batch: int, steps: int, **options: Any
) -> str:
    """Advice where an unrolled student does not fit into a budget; empty where it does.

    Args:
        budget: bytes.
        net, image_shape, batch, steps, options: as in :func:`estimate_memory`.

    Returns:
        What is needed, and what would fit.
    """
    needed = estimate_memory(net, image_shape, batch, steps, memory=budget, **options)
    # The libraries' own memory is there in any case, and no part of what a budget is about.
    if needed - FIXED <= budget:
        return ""
    other: dict[str, dict[str, str]] = {
        "adjoint exact": {"adjoint": "exact"},
        "history checkpoints": {"adjoint": "exact", "history": "checkpoints"},
    }
    found = [
        f"{name}, which needs {in_words(less)}"
        for name, change in other.items()
        if (
            less := estimate_memory(
                net, image_shape, batch, steps, memory=budget, **{**options, **change}
            )
        )
        - FIXED
        <= budget
    ]
    advice = found[0] if found else "fewer steps or a smaller network"
    return (
        f"the student's {steps} steps need about {in_words(needed)}, and {in_words(budget)} are "
        f"given; --memory {-(-needed // 2**20)}MiB would do, or {advice}"
    )
