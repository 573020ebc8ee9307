"""Normalisation, ReLU and 2x2 average pooling: forward, with gradient, and along a tangent.

    python benchmarks/bench_norm_relu_pool.py --out benchmarks/results/norm_relu_pool.csv

The baseline is torch's group_norm, relu and avg_pool2d one after the other. The derivatives along a
tangent are what a second derivative needs; torch's are measured by differentiating twice. At a
named size, where second derivatives are autograd's for both, `norm_relu_pool_means` (CAFE's, with
each class's mean of the activation) takes part.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.layers import norm_relu_pool, norm_relu_pool_means
from ddfast.ops import norm_relu_pool as ops
from ddfast.reference import norm_relu_pool as reference

Shape = tuple[int, int, int, int]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def in_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the networks of the literature do."""
    return F.avg_pool2d(F.relu(F.group_norm(x, x.shape[1], weight, bias)), 2)


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm_relu_pool(x, weight, bias, x.shape[1])


Block = Callable[[Tensor, Tensor, Tensor], Tensor]


class Data:
    """Tensors of one shape; float64 copies of them on demand."""

    def __init__(self, shape: Shape, form: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        images, channels, height, width = shape

        def drawn(*size: int) -> Tensor:
            t = torch.randn(size, generator=generator).to(device)
            return t.contiguous(memory_format=FORMATS[form]) if len(size) == 4 else t

        self.x, self.tangent = drawn(*shape), drawn(*shape)
        self.grad = drawn(images, channels, height // 2, width // 2)
        self.weight, self.bias = drawn(channels) + 2, drawn(channels)
        self.rows = drawn(images, channels), drawn(images, channels)
        self.bytes = self.x.numel() * self.x.element_size()

    def wide(self) -> Data:
        other = object.__new__(Data)
        for name, value in vars(self).items():
            double = value
            if isinstance(value, Tensor):
                double = value.double()
            elif isinstance(value, tuple):
                double = tuple(v.double() for v in value)
            setattr(other, name, double)
        return other


def forward(block: Block, data: Data) -> Tensor:
    with torch.no_grad():
        return block(data.x, data.weight, data.bias)


def with_gradient(block: Block, data: Data) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (data.x, data.weight, data.bias)]
    out = block(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, data.grad)]


def along_tangent(data: Data, module: object) -> list[Tensor]:
    """out' and grad_x' of the four operators, mean and rstd being there."""
    point = data.x, data.tangent, data.weight, data.bias, *data.rows
    settings = data.x.shape[1], "relu", "average"
    _, mean, rstd = module.norm_relu_pool(  # type: ignore[attr-defined]
        data.x, data.weight, data.bias, settings[0], 1e-5, *settings[1:]
    )
    rest = mean, rstd, *settings
    moved = module.norm_relu_pool_tangent(*point, *rest)  # type: ignore[attr-defined]
    gradient, _, _ = module.norm_relu_pool_tangent_bwd(  # type: ignore[attr-defined]
        data.grad, None, *point, *rest
    )
    return [moved, gradient]


def twice_differentiated(block: Block, data: Data) -> list[Tensor]:
    """The same by differentiating the gradient, with every image's rows summed up beforehand."""
    weight, bias = (
        t.expand(len(data.x), -1).reshape(-1).clone().requires_grad_()
        for t in (data.weight, data.bias)
    )
    height, width = data.x.shape[2:]
    x = data.x.detach().requires_grad_()
    # Images side by side as channels of one, so that every image has parameters of its own.
    out = block(x.contiguous().view(1, -1, height, width), weight, bias)
    grad = data.grad.detach().contiguous().requires_grad_()
    first = torch.autograd.grad(out, (x, weight, bias), grad.view(out.shape), create_graph=True)
    along = (data.tangent, *(r.reshape(-1) for r in data.rows))
    moved, gradient = torch.autograd.grad(first, (grad, x), along)
    return [moved, gradient]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    shapes: list[Shape] = [(64, 128, 32, 32), (256, 128, 8, 8), (10, 128, 16, 16)]
    if options.quick:
        shapes = shapes[1:]
    for shape in shapes:
        for form in FORMATS:
            data = Data(shape, form, options.device)
            name = f"{'x'.join(str(n) for n in shape)}, {form}"
            yield from of(data, name, options)


