"""Convolutions by class: result, gradient by the input, gradient by the weights.

    python benchmarks/bench_class_weight_grad.py --out benchmarks/results/class_weight_grad.csv

The baseline is plain torch, class by class, on channels_last tensors, where it is fastest. GFLOP/s
count the operations of a direct convolution, products with the padding included, for all providers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.bench import Case, run
from ddfast.ops import class_weight_grad as ops
from ddfast.reference import class_weight_grad as reference

PRODUCTS = ("result", "by input", "by weights")


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
) -> Case:
    """One layer, one product."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(options.device)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    x, grad = (drawn(classes * count, channels, side, side) for channels in (inputs, outputs))
    weight = drawn(classes, outputs, inputs, 3, 3)
    providers: dict[str, Callable[[], object]] = {
        "eager": lambda: eager(product, x, weight, grad, count)
    }
    hows = ["direct", "auto"]
    if reference.winograd_applies((3, 3), (side, side), 1):
        hows.insert(1, "winograd")
    for how in hows:
        providers[f"ddfast {how}"] = lambda how=how: by_classes(  # type: ignore[misc]
            ops, product, x, weight, grad, count, how
        )
    wide = [t.double() for t in (x, weight, grad)]
    return Case(
        operator="class_weight_grad",
        name=f"{inputs}->{outputs}, {side}x{side}, C={classes}, n={count}",
        mode=product,
        exact=lambda: by_classes(reference, product, *wide, count, "auto"),
        providers=providers,
        bytes=4 * (x.numel() + grad.numel() + weight.numel()),
        tolerance=1e-5,
        rounds=15 if x.numel() * outputs < 1e9 else 7,
        device=options.device,
        flops=18 * x.numel() * outputs,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    layers = [(128, 128, 16), (128, 128, 8), (3, 128, 32), (64, 64, 8), (64, 64, 4), (64, 64, 2)]
    batches = [(1, 32), (1, 256), (10, 1), (10, 10)]
    for inputs, outputs, side in layers:
        for classes, count in batches:
            if options.quick and count > 10:
                continue
            for product in PRODUCTS:
                yield case(options, product, inputs, outputs, side, classes, count)


if __name__ == "__main__":
    run(cases, __doc__ or "")
