"""Gradient matching (DC, DSA): a whole outer iteration and its parts, one network, all classes.

    python benchmarks/bench_gradient_matching.py --out benchmarks/results/gradient_matching.csv
    python benchmarks/bench_gradient_matching.py --tuned_allocator   # glibc's malloc tuned

The baseline "eager" does what the official scripts do: a Python loop over classes, `create_graph`,
the distance layer by layer, one `loss.backward()` that reaches the network's weights as well. With
its default thresholds glibc returns every large activation to the system and faults it in again;
--tuned_allocator raises them, for all providers. "full": 3x32x32, ConvNet-3 of width 128, 256 real
images per class; "s16": 3x16x16, width 64, 64 real; "s8": 3x8x8, width 64, 64 real.

Real and synthetic images are random. A float32 gradient is judged image by image: a ReLU whose
input rounds to the other side of zero moves all images of its class by up to some per cent, in any
program. The error that is reported is the median over images (allowed: 1e-3, and 1e-2 for a whole
iteration, in which the real gradients have such flips as well); more than a fifth of the images
beyond 5 % are an error, too. With DSA the providers draw parameters of their own, so that only the
iteration without it is verified. At a named size the real side counts as "backward", the synthetic
one, the gradient of a distance between gradients, as "double".
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast import engine
from ddfast.augment import DSA
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import bench_augment, sizing
from ddfast.benchmarks.matching_task import (
    STRATEGY,
    Shape,
    Task,
    class_loop,
    draws_of,
    judged,
    operation_of,
)


def judged_classes(result: object, exact: object, tensors: int) -> float:
    """Median over classes of the relative error of a class's gradient; 1 if one is beyond 5 %."""
    errors = []
    for at in range(0, len(exact), tensors):  # type: ignore[arg-type]
        a = torch.cat([t.detach().double().flatten() for t in result[at : at + tensors]])  # type: ignore[index]
        b = torch.cat([t.flatten() for t in exact[at : at + tensors]])  # type: ignore[index]
        errors.append(float((a - b).norm() / b.norm()))
    return 1.0 if max(errors) > 0.05 else statistics.median(errors)


def real_side(size: str | Shape, classes: int, options: argparse.Namespace) -> Case:
    """Weight gradients of the real images of so many classes."""
    task = Task(size, max(classes, 10), 1, options.device)
    task.classes = classes
    images, counts = task.reals(), [task.batch] * classes
    labels = task.real_labels[: classes * task.batch]
    everything = engine.weight_names(task.net, "all")

    def stacked(rows: list[list[Tensor]]) -> list[Tensor]:
        """Those that count, class after class."""
        chosen = [i for i, name in enumerate(everything) if name in task.names]
        return [row[i] for row in rows for i in chosen]

    def eager() -> list[Tensor]:
        return stacked([task.eager_real(x, c) for c, x in enumerate(images)])

    def ddfast(**more: str) -> list[Tensor]:
        found = engine.segment_gradients(
            task.net, torch.cat(images), labels, counts, task.names, **more
        )
        return [g[c] for c in range(classes) for g in found]

    parameters = dict(task.plain.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(task.plain, weights, (x,)), y)

    every = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def vmap() -> list[Tensor]:
        x = torch.stack(images)
        found = every(parameters, x, labels.view(classes, -1))
        return stacked([[g[c] for g in found.values()] for c in range(classes)])

    def exact() -> list[Tensor]:
        found = engine.segment_gradients(
            task.net.double(),
            torch.cat(images).double(),
            labels,
            counts,
            task.names,
            path="general",
        )
        task.net.float()
        return [g[c] for c in range(classes) for g in found]

    providers: dict[str, Callable[[], object]] = {
        "eager": eager,
        "ddfast": ddfast,
        "ddfast direct": lambda: ddfast(algorithm="direct"),
        "torch.func vmap": vmap,
    }
    if sizing.compiles(options, "backward"):
        fast = compiled(task.plain)

        def with_compile() -> list[Tensor]:
            rows = []
            for c, x in enumerate(images):
                y = labels[: len(x)] * 0 + c
                rows.append(
                    list(torch.autograd.grad(cross_entropy(fast(x), y), list(parameters.values())))
                )
            return stacked(rows)

        providers["torch.compile"] = with_compile
    return Case(
        operator="gradient_matching",
        name=f"{size}, {classes} class{'es' * (classes > 1)}",
        mode="real side",
        exact=exact,
        providers=providers,
        bytes=sum(x.numel() for x in images) * 4,
        tolerance=1e-3,  # of a class's gradient: a flipped ReLU or two of 256 images, see above
        error=functools.partial(judged_classes, tensors=len(task.names)),
        rounds=sizing.rounds(options, 5 if task.large else 9),
        device=options.device,
    )


