"""Kernel matrices of infinitely wide networks: the NTK, and its gradient by the second set.

    python benchmarks/bench_kernel_matrix.py --out benchmarks/results/kernel_matrix.csv
    python benchmarks/bench_kernel_matrix.py --floor     # what an evaluation costs at least
    python benchmarks/bench_kernel_matrix.py --scaling   # two threads against one

The baseline of the fully connected rows is benchmarks/plain_dense_kernel.py, the recursion on
matrices in plain PyTorch; their GFLOP/s count the products alone, 2 n m d each and two with the
gradient, and "product alone" has torch's own. The baseline of the convolutional rows is
benchmarks/plain_conv_kernel.py, all pairs of positions in plain PyTorch; their GFLOP/s count 60
operations for each pair of positions that the readout depends on, for every provider, and three
times as many with the gradient. neural-tangents takes part where it can be imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ddfast
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import plain_conv_kernel as plain
from ddfast.benchmarks import plain_dense_kernel as plain_dense
from ddfast.benchmarks import sizing
from ddfast.kernel_matrix import kernel_matrix
from ddfast.ops.conv_kernel import conv_kernel

VARIANCES = (plain.WEIGHT_VAR, plain.BIAS_VAR)


def drawn(options: argparse.Namespace, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(options.device)


def position_pairs(size: int, pools: list[bool], readout: str) -> int:
    """Pairs of positions in front of every ReLU that the readout depends on."""
    sizes = [size]
    for pool in pools:
        sizes.append(sizes[-1] // 2 if pool else sizes[-1])
    reach, total = (sizes[-1] - 1 if readout == "gap" else 0), 0
    for side, pool in zip(reversed(sizes[:-1]), reversed(pools), strict=True):
        reach = min(2 * reach + 1 if pool else reach, side - 1)
        total += sum(side - abs(d) for d in range(-reach, reach + 1)) ** 2
    return total


def with_gradient(f: Callable[[Tensor], Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    value = f(y)
    (gradient,) = torch.autograd.grad(value.sum(), y)
    return value.detach(), gradient


def convolutional(
    options: argparse.Namespace,
    size: int,
    n: int,
    m: int,
    pools: list[bool],
    readout: str,
    gradient: bool,
) -> Case:
    x, y = drawn(options, n, 3, size, size, seed=0), drawn(options, m, 3, size, size, seed=1)
    leaf = y.clone().requires_grad_()
    network = ("ntk", pools, readout, *VARIANCES)
    providers: dict[str, Callable[[], object]] = {}
    if gradient:
        providers["eager"] = lambda: plain.matrix_and_gradient(x, y, pools, readout)
        providers["ddfast"] = lambda: with_gradient(lambda t: conv_kernel(x, t, *network), leaf)
    else:
        providers["eager"] = torch.no_grad()(lambda: plain.matrix(x, y, pools, readout))
        providers["ddfast"] = lambda: conv_kernel(x, y, *network)
    rival = plain.neural_tangents(x, y, pools, readout) if options.device == "cpu" else None
    if rival is not None:
        providers["neural-tangents"] = rival[1 if gradient else 0]

    def exact() -> object:
        a, b = x.double(), y.double()
        found = conv_kernel(a, b, *network)
        if not gradient:
            return found
        return with_gradient(lambda t: conv_kernel(a, t, *network), b.requires_grad_())

    if size <= 16:  # beyond, the definition takes minutes, and double precision answers to 1e-12

        def exact_by_definition() -> object:
            with ddfast.use_backend("reference"):
                return exact()

        judge = exact_by_definition
    else:
        judge = exact
    pairs = position_pairs(size, pools, readout)
    depth = len(pools)
    return Case(
        operator="kernel_matrix",
        name=f"conv {depth}, {readout}, {size} px, n={n}, m={m}"
        + ("" if all(pools) else ", pools " + "".join("FT"[p] for p in pools)),
        mode="value and gradient" if gradient else "forward",
        exact=judge,
        providers=providers,
        bytes=4 * (x.numel() + (2 if gradient else 1) * y.numel() + n * m),
        # The clamp of eager is worth 1e-4 in the gradient; ours is off by about 4e-7.
        tolerance=2e-3,
        rounds=3 if size > 16 else 5,
        device=options.device,
        flops=60 * pairs * n * m * (3 if gradient else 1),
    )


def fully_connected(
    options: argparse.Namespace, n: int, m: int, d: int, depth: int, gradient: bool
) -> Case:
    x, y = drawn(options, n, d, seed=0), drawn(options, m, d, seed=1)
    leaf = y.clone().requires_grad_()
    network = {"weight_var": VARIANCES[0], "bias_var": VARIANCES[1], "depth": depth}

    def timed(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        if gradient:
            return lambda: with_gradient(lambda t: f(x, t), leaf)
        return torch.no_grad()(lambda: f(x, y))

    providers = {"eager": timed(lambda a, b: plain_dense.matrix(a, b, depth))}
    if not options.no_compile and not options.quick:
        providers["torch.compile"] = timed(compiled(lambda a, b: plain_dense.matrix(a, b, depth)))
    providers["ddfast"] = timed(lambda a, b: kernel_matrix(a, b, **network))
    rival = plain_dense.neural_tangents(x, y, depth) if options.device == "cpu" else None
    if rival is not None:
        providers["neural-tangents"] = rival[1 if gradient else 0]

    def exact() -> object:
        a, b = x.double(), y.double()
        with ddfast.use_backend("reference"):
            if not gradient:
                return kernel_matrix(a, b, **network)
            return with_gradient(lambda t: kernel_matrix(a, t, **network), b.requires_grad_())

    return Case(
        operator="kernel_matrix",
        name=f"fc {depth}, n={n}, m={m}, d={d}",
        mode="value and gradient" if gradient else "forward",
        exact=exact,
        providers=providers,
        bytes=4 * (x.numel() + (2 if gradient else 1) * y.numel() + n * m),
        tolerance=1e-4,
        rounds=5,
        device=options.device,
        flops=2 * n * m * d * (2 if gradient else 1),
    )


def product(options: argparse.Namespace, n: int, m: int, d: int) -> Case:
    """The ceiling of what is not ours: torch's product of the same sizes."""
    x, y = drawn(options, n, d, seed=0), drawn(options, m, d, seed=1)
    return Case(
        operator="kernel_matrix",
        name=f"product alone, n={n}, m={m}, d={d}",
        mode="forward",
        exact=lambda: x.double() @ y.double().mT,
        providers={
            "eager": lambda: x @ y.mT,
            "ddfast": lambda: kernel_matrix(x, y, depth=0, weight_var=float(d), bias_var=0.0),
        },
        bytes=4 * (x.numel() + y.numel() + n * m),
        rounds=5,
        device=options.device,
        flops=2 * n * m * d,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    three = [True, True, True]
    rows = 500 if options.quick else 2000
    for d in (192, 3072):
        yield product(options, rows, rows, d)
        for gradient in (False, True):
            yield fully_connected(options, rows, rows, d, 3, gradient)
            if not options.quick:
                yield fully_connected(options, rows, rows, d, 1, gradient)
    for gradient in (False, True):
        yield convolutional(options, 8, 16, 32, three, "flatten", gradient)
        yield convolutional(options, 16, 8, 16, three, "flatten", gradient)
        if options.quick:
            continue
        yield convolutional(options, 32, 1, 16, three, "flatten", gradient)
        yield convolutional(options, 32, 1, 16, [False, *three], "flatten", gradient)
        yield convolutional(options, 16, 4, 16, three, "gap", gradient)
        yield convolutional(options, 32, 1, 16, three, "gap", gradient)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    modes = list(sizing.wanted(options, "forward", "backward"))
    # Fully connected: the support images of all classes against KIP's 5000 targets.
    d, targets = size.channels * size.side**2, 500 if options.quick else 5000
    few, note = sizing.share(
        sizing.classes_only(size),
        options,
        memory=4 * size.ipc * (2 * d + 60 * targets),
        operations=4 * size.ipc * targets * d,
        moved=100 * 4 * size.ipc * targets,
        seconds=2,
    )
    for mode in modes:
        shape = (targets, few.classes * size.ipc, d, 3)
        made = fully_connected(options, *shape, gradient=mode == "backward")
        yield dataclasses.replace(
            made, operator="dense_kernel", mode=mode, size=sizing.label(size, note)
        )
    # Convolutional: a few pairs of images, for eager holds all pairs of their positions.
    side = min(size.side, 16 if options.quick else 32)
    note = "4 pairs of images" + (f", {side} of {size.side} px" if side < size.side else "")
    pools = [True] * min(3, side.bit_length() - 1)
    for mode in modes:
        made = convolutional(options, side, 2, 2, pools, "flatten", mode == "backward")
        yield dataclasses.replace(
            made, operator="conv_kernel", mode=mode, size=sizing.label(size, note)
        )


def floor() -> None:
    """Print what one pair of positions costs at each size, and per pair of images."""
    for size, n, m in ((8, 64, 64), (16, 32, 64), (32, 16, 32)):
        options = argparse.Namespace(device="cpu")
        x, y = drawn(options, n, 3, size, size, seed=0), drawn(options, m, 3, size, size, seed=1)
        network = ("ntk", [True] * 3, "flatten", *VARIANCES)
        times = []
        for _ in range(5):
            start = time.thread_time()
            conv_kernel(x, y, *network)
            times.append(time.thread_time() - start)
        each = min(times) / (n * m)
        pairs = position_pairs(size, [True] * 3, "flatten")
        print(
            f"{size} px: {1e3 * each:.4f} ms a pair of images, {pairs} pairs of positions,", end=" "
        )
        print(f"{1e9 * each / pairs:.3f} ns each")


def scaling() -> None:
    """Print how many times as fast two threads are as one, by the wall clock, in turn."""
    for size, n, m in ((8, 64, 128), (16, 16, 32), (32, 8, 16)):
        options = argparse.Namespace(device="cpu")
        for gradient in (False, True):
            case = convolutional(options, size, n, m, [True] * 3, "flatten", gradient)
            ratios = []
            for _ in range(15):
                seconds = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    case.providers["ddfast"]()
                    seconds.append(time.perf_counter() - start)
                ratios.append(seconds[0] / seconds[1])
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{case.name}, {case.mode}: {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    if "--floor" in sys.argv:
        floor()
    elif "--scaling" in sys.argv:
        scaling()
    else:
        run(cases, __doc__ or "")
