"""Convolutions by class: result, gradient by the input, gradient by the weights.

    python benchmarks/bench_class_weight_grad.py --out benchmarks/results/class_weight_grad.csv

The baseline is plain torch, class by class, on channels_last tensors, where it is fastest. GFLOP/s
count the operations of a direct convolution, products with the padding included, for all providers.
At a named size: the second layer of the ConvNet with the synthetic images, and the derivatives of
each product by both of its factors.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.bench import Case, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.ops import class_weight_grad as ops
from ddfast.reference import class_weight_grad as reference

PRODUCTS = {
    "result": "class_conv",
    "by input": "class_input_grad",
    "by weights": "class_weight_grad",
}


def eager(product: str, x: Tensor, weight: Tensor, grad: Tensor, count: int) -> Tensor:
    """Class by class with torch's own convolutions."""
    if product == "result":
        parts = zip(x.split(count), weight, strict=True)
        return torch.cat([functional.conv2d(a, w, padding=1) for a, w in parts])
    mask = [product == "by input", product == "by weights", False]
    parts_of = zip(x.split(count), weight, grad.split(count), strict=True)
    gradients = [
        torch.ops.aten.convolution_backward(
            g, a, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )
        for a, w, g in parts_of
    ]
    if product == "by input":
        return torch.cat([g[0] for g in gradients])
    return torch.stack([g[1] for g in gradients])


def by_classes(
    functions: object, product: str, x: Tensor, weight: Tensor, grad: Tensor, count: int, how: str
) -> Tensor:
    """The operators, or their definitions, on the same data."""
    counts = [count] * len(weight)
    if product == "result":
        return functions.class_conv(x, weight, counts, 1, how)  # type: ignore[attr-defined]
    if product == "by input":
        return functions.class_input_grad(  # type: ignore[attr-defined]
            grad, weight, counts, x.shape[2:], 1, how
        )
    return functions.class_weight_grad(  # type: ignore[attr-defined]
        x, grad, counts, [3, 3], 1, how
    )


def case(
    options: argparse.Namespace,
    product: str,
    inputs: int,
    outputs: int,
    side: int,
    classes: int,
    count: int,
    mode: str = "forward",
    algorithms: tuple[str, ...] = ("direct", "winograd", "auto"),
) -> Case:
    """One layer, one product; "backward" and "double" by both of its factors."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(options.device)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    x, grad = (drawn(classes * count, channels, side, side) for channels in (inputs, outputs))
    weight = drawn(classes, outputs, inputs, 3, 3)

    def provider(f: Callable[..., Tensor], wide: bool = False) -> Callable[[], object]:
        """From f(x, weight, grad), of which the product has two."""
        given = [t.double() if wide else t for t in (x, weight, grad)]
        places = {"result": (0, 1), "by input": (1, 2), "by weights": (0, 2)}[product]

        def of_factors(*factors: Tensor) -> Tensor:
            parts = list(given)
            for place, factor in zip(places, factors, strict=True):
                parts[place] = factor
            return f(*parts)

        return sizing.work(of_factors, [given[place] for place in places], mode)

    def ours(how: str, functions: object = ops) -> Callable[..., Tensor]:
        return lambda x, weight, grad: by_classes(functions, product, x, weight, grad, count, how)

    providers = {"eager": provider(lambda x, w, g: eager(product, x, w, g, count))}
    for how in algorithms:
        if how != "winograd" or reference.winograd_applies((3, 3), (side, side), 1):
            name = f"ddfast {how}" if len(algorithms) > 1 else "ddfast"
            providers[name] = provider(ours(how))
    # The product; two products more are its gradient, and two more that gradient's.
    products = {"forward": 1, "backward": 3, "double": 5}[mode]
    return Case(
        operator="class_weight_grad",
        name=f"{inputs}->{outputs}, {side}x{side}, C={classes}, n={count}",
        mode=mode,
        exact=provider(ours("auto", reference), wide=True),
        providers=providers,
        # All three tensors pass once in every mode; gradients and directions as well, if there are.
        bytes={"forward": 1, "backward": 2, "double": 3}[mode]
        * 4
        * (x.numel() + grad.numel() + weight.numel()),
        tolerance=1e-5,
        rounds=sizing.rounds(options, 15 if x.numel() * outputs < 1e9 else 7),
        device=options.device,
        flops=products * 18 * x.numel() * outputs,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    layers = [(128, 128, 16), (128, 128, 8), (3, 128, 32), (64, 64, 8), (64, 64, 4), (64, 64, 2)]
    batches = [(1, 32), (1, 256), (10, 1), (10, 10)]
    for inputs, outputs, side in layers:
        for classes, count in batches:
            if options.quick and count > 10:
                continue
            for product in PRODUCTS:
                made = case(options, product, inputs, outputs, side, classes, count)
                yield dataclasses.replace(made, mode=product)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    side, width = max(1, size.side // 2), size.width
    pixels = 4 * size.ipc * width * side**2
    weights = 4 * 9 * width**2
    few, note = sizing.share(
        dataclasses.replace(size, batch_real=size.ipc),
        options,
        memory=8 * (pixels + weights),
        operations=5 * 18 * width * pixels / 4,
    )
    for product, operator in PRODUCTS.items():
        for mode in sizing.wanted(options, *sizing.ORDERS):
            shape = (width, width, side, few.classes, few.batch_real)
            made = case(options, product, *shape, mode, ("auto",))
            label = sizing.label(size, note.replace("real images", "images"))
            yield dataclasses.replace(made, operator=operator, size=label)


if __name__ == "__main__":
    run(cases, __doc__ or "")