def synthetic_side(size: str | Shape, classes: int, ipc: int, options: argparse.Namespace) -> Case:
    """From synthetic images and given real gradients to the gradient of the images."""
    task = Task(size, classes, ipc, options.device)
    counts = [ipc] * classes
    everything = engine.weight_names(task.net, "all")
    shapes = dict(task.net.named_parameters())

    def target(c: int) -> list[Tensor]:
        found = dict(zip(task.names, task.targets, strict=True))
        return [found[n][c] if n in found else torch.zeros_like(shapes[n]) for n in everything]

    targets = [target(c) for c in range(classes)]

    def eager() -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=task.device)
        for c in range(classes):
            loss = loss + task.eager_syn(task.of_class(c), c, targets[c])
        return task.eager_backward(loss)

    def ddfast(**more: str) -> tuple[Tensor, Tensor]:
        return engine.match_gradients(
            task.net, task.syn.detach(), task.labels, counts, task.targets, task.names, **more
        )

    parameters = dict(task.plain.named_parameters())
    plain_names = dict(zip(everything, parameters, strict=True))

    def loss_of(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(task.plain, weights, (x,)), y)

    every = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))

    def distance(s: Tensor) -> Tensor:
        x = s.view(classes, ipc, *s.shape[1:])
        found = every(parameters, x, task.labels.view(classes, ipc))
        total = torch.zeros((), device=task.device)
        for name, real in zip(task.names, task.targets, strict=True):
            a, b = real.flatten(2), found[plain_names[name]].flatten(2)
            cosine = (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2) + 1e-6)
            total = total + (1 - cosine).sum()
        return total

    def vmap() -> tuple[Tensor, Tensor]:
        loss = distance(task.syn)
        return loss.detach(), torch.autograd.grad(loss, task.syn)[0]

    def exact() -> tuple[Tensor, Tensor]:
        found = task.exact
        task.net.float()
        return found

    providers: dict[str, Callable[[], object]] = {
        "eager": eager,
        "ddfast": ddfast,
        "ddfast direct": lambda: ddfast(algorithm="direct"),
        "ddfast losses, class loop": lambda: class_loop(task, targets),
        "torch.func vmap": vmap,
    }
    if sizing.compiles(options, "backward") and not task.large:
        fast = compiled(torch.func.grad_and_value(distance))

        def with_compile() -> tuple[Tensor, Tensor]:
            gradient, loss = fast(task.syn.detach())
            return loss, gradient

        providers["torch.compile"] = with_compile
    return Case(
        operator="gradient_matching",
        name=f"{size}, {classes} classes, ipc {ipc}",
        mode="synthetic side",
        exact=exact,
        providers=providers,
        bytes=task.syn.numel() * 8,
        rounds=sizing.rounds(options, 5 if task.large and ipc > 1 else 15),
        device=options.device,
        tolerance=1e-3,
        error=judged,
    )


