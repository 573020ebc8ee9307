"""NCFM's characteristic function distance and its gradient with respect to the synthetic features.

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
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddfast import losses
from ddfast.bench import Case, compiled, run
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


def with_gradient(f: Callable[..., Tensor], x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Distance and gradient."""
    value = f(x, *rest)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def case(
    count: int, n: int, m: int, width: int, options: argparse.Namespace, draw: bool = False
) -> Case:
    """n synthetic and m real rows of norm 1; `draw`: fresh frequencies in every call."""
    generator = torch.Generator().manual_seed(0)

    def rows(number: int) -> Tensor:
        x = torch.randn(number, width, generator=generator)
        return torch.nn.functional.normalize(x, eps=1e-12).to(options.device)

    x, y = rows(n).requires_grad_(), rows(m)
    numbers = Frequencies(count, seed=1)
    t = drawn.frequencies(count, width, 1, 1.0, 0, 1, torch.float32)[0].to(options.device)
    weights = torch.ones(n, count, device=options.device)

    def eager(f: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> object:
            if draw:  # what an eager call pays for; its values cannot be ours
                torch.randn(count, width, device=options.device)
            return with_gradient(f, x, y, t)

        return call

    def exact() -> tuple[Tensor, Tensor]:
        return with_gradient(
            one_product, x.detach().double().requires_grad_(), y.double(), t.double()
        )

    frequencies = numbers if draw else t
    providers: dict[str, Callable[[], object]] = {
        "eager": eager(official),
        "eager, one product": eager(one_product),
    }
    if not options.no_compile and not options.quick:
        fast = compiled(one_product)
        providers["torch.compile"] = eager(fast)
    providers["ddfast, autograd"] = lambda: with_gradient(
        losses.characteristic_function_distance, x, y, frequencies
    )
    providers["ddfast"] = lambda: losses.characteristic_function_distance_and_gradient(
        x.detach(), y, frequencies
    )
    found = providers["ddfast"]()

    def products() -> object:
        with torch.no_grad():
            _ = (x @ t.T, y @ t.T, weights @ t)
        return found  # there is nothing to verify

    providers["matrix products alone"] = products
    return Case(
        operator="characteristic_function",
        name=f"k={count}, n={n}, m={m}, d={width}{', drawn' if draw else ''}",
        mode="loss and gradient",
        exact=exact,
        providers=providers,
        bytes=4 * (2 * x.numel() + y.numel() + (0 if draw else t.numel())),
        # The published form of the phase term loses digits where the two functions are close.
        tolerance=2e-2,
        rounds=15,
        device=options.device,
        flops=2 * count * width * (2 * n + m),
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.quick:
        yield case(512, 128, 256, 256, options)
        yield case(512, 10, 256, 256, options, draw=True)
        return
    yield case(4096, 1024, 1024, 2048, options)
    yield case(4096, 10, 1024, 2048, options)
    yield case(4096, 1024, 1024, 2048, options, draw=True)
    yield case(4096, 10, 1024, 2048, options, draw=True)


if __name__ == "__main__":
    run(cases, __doc__ or "")
