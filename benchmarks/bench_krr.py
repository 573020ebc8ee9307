"""Kernel ridge regression: loss and gradients by K_ss, K_ts and Y_s.

    python benchmarks/bench_krr.py --out benchmarks/results/krr.csv

The baseline is the plain formula with torch.linalg.solve and autograd, all in the dtype of the
solve: LU, and a second solve in its backward. "cholesky" is autograd through torch.linalg.cholesky
and cholesky_solve, which differentiates the factorisation. n=100 is CIFAR-10 at ten images a class
against KIP's 5000 targets, n=500 at fifty, n=2000 CIFAR-100 at twenty.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddfast import losses
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.reference import krr as reference


def by_cholesky(k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float) -> Tensor:
    factor = torch.linalg.cholesky(reference.ridge(k_ss, reg))
    return k_ts @ torch.cholesky_solve(y_s, factor)


def case(
    n: int,
    m: int,
    columns: int,
    dtype: torch.dtype,
    options: argparse.Namespace,
    mode: str = "backward",
) -> Case:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(n + m, 256, generator=random, dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(features, features[:n]).square() / 256)
    labels = torch.randn(n + m, columns, generator=random, dtype=torch.float64)
    given = [x.to(options.device) for x in (kernel[:n], kernel[n:], labels[:n], labels[n:])]
    reg = 5e-3

    def provider(f: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], object]:
        wanted = given[3].to(dtype)
        return sizing.work(lambda *x: f(*x, wanted), [x.to(dtype) for x in given[:3]], mode)

    def plain(predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: (predict(*x[:3], reg) - x[3]).square().mean() / 2

    def ours(*x: Tensor) -> Tensor:
        return losses.krr_loss(*x, reg=reg, solve_dtype=dtype)

    size = dtype.itemsize
    providers = {
        "eager": provider(plain(reference.predict), dtype),
        "cholesky": provider(plain(by_cholesky), dtype),
        "ddfast": provider(ours, dtype),
    }
    if sizing.compiles(options, mode):
        providers["torch.compile"] = provider(compiled(plain(reference.predict)), dtype)
    # Factorisation, two triangular solves and the prediction; back as many and two products.
    flops = n**3 // 3 + 2 * n * n * columns + 2 * m * n * columns
    if mode == "backward":
        flops += 2 * n * n * columns + 4 * m * n * columns + 2 * n * n * columns
    return Case(
        operator="krr",
        name=f"n={n} m={m} C={columns} {str(dtype).removeprefix('torch.')}",
        mode=mode,
        exact=provider(plain(reference.predict), torch.float64),
        providers=providers,
        # The kernels and labels read, and their gradients written.
        bytes=(2 if mode == "backward" else 1) * size * (n * n + m * n + n * columns),
        tolerance=1e-3,
        rounds=sizing.rounds(options, 21 if m * columns < 1e6 else 9),
        device=options.device,
        flops=flops,
        dtype=str(dtype).removeprefix("torch."),
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    sizes = [(10, 5000, 10), (100, 5000, 10), (500, 5000, 10)]
    if not options.quick:
        sizes.append((2000, 5000, 100))
    for size in sizes:
        for dtype in (torch.float64, torch.float32):
            made = case(*size, dtype, options)
            yield dataclasses.replace(made, mode="forward and backward")


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    # The support images of all classes, as far as they fit, against KIP's 5000 targets.
    targets = 500 if options.quick else 5000
    few, note = sizing.share(
        sizing.classes_only(size),
        options,
        memory=6 * 8 * size.ipc * 2 * targets,
        operations=12 * size.ipc * targets * size.classes,
        moved=10 * 8 * size.ipc * 2 * targets,
        seconds=0.25,
    )
    for dtype in (torch.float64, torch.float32):
        for mode in sizing.wanted(options, "forward", "backward"):
            shape = (few.classes * size.ipc, targets, size.classes)
            made = case(*shape, dtype, options, mode)
            yield dataclasses.replace(made, size=sizing.label(size, note))


if __name__ == "__main__":
    run(cases, __doc__ or "")
