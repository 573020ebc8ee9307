"""NCFM's characteristic function distance, and its gradient by the synthetic features.

    python benchmarks/bench_characteristic_function.py --out FILE.csv

The baseline does what the official code does: for each side the products <t, x> twice, once for the
cosines and once for the sines, then matrices of both and their means; the derivative by autograd.
"eager, one product" is the best plain formula. The work counted is that of the least there can be:
one matrix product per side forward, and one for the gradient, which the kept products make enough.
"matrix products alone" are these three by torch, without sines, cosines and sums: what a rate of
100 % of torch's would take.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ddfast import losses
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.losses import Frequencies
from ddfast.reference import frequencies as drawn
from ddfast.reference.characteristic_function import FLOOR


def combined(re_x: Tensor, im_x: Tensor, re_y: Tensor, im_y: Tensor) -> Tensor:
    """The published formula, alpha = beta = 1/2, of means of cosines and sines."""
    norm_x, norm_y = (re_x**2 + im_x**2).sqrt(), (re_y**2 + im_y**2).sqrt()
    phase = 2 * (norm_x * norm_y - re_x * re_y - im_x * im_y)
    return (0.5 * (norm_y - norm_x) ** 2 + 0.5 * phase.clamp(min=FLOOR)).sqrt().mean()


def official(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Both products computed for the cosines, and again for the sines."""

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t @ z.T).mean(1), torch.sin(t @ z.T).mean(1)

    with torch.no_grad():
        of_y = function(y)
    return combined(*function(x), *of_y)


def one_product(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The best plain formula."""

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        products = z @ t.T
        return products.cos().mean(0), products.sin().mean(0)

    with torch.no_grad():
        of_y = function(y)
    return combined(*function(x), *of_y)


def case(
    count: int,
    n: int,
    m: int,
    width: int,
    options: argparse.Namespace,
    draw: bool = False,
    mode: str = "backward",
) -> Case:
    """n synthetic and m real rows of norm 1; `draw`: fresh frequencies in every call."""
    generator = torch.Generator().manual_seed(0)

    def rows(number: int) -> Tensor:
        x = torch.randn(number, width, generator=generator)
        return torch.nn.functional.normalize(x, eps=1e-12).to(options.device)

    x, y = rows(n), rows(m)
    numbers = Frequencies(count, seed=1)
    t = drawn.frequencies(count, width, 1, 1.0, 0, 1, torch.float32)[0].to(options.device)
    weights = torch.ones(n, count, device=options.device)

    random = torch.Generator(options.device).manual_seed(1)

    def provider(f: Callable[..., Tensor], *rest: Any, draws: bool = False) -> Callable[[], object]:
        made = sizing.work(lambda leaf: f(leaf, *rest), [x.to(rest[0].dtype)], mode)

        def call() -> object:
            if draws:  # what an eager call pays for; its values cannot be ours
                torch.randn(count, width, device=options.device, generator=random)
            return made()

        return call

    frequencies = numbers if draw else t
    providers: dict[str, Callable[[], object]] = {
        "eager": provider(official, y, t, draws=draw),
        "eager, one product": provider(one_product, y, t, draws=draw),
    }
    if sizing.compiles(options, mode):
        providers["torch.compile"] = provider(compiled(one_product), y, t, draws=draw)
    ours = losses.characteristic_function_distance
    providers["ddfast, autograd" if mode == "backward" else "ddfast"] = provider(
        ours, y, frequencies
    )
    if mode == "backward":
        providers["ddfast"] = lambda: losses.characteristic_function_distance_and_gradient(
            x, y, frequencies
        )
    ddfast, gradients = providers["ddfast"], int(mode == "backward")
    found: list[object] = []

    def products() -> object:
        with torch.no_grad():
            _ = (x @ t.T, y @ t.T, weights @ t if gradients else None)
        if not found:  # there is nothing to verify
            found.append(ddfast())
        return found[0]

    providers["matrix products alone"] = products
    return Case(
        operator="characteristic_function",
        name=f"k={count}, n={n}, m={m}, d={width}{', drawn' if draw else ''}",
        mode=mode,
        exact=lambda: provider(one_product, y.double(), t.double())(),
        providers=providers,
        # Features and frequencies read, unless these are drawn; the gradient written.
        bytes=4 * (gradients * x.numel() + x.numel() + y.numel() + (0 if draw else t.numel())),
        # The published form of the phase term loses digits where the two functions are close.
        tolerance=2e-2,
        rounds=sizing.rounds(options, 15),
        device=options.device,
        flops=2 * count * width * (n + gradients * n + m),
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    shapes = [(4096, 1024, 1024, 2048), (4096, 10, 1024, 2048)]
    chosen = [(*shape, draw) for draw in (False, True) for shape in shapes]
    if options.quick:
        chosen = [(512, 128, 256, 256, False), (512, 10, 256, 256, True)]
    for count, n, m, width, draw in chosen:
        made = case(count, n, m, width, options, draw=draw)
        yield dataclasses.replace(made, mode="loss and gradient")


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    # One class: NCFM's 4096 frequencies, and of each image four.
    count = 512 if options.quick else 4096
    d, n = size.width * sizing.feature_side(size) ** 2, 4 * size.ipc
    m = size.batch_real
    few, note = sizing.share(
        sizing.batch_only(size),
        options,
        memory=4 * (2 * d * (2 * n + m) + count * (d + 2 * n + 2 * m)),
        operations=2 * 2 * count * d * (2 * n + m),
    )
    n = max(1, n * few.batch_real // m)
    for draw in (False, True):
        for mode in sizing.wanted(options, "forward", "backward"):
            made = case(count, n, few.batch_real, d, options, draw, mode)
            yield dataclasses.replace(made, size=sizing.label(size, note))


if __name__ == "__main__":
    run(cases, __doc__ or "")
