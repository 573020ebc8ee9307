"""Distance of class means (DM's loss), and its derivatives by the synthetic features.

    python benchmarks/bench_class_mean.py --out benchmarks/results/class_mean.csv

The baseline does what the official script does: a Python loop over classes, autograd. "torch
batched" is the best plain torch for classes of equal size.
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
from ddfast.reference import class_mean as reference


def loop(syn: Tensor, real: Tensor, syn_counts: list[int], real_counts: list[int]) -> Tensor:
    """Class by class over the rows of all classes."""
    total = torch.zeros((), device=syn.device)
    parts = zip(syn.split(syn_counts), real.split(real_counts), strict=True)
    for of_syn, of_real in parts:
        difference = torch.mean(of_real, dim=0) - torch.mean(of_syn, dim=0)
        total = total + torch.sum(difference**2)
    return total


def batched(syn: Tensor, real: Tensor) -> Tensor:
    """All classes of equal size at once."""
    return ((real.mean(1) - syn.mean(1)) ** 2).sum()


def case(
    classes: int,
    real_rows: int,
    syn_rows: int,
    width: int,
    options: argparse.Namespace,
    dtype: torch.dtype = torch.float32,
    uneven: bool = False,
    mode: str = "backward",
) -> Case:
    """One shape of features; classes of equal size unless `uneven`."""
    generator = torch.Generator().manual_seed(0)
    real_counts = [real_rows - (c % 5 if uneven else 0) for c in range(classes)]
    syn_counts = [syn_rows] * classes

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(options.device, dtype)

    real, leaf = drawn(sum(real_counts)), drawn(sum(syn_counts)).requires_grad_()
    first = list(range(0, classes * syn_rows, syn_rows))

    def by_class(f: Callable[[Tensor], Tensor], given: Tensor) -> Callable[[], list[Tensor]]:
        """The sum of the losses; gradients of a class are equal rows, of which one is shown."""
        directions = [sizing.drawn(leaf.shape, 1, leaf).to(given).view(given.shape)]
        made = sizing.work(lambda x: f(x).sum(), [given], mode, directions=directions)

        def work() -> list[Tensor]:
            found = made()
            gradients = found if mode == "double" else found[1:]
            rows = [g[:, 0] if g.dim() == 3 else g[first] for g in gradients]
            return rows if mode == "double" else [found[0], *rows]

        return work

    def exact() -> list[Tensor]:
        wide = real.double()
        return by_class(
            lambda s: reference.class_mean_distance(s, wide, syn_counts, real_counts)[0],
            leaf.detach().double(),
        )()

    providers: dict[str, Callable[[], object]] = {
        "eager": by_class(lambda s: loop(s, real, syn_counts, real_counts), leaf)
    }
    if uneven:
        providers["ddfast"] = by_class(
            lambda s: losses.class_mean_distance(s, real, syn_counts, real_counts), leaf
        )
    else:
        cube, reals = leaf.detach().view(classes, syn_rows, width), real.view(classes, -1, width)
        providers["torch batched"] = by_class(lambda s: batched(s, reals), cube)
        providers["ddfast"] = by_class(lambda s: losses.class_mean_distance(s, reals), cube)
        if sizing.compiles(options, mode):
            fast = compiled(batched)
            providers["torch.compile"] = by_class(lambda s: fast(s, reals), cube)
    kind = {torch.float32: "", torch.bfloat16: ", bfloat16"}[dtype]
    sizes = "uneven, about" if uneven else ""
    return Case(
        operator="class_mean_distance",
        name=f"C={classes}, {sizes} n={real_rows}, m={syn_rows}, d={width}{kind}".replace(
            ",  ", ", "
        ),
        mode=mode,
        exact=exact,
        providers=providers,
        # Both sets read; gradients are one row a class, and "double" reads directions in addition.
        bytes=(real.numel() + leaf.numel() * (2 if mode == "double" else 1)) * real.itemsize,
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        rounds=sizing.rounds(options, 15 if real.numel() > 1e7 else 51),
        device=options.device,
        dtype=str(dtype).removeprefix("torch."),
    )


def means(classes: int, rows: int, width: int, options: argparse.Namespace, mode: str) -> Case:
    """The means alone, of rows that lie class after class."""
    x = sizing.drawn((classes * rows, width), 0).to(options.device)
    counts = [rows] * classes

    def eager(x: Tensor) -> Tensor:
        return torch.stack([part.mean(0) for part in x.split(counts)])

    return Case(
        operator="class_mean",
        name=f"C={classes}, n={rows}, d={width}",
        mode=mode,
        exact=sizing.work(eager, [x.double()], mode),
        providers={
            "eager": sizing.work(eager, [x], mode),
            "ddfast": sizing.work(lambda x: losses.class_mean(x, counts), [x], mode),
        },
        bytes=x.nbytes * (1 if mode == "forward" else 2),  # read once, the gradient written once
        rounds=sizing.rounds(options),
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    bfloat16 = {"dtype": torch.bfloat16}
    for shape, more in (
        ((10, 256, 10, 2048), {}),
        ((10, 256, 1, 2048), {}),
        ((10, 256, 10, 64), {}),
        ((10, 256, 10, 2048), {"uneven": True}),
        ((10, 256, 10, 2048), bfloat16),
        ((100, 256, 10, 2048), {}),
    ):
        if shape[0] == 10 or not options.quick:
            made = case(*shape, options, **more)
            yield dataclasses.replace(made, mode="loss and gradient")


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    width = size.width * sizing.feature_side(size) ** 2
    each = 4 * width * (size.batch_real + size.ipc)
    few, note = sizing.share(size, options, memory=2 * each, moved=4 * each)
    for mode in sizing.wanted(options, *sizing.ORDERS):
        made = case(few.classes, few.batch_real, few.ipc, width, options, mode=mode)
        yield dataclasses.replace(made, size=sizing.label(size, note))
    for mode in sizing.wanted(options, "forward", "backward"):
        made = means(few.classes, few.batch_real, width, options, mode)
        yield dataclasses.replace(made, size=sizing.label(size, note))


if __name__ == "__main__":
    run(cases, __doc__ or "")
