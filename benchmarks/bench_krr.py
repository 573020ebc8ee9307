"""Kernel ridge regression: loss and gradients by K_ss, K_ts and Y_s.

    python benchmarks/bench_krr.py --out benchmarks/results/krr.csv

The baseline is the plain formula with torch.linalg.solve and autograd, all in the dtype of the
solve: LU, and a second solve in its backward. "cholesky" is autograd through torch.linalg.cholesky
and cholesky_solve, which differentiates the factorisation. n=100 is CIFAR-10 at ten images a class
against KIP's 5000 targets, n=500 at fifty, n=2000 CIFAR-100 at twenty.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddfast import losses
from ddfast.bench import Case, run
from ddfast.reference import krr as reference


def by_cholesky(k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float) -> Tensor:
    factor = torch.linalg.cholesky(reference.ridge(k_ss, reg))
    return k_ts @ torch.cholesky_solve(y_s, factor)


def case(n: int, m: int, columns: int, dtype: torch.dtype, options: argparse.Namespace) -> Case:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(n + m, 256, generator=random, dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(features, features[:n]).square() / 256)
    labels = torch.randn(n + m, columns, generator=random, dtype=torch.float64)
    given = [x.to(options.device) for x in (kernel[:n], kernel[n:], labels[:n], labels[n:])]
    reg = 5e-3

    def gradients(f: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in given[:3]]
        value = f(*leaves, given[3].to(dtype))
        return value, *torch.autograd.grad(value, leaves)

    def plain(predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: (predict(*x[:3], reg) - x[3]).square().mean() / 2

    def ours(*x: Tensor) -> Tensor:
        return losses.krr_loss(*x, reg=reg, solve_dtype=dtype)

    size = dtype.itemsize
    return Case(
        operator="krr",
        name=f"n={n} m={m} C={columns} {str(dtype).removeprefix('torch.')}",
        mode="forward and backward",
        exact=lambda: gradients(plain(reference.predict), torch.float64),
        providers={
            "eager": lambda: gradients(plain(reference.predict), dtype),
            "cholesky": lambda: gradients(plain(by_cholesky), dtype),
            "ddfast": lambda: gradients(ours, dtype),
        },
        bytes=2 * size * (n * n + m * n + n * columns),
        tolerance=1e-3,
        rounds=21,
        device=options.device,
        flops=n**3 // 3 + 4 * n * n * columns + 6 * m * n * columns + 2 * n * n * columns,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    sizes = [(10, 5000, 10), (100, 5000, 10), (500, 5000, 10)]
    if not options.quick:
        sizes.append((2000, 5000, 100))
    for size in sizes:
        for dtype in (torch.float64, torch.float32):
            yield case(*size, dtype, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
