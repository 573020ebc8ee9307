"""Gradient distance (row cosine), loss and gradient with respect to the synthetic gradients.

    python benchmarks/bench_gradient_distance.py --out benchmarks/results/gradient_distance.csv

The baseline does what the official scripts do: a Python loop over classes and layers, autograd.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from ddfast import losses, nets
from ddfast.bench import Case, compiled, run
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


def eager_loop(syn: list[Tensor], real: list[Tensor], classes: int) -> tuple[Tensor, ...]:
    """Loss and gradient of all classes, one after the other."""
    parts = [[t[c].detach().requires_grad_() for t in syn] for c in range(classes)]
    loss = sum(eager(s, [t[c] for t in real]) for c, s in enumerate(parts))
    leaves = [t for part in parts for t in part if t.dim() > 1]
    return (loss, *torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]


def exact(syn: list[Tensor], real: list[Tensor], classes: int) -> tuple[Tensor, ...]:
    """The definition in float64, in the order of `eager_loop`."""
    wide = [[t.double() for t in tensors] for tensors in (syn, real)]
    value = reference.gradient_distance(*wide, "row_cosine", 1e-6, True)
    by_syn, _ = reference.gradient_distance_bwd(
        torch.ones_like(value), *wide, "row_cosine", 1e-6, True
    )
    return (value.sum(), *(t[c] for c in range(classes) for t in by_syn if t.dim() > 2))


def case(name: str, network: str, size: int, classes: int, options: argparse.Namespace) -> Case:
    """One network's parameter shapes for so many classes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in nets.build(network, 3, 10, size).parameters()]

    def drawn() -> list[Tensor]:
        tensors = [torch.randn(classes, *s, generator=generator) * 0.01 for s in shapes]
        return [t.to(options.device) for t in tensors]

    syn, real = drawn(), drawn()
    leaves = [t.detach().requires_grad_() for t in syn]  # the same memory: as warm or cold

    def by_class(value: Tensor, gradient: list[Tensor]) -> tuple[Tensor, ...]:
        return (value.sum(), *(t[c] for c in range(classes) for t in gradient if t.dim() > 2))

    def autograd() -> tuple[Tensor, ...]:
        value = losses.gradient_distance(leaves, real, batched=True)
        gradient = torch.autograd.grad(value.sum(), leaves)
        return by_class(value.detach(), list(gradient))

    def one_pass() -> tuple[Tensor, ...]:
        return by_class(*losses.gradient_distance_and_gradient(syn, real, batched=True))

    def class_by_class() -> tuple[Tensor, ...]:
        out: list[Tensor] = []
        total = torch.zeros((), device=options.device)
        for c in range(classes):
            value, gradient = losses.gradient_distance_and_gradient(
                [t[c] for t in syn], [t[c] for t in real]
            )
            total = total + value
            out += [t for t in gradient if t.dim() > 1]
        return (total, *out)

    providers = {
        "eager": lambda: eager_loop(syn, real, classes),
        "ddfast autograd": autograd,
        "ddfast one call": one_pass,
        "ddfast class by class": class_by_class,
    }
    if not options.no_compile and not (options.quick and classes > 1):
        fast = compiled(eager_loop)
        providers["torch.compile"] = lambda: fast(syn, real, classes)
    counted = sum(t.numel() for t in syn if t.dim() > 2)
    return Case(
        operator="gradient_distance",
        name=name,
        mode="loss and gradient",
        exact=lambda: exact(syn, real, classes),
        providers=providers,  # type: ignore[arg-type]
        bytes=3 * counted * 4,
        rounds=9 if counted > 2e7 else 25,
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    yield case("ConvNet-3 width 128, 10 classes", "ConvNet", 32, 10, options)
    yield case("ConvNet-3 width 64, 8x8, 10 classes", "ConvNetW64", 8, 10, options)
    yield case("ResNet-18, 1 class", "ResNet18", 32, 1, options)
    if not options.quick:
        yield case("ResNet-18, 10 classes", "ResNet18", 32, 10, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
