"""Gradient distance (row cosine): loss, and its derivatives by the synthetic gradients.

    python benchmarks/bench_gradient_distance.py --out benchmarks/results/gradient_distance.csv

The baseline does what the official scripts do: a Python loop over classes and layers, autograd.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ddfast import losses, nets
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.reference import gradient_distance as reference


def eager(syn: list[Tensor], real: list[Tensor]) -> Tensor:
    """One class, layer by layer."""
    total = torch.zeros((), device=syn[0].device)
    for s, r in zip(syn, real, strict=True):
        if s.dim() == 1:
            continue
        s, r = s.reshape(s.shape[0], -1), r.reshape(r.shape[0], -1)
        norms = torch.norm(r, dim=-1) * torch.norm(s, dim=-1)
        total = total + torch.sum(1 - torch.sum(r * s, dim=-1) / (norms + 1e-6))
    return total


def losses_of(parts: Sequence[Tensor], real: list[Tensor], classes: int) -> Tensor:
    """Class after class; `parts` are the tensors of class 0, then those of class 1, ..."""
    count = len(real)
    rows = [list(parts[c * count : (c + 1) * count]) for c in range(classes)]
    return torch.stack([eager(row, [t[c] for t in real]) for c, row in enumerate(rows)])


def class_major(tensors: Sequence[Tensor], layers: int) -> list[Tensor]:
    """Gradients of every layer, (classes, ...), as those of class 0, then those of class 1, ..."""
    values, rest = list(tensors[: len(tensors) % layers]), tensors[len(tensors) % layers :]
    for first in range(0, len(rest), layers):
        values += [
            t for of_class in zip(*rest[first : first + layers], strict=True) for t in of_class
        ]
    return values


def case(
    name: str,
    network: str,
    size: int,
    classes: int,
    options: argparse.Namespace,
    mode: str = "backward",
    outputs: int = 10,
) -> Case:
    """One network's parameter shapes for so many classes; the network tells `outputs` apart."""
    generator = torch.Generator().manual_seed(0)
    parameters = nets.build(network, 3, outputs, size).parameters()
    shapes = [p.shape for p in parameters if p.dim() > 1]  # the others do not count
    layers = len(shapes)

    def drawn() -> list[Tensor]:
        tensors = [torch.randn(classes, *s, generator=generator) * 0.01 for s in shapes]
        return [t.to(options.device) for t in tensors]

    syn, real, directions = drawn(), drawn(), drawn()
    parts, rows = class_major(syn, layers), class_major(directions, layers)

    def arranged(f: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        return lambda: class_major(f(), layers)

    def loop(*parts: Tensor) -> Tensor:
        return losses_of(parts, real, classes)

    def ours(*tensors: Tensor) -> Tensor:
        return losses.gradient_distance(tensors, real, batched=True)

    def one_call() -> list[Tensor]:
        value, gradient = losses.gradient_distance_and_gradient(syn, real, batched=True)
        return [value, *gradient]

    def class_by_class() -> list[Tensor]:
        values, out = [], []
        for c in range(classes):
            value, gradient = losses.gradient_distance_and_gradient(
                [t[c] for t in syn], [t[c] for t in real]
            )
            values.append(value)
            out += gradient
        return [torch.stack(values), *out]

    def exact() -> list[Tensor]:
        wide = [t.double() for t in real]

        def defined(*tensors: Tensor) -> Tensor:
            return reference.gradient_distance(tensors, wide, "row_cosine", 1e-6, True)

        along = [t.double() for t in directions]
        return arranged(sizing.work(defined, [t.double() for t in syn], mode, directions=along))()

    providers: dict[str, Callable[[], object]] = {
        "eager": sizing.work(loop, parts, mode, directions=rows),
        "ddfast": arranged(sizing.work(ours, syn, mode, directions=directions)),
    }
    if mode == "backward":
        providers["ddfast one call"] = arranged(one_call)
        providers["ddfast class by class"] = class_by_class
    if sizing.compiles(options, mode):
        providers["torch.compile"] = sizing.work(compiled(loop), parts, mode)
    counted = sum(t.numel() for t in syn)
    return Case(
        operator="gradient_distance",
        name=name,
        mode=mode,
        exact=exact,
        providers=providers,
        # Both sides read; the gradient written; for its derivative, directions and another result.
        bytes={"forward": 2, "backward": 3, "double": 5}[mode] * counted * 4,
        rounds=sizing.rounds(options, 9 if counted > 2e7 else 25),
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    names = [
        ("ConvNet-3 width 128, 10 classes", "ConvNet", 32, 10),
        ("ConvNet-3 width 64, 8x8, 10 classes", "ConvNetW64", 8, 10),
        ("ResNet-18, 1 class", "ResNet18", 32, 1),
        ("ResNet-18, 10 classes", "ResNet18", 32, 10),
    ]
    for name in names[: 3 if options.quick else None]:
        yield dataclasses.replace(case(*name, options), mode="loss and gradient")


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    network = sizing.network(size)
    net = nets.build(network, size.channels, size.classes, size.side)
    counted = 4 * sum(p.numel() for p in net.parameters() if p.dim() > 1)
    # Three sets of gradients, and as many again while they are differentiated twice.
    few, note = sizing.share(
        sizing.classes_only(size), options, memory=8 * counted, moved=20 * counted
    )
    for mode in sizing.wanted(options, *sizing.ORDERS):
        name = f"{network}, {size.side} px, C={few.classes}"
        yield dataclasses.replace(
            case(name, network, size.side, few.classes, options, mode, size.classes),
            size=sizing.label(size, note),
        )


if __name__ == "__main__":
    run(cases, __doc__ or "")