def of(data: Data, name: str, options: argparse.Namespace) -> Iterator[Case]:
    common = {"operator": "norm_relu_pool", "name": name, "device": options.device}
    rounds = 9 if data.bytes > 1e7 else 31
    blocks: dict[str, Block] = {"eager": in_steps, "ddfast": fused}
    if not options.no_compile and not options.quick:
        blocks["torch.compile"] = compiled(in_steps)
    modes: list[tuple[str, Callable[[Block, Data], object], float]] = [
        ("forward", forward, 1.25),  # x read, a quarter written
        ("forward and gradient", with_gradient, 3.5),
    ]
    for mode, work, moved in modes:
        yield Case(
            mode=mode,
            exact=lambda work=work: work(in_steps, data.wide()),  # type: ignore[misc]
            providers={
                key: (lambda work=work, block=block: work(block, data))  # type: ignore[misc]
                for key, block in blocks.items()
            },
            bytes=int(moved * data.bytes),
            rounds=rounds,
            **common,
        )
    yield Case(
        mode="forward and both tangents",
        exact=lambda: along_tangent(data.wide(), reference),
        providers={
            "eager": lambda: twice_differentiated(in_steps, data),
            "ddfast": lambda: along_tangent(data, ops),
        },
        bytes=int(6.75 * data.bytes),
        tolerance=1e-3,
        rounds=rounds,
        **common,
    )


def means_in_steps(
    x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]
) -> tuple[Tensor, ...]:
    """The block, and the mean activation of each class before pooling."""
    a = F.relu(F.group_norm(x, x.shape[1], weight, bias))
    return F.avg_pool2d(a, 2), torch.stack([part.mean(0) for part in a.split(counts)])


def of_order(
    operator: str,
    title: str,
    plain: Callable[..., sizing.Result],
    ours: Callable[..., sizing.Result],
    data: Data,
    mode: str,
    options: argparse.Namespace,
) -> Case:
    """One of the two operators up to its second derivative, by images, weight and bias."""
    given = [data.x, data.weight, data.bias]
    providers: dict[str, Callable[[], object]] = {
        "eager": sizing.work(plain, given, mode),
        "ddfast": sizing.work(ours, given, mode),
    }
    if sizing.compiles(options, mode):
        providers["torch.compile"] = sizing.work(compiled(plain), given, mode)
    return Case(
        operator=operator,
        name=title,
        mode=mode,
        exact=lambda: sizing.work(plain, [t.double() for t in given], mode)(),
        providers=providers,
        # x read and a quarter written; for the gradient x and a quarter read and x written; for
        # its derivative two of x more are read and one is written, and a quarter is read.
        bytes=int({"forward": 1.25, "backward": 3.5, "double": 6.75}[mode] * data.bytes),
        tolerance=1e-3 if mode == "double" else 1e-4,
        rounds=sizing.rounds(options, 9 if data.bytes > 3e6 else 31),
        device=options.device,
    )


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    image = 4 * size.width * size.side**2
    few, note = sizing.share(
        sizing.batch_only(size),
        options,
        memory=20 * image * size.batch_real,
        moved=60 * image * size.batch_real,
        seconds=3,
    )
    shape = (few.batch_real, size.width, size.side, size.side)
    data, label = Data(shape, "channels_last", options.device), sizing.label(size, note)
    counts = [few.batch_real // 2, few.batch_real - few.batch_real // 2]
    counts = [count for count in counts if count]

    def ours_with_means(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return norm_relu_pool_means(x, counts, weight, bias, x.shape[1])

    title = "x".join(map(str, shape))
    for mode in sizing.wanted(options, *sizing.ORDERS):
        made = of_order("norm_relu_pool", title, in_steps, fused, data, mode, options)
        yield dataclasses.replace(made, size=label)
    for mode in sizing.wanted(options, *sizing.ORDERS):
        made = of_order(
            "norm_relu_pool_means",
            f"{title}, C={len(counts)}",
            lambda x, weight, bias: means_in_steps(x, weight, bias, counts),
            ours_with_means,
            data,
            mode,
            options,
        )
        yield dataclasses.replace(made, size=label)


if __name__ == "__main__":
    run(cases, __doc__ or "")
