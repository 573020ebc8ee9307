"""Distribution matching (DM): a whole outer iteration, and CAFE's class means of every layer.

    python benchmarks/bench_distribution_matching.py --out results.csv
    python benchmarks/bench_distribution_matching.py --tuned_allocator   # glibc's malloc tuned

An outer iteration is all between two updates of the images, with a fresh network given: augment
real and synthetic images, their features, the distances of the class means, the gradient of the
images. The baseline "eager" does what the official script does: a Python loop over classes, frozen
weights, activations in place, one `loss.backward()`; "torch.compile" is the same loop with its
network compiled. "full": 3x32x32, ConvNet-3 of width 128, 256
real images per class; "s16": 3x16x16, width 64, 64 real; "s8": 3x8x8, width 64, 64 real.

Real and synthetic images are random. The error of an iteration is the median over images, see
`matching_task.judged`; with DSA the providers draw parameters of their own, so that only the
iteration without it is verified.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ddfast import engine
from ddfast.augment import DSA
from ddfast.bench import Case, compiled, run
from ddfast.benchmarks import bench_augment
from ddfast.benchmarks.matching_task import STRATEGY, Task, draws_of, judged, operation_of
from ddfast.engine.segments import pieces
from ddfast.ops.class_mean import class_mean_distance


def official(task: Task) -> nn.Sequential:
    """The layers of `embed`, frozen, with the activations in place, as the official script has."""
    plain = copy.deepcopy(task.plain[:-1]).requires_grad_(False)
    for layer in plain:
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    return plain


def outer_iteration(size: str, ipc: int, augmented: bool, options: argparse.Namespace) -> Case:
    """From real and synthetic images to distances and the gradient of the images."""
    classes = 10
    task = Task(size, classes, ipc, options.device)
    embed, dsa, draw = official(task), DSA(STRATEGY), draws_of(classes, task.size)
    images = torch.cat(task.reals())
    real_counts, syn_counts = [task.batch] * classes, [ipc] * classes

    def augment_class(x: Tensor, c: int) -> Tensor:
        if not augmented:
            return x
        return getattr(bench_augment, operation_of(c))(x, bench_augment.Siamese(x, c))

    def official_loop(net: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=task.device)
        for c, x in enumerate(images.split(task.batch)):
            real = net(augment_class(x, c)).detach()
            syn = net(augment_class(task.of_class(c), c))
            loss = loss + torch.sum((torch.mean(real, dim=0) - torch.mean(syn, dim=0)) ** 2)
        task.syn.grad = None
        loss.backward()
        assert task.syn.grad is not None
        return loss.detach(), task.syn.grad

    def step(net: nn.Module, x: Tensor, leaf: Tensor, **more: str) -> tuple[Tensor, Tensor]:
        """As the method runs it, in pieces."""
        s = leaf = leaf.detach().requires_grad_()
        if augmented:
            s = dsa(leaf, draw, syn_counts)
        syn = engine.features(net, s.detach(), keep=True, **more)
        most = engine.images_at_once(net, x.shape[1:], None, False, **more)
        real = x.new_empty(len(x), syn.features.shape[1])
        for piece in pieces(real_counts, most):
            part = x[piece.images]
            if augmented:
                part = dsa(part, draw[:, piece.segments], piece.counts)
            real[piece.images] = engine.features(net, part, **more).features
        distances, difference = class_mean_distance(syn.features, real, syn_counts, real_counts)
        by_s = syn.backward((difference * (2 / ipc)).repeat_interleave(ipc, 0))
        return distances, torch.autograd.grad(s, leaf, by_s)[0] if augmented else by_s

    def exact() -> tuple[Tensor, Tensor]:
        """Ours in float64 through autograd, which tests compare with the formula."""
        wide = step(task.net.double(), images.double(), task.syn.double(), path="general")
        task.net.float()
        return wide

    providers: dict[str, Callable[[], object]] = {
        "eager": lambda: official_loop(embed),
        "ddfast": lambda: step(task.net, images, task.syn),
    }
    if not options.no_compile and not options.quick:
        fast = compiled(embed)
        providers["torch.compile"] = lambda: official_loop(fast)
    return Case(
        operator="distribution_matching",
        name=f"{size}, {classes} classes, ipc {ipc}{', DSA' * augmented}",
        mode="outer iteration",
        exact=exact,
        providers=providers,
        bytes=images.numel() * 4,
        rounds=5 if size == "full" else 9,
        device=options.device,
        tolerance=1e-2,
        error=(lambda *_: 0.0) if augmented else judged,
    )


def layer_means(size: str, options: argparse.Namespace) -> Case:
    """CAFE: each class's mean of every block's activation before pooling, and of the features."""
    classes = 10
    task = Task(size, classes, 1, options.device)
    plain, images, counts = official(task), torch.cat(task.reals()), [task.batch] * classes

    def of_class(x: Tensor) -> list[Tensor]:
        """As the official script, without a graph (the script has one, and drops it)."""
        means = []
        for layer in plain:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                means.append(x.mean(0))
        return [*means, x.mean(0)]

    def official_loop(means: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        rows = [means(x) for x in images.split(task.batch)]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def ddfast(net: nn.Module, x: Tensor, path: str = "auto") -> list[Tensor]:
        found = engine.features(net, x, counts, layers=True, path=path)
        return [*found.maps, found.features.view(classes, task.batch, -1).mean(1)]

    providers: dict[str, Callable[[], object]] = {
        "eager": lambda: official_loop(of_class),
        "ddfast": lambda: ddfast(task.net, images),
    }
    if not options.no_compile and not options.quick:
        fast = compiled(of_class)
        providers["torch.compile"] = lambda: official_loop(fast)

    def exact() -> list[Tensor]:
        net = task.net.double()
        parts = [
            engine.features(net, x.double(), [len(x)], layers=True, path="general")
            for x in images.split(task.batch)
        ]
        net.float()
        maps = zip(*(part.maps for part in parts), strict=True)
        features = torch.stack([part.features.mean(0) for part in parts])
        return [*(torch.cat(of_block) for of_block in maps), features]

    return Case(
        operator="distribution_matching",
        name=f"{size}, {classes} classes, {task.batch} images each",
        mode="layer means",
        exact=exact,
        providers=providers,
        bytes=images.numel() * 4,
        rounds=5 if size == "full" else 9,
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for size in ("s8", "s16") if options.quick else ("s8", "s16", "full"):
        yield outer_iteration(size, 1, False, options)
        for ipc in (1, 10):
            yield outer_iteration(size, ipc, True, options)
        yield layer_means(size, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
