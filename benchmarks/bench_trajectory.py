"""An SGD step of flat parameters with the sum of gradients and MTT's distance, in one pass.

    python benchmarks/bench_trajectory.py --out benchmarks/results/trajectory.csv

A small share of any student's step: what is to be seen is that nothing is lost on it. P = 320010 is
ConvNet-3 on CIFAR-10, 2496360 ConvNetD4 with 1000 classes at 64x64. At a named size also the
distance alone, as the loss of an unrolled student has it, with its derivatives.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddfast import losses, nets
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.ops import trajectory as ops
from ddfast.reference import trajectory as reference


def plain(
    theta: Tensor, gradient: Tensor, total: Tensor, start: Tensor, target: Tensor, lr: Tensor
) -> tuple[Tensor, ...]:
    """As the official scripts do it, operation by operation."""
    moved = theta - lr * gradient
    return (
        moved,
        total + gradient,
        torch.nn.functional.mse_loss(moved, target, reduction="sum"),
        torch.nn.functional.mse_loss(start, target, reduction="sum"),
    )


def ours(*arguments: Tensor) -> tuple[Tensor, ...]:
    moved, total, squares = ops.trajectory(*arguments)
    return moved, total, squares[0], squares[1]


def case(size: int, options: argparse.Namespace) -> Case:
    random = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, generator=random).to(options.device) for _ in range(5)]
    arguments = (*vectors, torch.tensor(0.01, device=options.device))

    def exact() -> tuple[Tensor, ...]:
        moved, total, squares = reference.trajectory(*(x.double() for x in arguments))
        return moved, total, squares[0], squares[1]

    providers: dict[str, Callable[[], object]] = {
        "eager": lambda: plain(*arguments),
        "ddfast": lambda: ours(*arguments),
    }
    if sizing.compiles(options, "forward"):
        fast = compiled(plain)
        providers["torch.compile"] = lambda: fast(*arguments)
    return Case(
        operator="trajectory",
        name=f"P={size}",
        mode="step and distance",
        exact=exact,
        providers=providers,
        bytes=7 * 4 * size,
        rounds=sizing.rounds(options, 51),
        device=options.device,
    )


def distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """As the official scripts do it."""
    moved = torch.nn.functional.mse_loss(student, target, reduction="sum")
    return moved / torch.nn.functional.mse_loss(start, target, reduction="sum")


def distance_case(size: int, mode: str, options: argparse.Namespace) -> Case:
    """The student's loss, by its parameters."""
    student, start, target = (sizing.drawn([size], k).to(options.device) for k in range(3))

    def provider(f: Callable[..., Tensor], *given: Tensor) -> Callable[[], object]:
        return sizing.work(lambda theta: f(theta, *given[1:]), given[:1], mode)

    given = student, start, target
    providers = {
        "eager": provider(distance, *given),
        "ddfast": provider(losses.trajectory_distance, *given),
    }
    if sizing.compiles(options, mode):
        providers["torch.compile"] = provider(compiled(distance), *given)
    return Case(
        operator="trajectory_distance",
        name=f"P={size}",
        mode=mode,
        exact=provider(distance, *(x.double() for x in given)),
        providers=providers,
        # Three vectors read, the gradient written; for its derivative another of each.
        bytes={"forward": 3, "backward": 4, "double": 6}[mode] * 4 * size,
        rounds=sizing.rounds(options, 51),
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    yield case(320_010, options)
    yield case(2_496_360, options)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    net = nets.build(sizing.network(size), size.channels, size.classes, size.side)
    count = sum(p.numel() for p in net.parameters())
    if "forward" in sizing.wanted(options, "forward"):
        yield dataclasses.replace(case(count, options), mode="forward", size=size.name)
    for mode in sizing.wanted(options, *sizing.ORDERS):
        yield dataclasses.replace(distance_case(count, mode, options), size=size.name)


if __name__ == "__main__":
    run(cases, __doc__ or "")
