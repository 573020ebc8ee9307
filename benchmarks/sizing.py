"""What the sized cases share: how much of a size a case may take, and its derivatives.

A named size says what a paper's outer iteration consists of. An operator sees that at its published
shape, or at a share of it: fewer classes, then smaller batches, until one call of the baseline fits
into the memory and into a fraction of a second. A case's name says what was left out.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ddfast.bench.sizes import Size, fitted
from ddfast.testing import flatten

ORDERS = "forward", "backward", "double"

# What a call of the baseline may take, in seconds, and what one second of it is worth, roughly: a
# share that is half or twice as large as it might be does no harm.
SECONDS = 0.2
QUICK_SECONDS = 0.025
OPERATIONS = {"cpu": 1e11, "cuda": 1e13}
BYTES = {"cpu": 2e9, "cuda": 5e11}


def wanted(options: argparse.Namespace, *supported: str) -> Iterator[str]:
    """Those of a benchmark's modes that were asked for; all unless `options.modes` names some."""
    chosen = getattr(options, "modes", None)
    return (mode for mode in supported if not chosen or mode in chosen)


def share(
    size: Size,
    options: argparse.Namespace,
    *,
    memory: float,
    operations: float = 0,
    moved: float = 0,
    seconds: float = 1.0,
) -> tuple[Size, str]:
    """The size with so many classes, and images of each, that the work fits; what was left out.

    Args:
        memory: bytes that a class takes.
        operations: floating-point operations that the baseline does for a class.
        moved: bytes that it reads and writes for a class.
        seconds: how many times the usual seconds a call may take.
    """
    each = _seconds(options, operations, moved)
    most = seconds * (QUICK_SECONDS if options.quick else SECONDS)
    budget = min(options.memory, memory * most / each if each else options.memory)
    return fitted(size, max(int(budget), 1), max(int(memory), 1))


def several_classes(
    size: Size,
    options: argparse.Namespace,
    *,
    memory: float,
    operations: float,
    seconds: float = 1.0,
    least: int = 4,
) -> tuple[Size, str]:
    """For whole iterations: the batch and the images per class shrink before the classes do.

    Args:
        memory, operations: of one real image.
        seconds: how many times the usual seconds a call may take.
        least: classes that are kept at least, if there are as many; two with `options.quick`.
    """
    most = seconds * (QUICK_SECONDS if options.quick else SECONDS)
    images = int(min(options.memory / memory, most / _seconds(options, operations, 0)))
    least = min(2 if options.quick else least, size.classes)
    few, parts = fitted(batch_only(size), max(images // least, 1), size.batch_real)
    few, classes = fitted(
        dataclasses.replace(few, classes=size.classes),
        max(images, least * few.batch_real),
        few.batch_real,
    )
    # As there are published settings for.
    ipc = max(n for n in (1, 2, 5, size.ipc) if n <= max(1, min(size.ipc, few.batch_real // 8)))
    ipc_note = f"{ipc} of {size.ipc} images per class" if ipc < size.ipc else ""
    note = ", ".join(part for part in (classes, parts, ipc_note) if part)
    return dataclasses.replace(few, ipc=ipc), note


def _seconds(options: argparse.Namespace, operations: float, moved: float) -> float:
    kind = torch.device(options.device).type
    return operations / OPERATIONS[kind] + moved / BYTES[kind]


def operations_of_image(size: Size) -> int:
    """Of one image's way through the convolutions of the size's ConvNet."""
    total, channels = 0, size.channels
    for block in range(size.depth):
        total += 18 * channels * size.width * (size.side >> block) ** 2
        channels = size.width
    return total


def batch_only(size: Size) -> Size:
    """For work that knows no classes: only the batch is reduced."""
    return dataclasses.replace(size, classes=1)


def classes_only(size: Size) -> Size:
    """For work that knows no batch: only classes are left out."""
    return dataclasses.replace(size, batch_real=1)


def rounds(options: argparse.Namespace, usual: int = 15) -> int:
    return min(usual, 7) if options.quick else usual


def compiles(options: argparse.Namespace, mode: str) -> bool:
    """Whether torch.compile takes part: not where seconds count, nor in double backward.

    Graphs that it has compiled for a derivative cannot be differentiated again.
    """
    return not (options.no_compile or options.quick or mode == "double")


def network(size: Size) -> str:
    """The name of the size's ConvNet."""
    return f"ConvNetD{size.depth}W{size.width}"


def feature_side(size: Size) -> int:
    """Of the plane that the last block leaves."""
    return max(1, size.side >> size.depth)


def label(size: Size, note: str) -> str:
    """What a case's `size` says."""
    return f"{size.name}: {note}" if note else size.name


def drawn(shape: Sequence[int], seed: int, like: Tensor | None = None) -> Tensor:
    """Standard normal numbers, float32; with the dtype and on the device of `like`."""
    numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return numbers if like is None else numbers.to(like)


Result = Tensor | tuple[Tensor, ...]


def work(
    f: Callable[..., Result],
    leaves: Sequence[Tensor],
    mode: str,
    *,
    linear: bool = False,
    directions: Sequence[Tensor] | None = None,
    seed: int = 7,
) -> Callable[[], list[Tensor]]:
    """A provider: the function, with its gradient, or with the gradient of its gradient.

    Args:
        f: of the leaves, one tensor or several.
        mode: "forward", "backward" (values and gradients by the leaves) or "double" (the gradients,
            and those of their product with fixed directions).
        linear: the gradient depends on the cotangents alone, and "double" differentiates by them.
        directions: in the leaves' shapes; None for random ones.
        seed: of cotangents (ones for losses) and directions, the same for all providers and dtypes.
    """
    if mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(_all(f(*leaves)))

        return forward
    mine = [t.detach().requires_grad_() for t in leaves]
    by_values: list[Tensor] = []

    def valued() -> tuple[Tensor, ...]:
        """The results; the cotangents are drawn when their shapes are known."""
        values = _all(f(*mine))
        if not by_values:
            for i, value in enumerate(values):
                # Losses are summed, as the methods do; one of each class at most.
                ones = torch.ones_like(value.detach())
                cotangent = ones if value.dim() < 2 else drawn(value.shape, seed + i, ones)
                by_values.append(cotangent.requires_grad_(linear and mode == "double"))
        return values

    if mode == "backward":

        def backward() -> list[Tensor]:
            values = valued()
            return [*(v.detach() for v in values), *torch.autograd.grad(values, mine, by_values)]

        return backward
    if directions is None:
        directions = [drawn(t.shape, seed + 10 + i, t) for i, t in enumerate(mine)]

    def double() -> list[Tensor]:
        first = torch.autograd.grad(valued(), mine, by_values, create_graph=True)
        second = torch.autograd.grad(first, by_values if linear else mine, directions)
        return [*(t.detach() for t in first), *second]

    return double


def _all(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def norm_error(result: object, exact: object) -> float:
    """The largest error over all tensors, each in norm and relative to its own norm.

    For gradients behind a ReLU: where its input rounds to the other side of zero, one value is off
    in any program, and the largest entry's error is that one's.
    """
    worst = 0.0
    for ours, wanted in zip(flatten(result), flatten(exact), strict=True):  # type: ignore[arg-type]
        scale = float(wanted.detach().double().norm()) or 1.0
        worst = max(worst, float((ours.detach().double() - wanted.detach()).norm()) / scale)
    return worst
