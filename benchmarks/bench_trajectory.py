"""An SGD step of flat parameters with the sum of gradients and MTT's distance, in one pass.

    python benchmarks/bench_trajectory.py --out benchmarks/results/trajectory.csv

A small share of any student's step: what is to be seen is that nothing is lost on it. P = 320010 is
ConvNet-3 on CIFAR-10, 2496360 ConvNetD4 with 1000 classes at 64x64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ddfast.losses  # noqa: F401  registers the operators
from ddfast.bench import Case, compiled, run
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
    if not options.no_compile:
        fast = compiled(plain)
        providers["torch.compile"] = lambda: fast(*arguments)
    return Case(
        operator="trajectory",
        name=f"P={size}",
        mode="step and distance",
        exact=exact,
        providers=providers,
        bytes=7 * 4 * size,
        rounds=51,
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    yield case(320_010, options)
    yield case(2_496_360, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
