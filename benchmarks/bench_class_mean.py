"""Distance of class means (DM's loss) and its gradient with respect to the synthetic features.

    python benchmarks/bench_class_mean.py --out benchmarks/results/class_mean.csv

The baseline does what the official script does: a Python loop over classes, autograd. "torch
batched" is the best plain torch for classes of equal size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddfast import losses
from ddfast.bench import Case, compiled, run
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


def with_gradient(f: Callable[[Tensor], Tensor], syn: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient, the gradient as rows of all classes."""
    value = f(syn)
    (gradient,) = torch.autograd.grad(value, syn)
    # A 3-D gradient is made of equal rows: one per class is all there is to look at.
    return value.detach(), gradient[:, 0] if gradient.dim() == 3 else gradient


def case(
    classes: int,
    real_rows: int,
    syn_rows: int,
    width: int,
    options: argparse.Namespace,
    dtype: torch.dtype = torch.float32,
    uneven: bool = False,
) -> Case:
    """One shape of features; classes of equal size unless `uneven`."""
    generator = torch.Generator().manual_seed(0)
    real_counts = [real_rows - (c % 5 if uneven else 0) for c in range(classes)]
    syn_counts = [syn_rows] * classes

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=generator).to(options.device, dtype)

    real, leaf = drawn(sum(real_counts)), drawn(sum(syn_counts)).requires_grad_()
    first = list(range(0, classes * syn_rows, syn_rows))

    def official() -> tuple[Tensor, Tensor]:
        value, gradient = with_gradient(lambda s: loop(s, real, syn_counts, real_counts), leaf)
        return value, gradient[first]

    def ours_with_counts() -> tuple[Tensor, Tensor]:
        value, gradient = with_gradient(
            lambda s: losses.class_mean_distance(s, real, syn_counts, real_counts).sum(), leaf
        )
        return value, gradient[first]

    def exact() -> tuple[Tensor, Tensor]:
        wide = leaf.detach().double().requires_grad_()
        value, gradient = with_gradient(
            lambda s: reference.class_mean_distance(s, real.double(), syn_counts, real_counts)[
                0
            ].sum(),
            wide,
        )
        return value, gradient[first]

    providers: dict[str, Callable[[], object]] = {"eager": official}
    if uneven:
        providers["ddfast"] = ours_with_counts
    else:
        cubes = (leaf.detach().view(classes, syn_rows, width), real.view(classes, -1, width))
        cube = cubes[0].requires_grad_()
        providers["torch batched"] = lambda: with_gradient(lambda s: batched(s, cubes[1]), cube)
        providers["ddfast"] = lambda: with_gradient(
            lambda s: losses.class_mean_distance(s, cubes[1]).sum(), cube
        )
        if not options.no_compile and not options.quick:
            fast = compiled(batched)
            providers["torch.compile"] = lambda: with_gradient(lambda s: fast(s, cubes[1]), cube)
    kind = {torch.float32: "", torch.bfloat16: ", bfloat16"}[dtype]
    sizes = "uneven, about" if uneven else ""
    return Case(
        operator="class_mean_distance",
        name=f"C={classes}, {sizes} n={real_rows}, m={syn_rows}, d={width}{kind}".replace(
            ",  ", ", "
        ),
        mode="loss and gradient",
        exact=exact,
        providers=providers,
        bytes=(real.numel() + leaf.numel()) * real.element_size(),
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        rounds=15 if real.numel() > 1e7 else 51,
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    yield case(10, 256, 10, 2048, options)
    yield case(10, 256, 1, 2048, options)
    yield case(10, 256, 10, 64, options)
    yield case(10, 256, 10, 2048, options, uneven=True)
    yield case(10, 256, 10, 2048, options, dtype=torch.bfloat16)
    if not options.quick:
        yield case(100, 256, 10, 2048, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
