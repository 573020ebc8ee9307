"""The features of RFAD's and FRePo's networks, their kernels, and the gradient of the images.

    python benchmarks/bench_features.py --out benchmarks/results/features.csv

One iteration between drawing the networks and updating the images: features of the target images
without a graph, of the support images with one, kernel matrices, ridge regression on labels, and
the gradient of its loss by the support images. The baseline "eager" is what the published code's
steps are in torch: a loop over networks in float32, all features side by side, one backward pass.
"eager, channels last" and "eager, bfloat16" are the same loop with torch's own settings, in
bfloat16 with products in float32. "ddfast" and "ddfast, bfloat16" are `empirical_nngp`, which goes
through the networks one by one and twice.

The column of errors has 1 - the cosine between a provider's gradient and that of float64; up to
0.001 counts as right. Images are random, labels one-hot - 1/10.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ddfast import nets
from ddfast.bench import Case, run
from ddfast.kernel_matrix import empirical_nngp

CLASSES = 10


def labels(count: int, like: Tensor) -> Tensor:
    return (torch.eye(CLASSES)[torch.arange(count) % CLASSES] - 1 / CLASSES).to(like)


def regression(k_ss: Tensor, k_ts: Tensor, reg: float, solve: torch.dtype) -> Tensor:
    k_ss, k_ts = k_ss.to(solve), k_ts.to(solve)
    ridge = reg * k_ss.diagonal().mean() * torch.eye(len(k_ss)).to(k_ss)
    predicted = k_ts @ torch.linalg.solve(k_ss + ridge, labels(len(k_ss), k_ss))
    return (predicted - labels(len(k_ts), k_ts)).square().mean() / 2


def error(result: object, exact: object) -> float:
    """1 - cosine of two gradients."""
    a, b = (torch.as_tensor(g).double().flatten() for g in (result, exact))
    return float(1 - torch.nn.functional.cosine_similarity(a, b, dim=0))


def case(
    title: str,
    model: str,
    count: int,
    sizes: tuple[int, int],
    side: int,
    scales: tuple[float, float, bool],
    reg: float,
    solve: torch.dtype,
    options: argparse.Namespace,
) -> Case:
    """An iteration with `count` networks on (support, target) images."""
    random = torch.Generator().manual_seed(0)
    weight_var, bias_var, normalise = scales
    networks: list[nets.Network] = []
    for _ in range(count):
        net = nets.build(model, 3, CLASSES, side, random).to(options.device).eval()
        if normalise:
            nets.initialise_wide(net, random)
        networks.append(net.requires_grad_(False))
    x, y = (torch.randn(n, 3, side, side, generator=random).to(options.device) for n in sizes)

    def loop(modules: Sequence[nn.Module], x: Tensor, y: Tensor, half: bool = False) -> Tensor:
        leaf = x.detach().requires_grad_()
        seen, real = leaf, y
        if half:
            seen, real = (
                z.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
                for z in (leaf, y)
            )
        with torch.no_grad():
            of_y = torch.cat([net.embed(real).to(y.dtype) for net in modules], 1)  # type: ignore
        of_x = torch.cat([net.embed(seen).to(x.dtype) for net in modules], 1)  # type: ignore
        factor = weight_var / of_x.shape[1] if normalise else weight_var
        k_ss, k_ts = (factor * f @ of_x.mT + bias_var for f in (of_x, of_y))
        return torch.autograd.grad(regression(k_ss, k_ts, reg, solve), leaf)[0]

    def ours(precision: str | None) -> Tensor:
        leaf = x.detach().requires_grad_()
        kernels = empirical_nngp(
            leaf,
            y,
            networks.__getitem__,
            count,
            weight_var=weight_var,
            bias_var=bias_var,
            normalise=normalise,
            precision=precision,
        )
        return torch.autograd.grad(regression(*kernels, reg, solve), leaf)[0]

    def plain(dtype: torch.dtype, last: bool) -> list[nn.Module]:
        made = []
        for net in networks:
            other = copy.deepcopy(net).to(dtype)
            other.fused = False  # type: ignore[assignment]
            if last:
                other = other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            made.append(other)
        return made

    eager, last = plain(torch.float32, False), plain(torch.float32, True)
    half = plain(torch.bfloat16, True)
    form = {"memory_format": torch.channels_last}
    providers: dict[str, Callable[[], object]] = {
        "eager": lambda: loop(eager, x, y),
        "eager, channels last": lambda: loop(last, x.contiguous(**form), y.contiguous(**form)),
        "eager, bfloat16": lambda: loop(half, x, y, half=True),
        "ddfast": lambda: ours(None),
        "ddfast, bfloat16": lambda: ours("bfloat16"),
    }
    return Case(
        operator="features",
        name=f"{title}, {count} x {model}, {sizes[0]} and {sizes[1]} images of {side}x{side}",
        mode="kernels and gradient",
        exact=lambda: loop(plain(torch.float64, False), x.double(), y.double()),
        providers=providers,
        bytes=4 * (x.numel() + y.numel()),
        tolerance=1e-3,
        rounds=5,
        device=options.device,
        error=error,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    rfad, frepo = (2.0, 0.01, True), (1.0, 0.0, False)
    double, single = torch.float64, torch.float32
    yield case("RFAD", "ConvNetW64NN", 8, (100, 256), 32, rfad, 5e-3, double, options)
    yield case("FRePo", "FRePoNetW64", 1, (100, 256), 32, frepo, 1e-6, single, options)
    if not options.quick:
        yield case("RFAD", "ConvNetW256NN", 2, (100, 256), 32, rfad, 5e-3, double, options)
        yield case("FRePo", "FRePoNet", 1, (100, 256), 32, frepo, 1e-6, single, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