def outer_iteration(
    size: str | Shape, ipc: int, augmented: bool, options: argparse.Namespace, classes: int = 10
) -> Case:
    """Everything between two updates of the images: both sides, augmentation, distance."""
    task = Task(size, classes, ipc, options.device)
    dsa = DSA(STRATEGY)
    images = torch.cat(task.reals())
    draw = draws_of(classes, task.size)
    real_counts, syn_counts = [task.batch] * classes, [ipc] * classes

    def augment_class(x: Tensor, c: int) -> Tensor:
        if not augmented:
            return x
        return getattr(bench_augment, operation_of(c))(x, bench_augment.Siamese(x, c))

    def eager() -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=task.device)
        for c, x in enumerate(images.split(task.batch)):
            real = task.eager_real(augment_class(x, c), c)
            loss = loss + task.eager_syn(augment_class(task.of_class(c), c), c, real)
        return task.eager_backward(loss)

    def ddfast(**more: str) -> tuple[Tensor, Tensor]:
        s = leaf = task.syn.detach().requires_grad_()
        x = images
        if augmented:
            x, s = dsa(x, draw, real_counts), dsa(leaf, draw, syn_counts)
        real = engine.segment_gradients(
            task.net, x, task.real_labels, real_counts, task.names, **more
        )
        distances, by_s = engine.match_gradients(
            task.net, s.detach(), task.labels, syn_counts, real, task.names, **more
        )
        return distances, torch.autograd.grad(s, leaf, by_s)[0]

    def exact() -> tuple[Tensor, Tensor]:
        """ddfast's in float64, which tests compare with double backward."""
        x, leaf = images.double(), task.syn.detach().double().requires_grad_()
        s = leaf
        if augmented:
            x, s = dsa(x, draw, real_counts), dsa(leaf, draw, syn_counts)
        net = task.net.double()
        real = engine.segment_gradients(net, x, task.real_labels, real_counts, task.names)
        distances, by_s = engine.match_gradients(
            net, s.detach(), task.labels, syn_counts, real, task.names
        )
        task.net.float()
        return distances, torch.autograd.grad(s, leaf, by_s)[0]

    return Case(
        operator="gradient_matching",
        name=f"{size}, {classes} classes, ipc {ipc}{', DSA' * augmented}",
        mode="outer iteration",
        exact=exact,
        # The draws of the two sides differ with augmentation (the official seeds are its own).
        providers={
            "eager": eager,
            "ddfast": ddfast,
            "ddfast direct": lambda: ddfast(algorithm="direct"),
        },
        bytes=images.numel() * 4,
        rounds=sizing.rounds(options, 3 if task.large else 9),
        device=options.device,
        tolerance=1e-2,
        error=(lambda *_: 0.0) if augmented else judged,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    sizes = ("s8", "s16") if options.quick else ("s8", "s16", "full")
    for size in sizes:
        yield real_side(size, 1 if size == "full" else 10, options)
        for ipc in (1, 10, 50):
            if ipc < 50 or size == "full":
                yield synthetic_side(size, 10, ipc, options)
        yield outer_iteration(size, 1, False, options)
        yield outer_iteration(size, 10, True, options)
    if not options.quick:
        yield synthetic_side("s16", 100, 1, options)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    forward, pixels = sizing.operations_of_image(size), 4 * size.width * size.side**2
    few, note = sizing.several_classes(
        size, options, memory=16 * pixels, operations=6 * forward, seconds=2
    )
    shape = Shape(size.side, sizing.network(size), few.batch_real, size.channels)
    classes, ipc = few.classes, few.ipc
    # Forward and backward are 3 forward passes, their derivative 5 more of synthetic images.
    real, syn = (3 * forward * classes * n for n in (few.batch_real, ipc))
    for mode in sizing.wanted(options, "backward", "double", "iteration"):
        if mode == "backward":
            made, flops = real_side(shape, classes, options), real
        elif mode == "double":
            made, flops = synthetic_side(shape, classes, ipc, options), 3 * syn
        else:
            made = outer_iteration(shape, ipc, False, options, classes)
            flops = real + 3 * syn
        for variant in ("ddfast direct", "torch.func vmap", "ddfast losses, class loop"):
            made.providers.pop(variant, None)
        label = sizing.label(size, note)
        yield dataclasses.replace(made, mode=mode, flops=flops, size=label)


if __name__ == "__main__":
    run(cases, __doc__ or "")
