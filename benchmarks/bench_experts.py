"""One epoch of expert networks: 8 on scikit-learn's digits, 8x8 pixels; two at a named size.

    python benchmarks/bench_experts.py --out benchmarks/results/experts.csv

"eager" is the official scripts' loop in plain torch modules with torch's optimiser, one network
after another; "ddfast, one by one" is the same in ddfast's words, "ddfast, stacked" trains all of
them at once, and "ddfast, stacks of K" as many as `ddfast experts` would with two cores in mind.
All see the same batches with the same augmentation, drawn and applied by ddfast, eager included;
building the networks is part of it. Each is judged by the weights in float64, network by network:
the weight that is furthest off, relative to the largest. A ReLU whose input rounds to the other
side of zero moves a network in any program, and the steps after it amplify that, so what is
reported is the median over networks, or a hundredth of the worst if that is more.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from ddfast import data
from ddfast.augment import DSA
from ddfast.bench import Case, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.benchmarks.random_images import noise
from ddfast.data import Dataset, normalise
from ddfast.evaluate.side_by_side import SideBySide, evenly, stack_size
from ddfast.experts.train import built
from ddfast.experts.training import Config, Group
from ddfast.methods.config import filled
from ddfast.random import generator

NETWORKS = 8
CASES = [  # model, images a step, optimiser
    ("ConvNetD2W32", 16, "sgd"),
    ("ConvNetD2W32", 16, "gsam"),
    ("ConvNetD2W32", 256, "sgd"),
    ("MLP", 16, "sgd"),
    ("ConvNetD2", 16, "sgd"),
]


def gsam(net: nn.Module, optimiser: torch.optim.SGD, config: Config, x: Tensor, y: Tensor) -> None:
    """A step as the official optimiser makes it, parameter by parameter."""
    parameters = list(net.parameters())
    g = torch.autograd.grad(cross_entropy(net(x), y), parameters)
    with torch.no_grad():
        norm = torch.stack([(p.abs() * d).norm() for p, d in zip(parameters, g, strict=True)])
        scale = config.rho / (norm.norm() + 1e-12)
        shift = [p.square() * d * scale for p, d in zip(parameters, g, strict=True)]
        for p, e in zip(parameters, shift, strict=True):
            p.add_(e)
    moved = torch.autograd.grad(cross_entropy(net(x), y), parameters)
    with torch.no_grad():
        inner = torch.stack([(a * b).sum() for a, b in zip(g, moved, strict=True)]).sum()
        square = torch.stack([b.norm() for b in moved]).norm().square()
        for p, e, a, b in zip(parameters, shift, g, moved, strict=True):
            p.sub_(e)
            p.grad = b - config.alpha * (a - inner / square * b)
    optimiser.step()


def eager(dataset: Dataset, config: Config) -> Tensor:
    """(networks, parameters) after the epoch."""
    dsa, found = DSA(config.dsa_strategy), []
    for expert in range(config.num_experts):
        net = built(config, dataset, expert).train()
        if hasattr(net, "features"):  # the same modules, for what knows no operator of ddfast's
            net = nn.Sequential(*net.features.children(), nn.Flatten(), net.classifier)
        optimiser = torch.optim.SGD(net.parameters(), config.lr_teacher)
        order, drawing = (
            generator(config.seed, f"experts: {purpose}", expert, 0)
            for purpose in ("order", "augmentation")
        )
        count = len(dataset.train_images)
        for rows in torch.randperm(count, generator=order).split(config.batch_train):
            x = normalise(dataset.train_images[rows], dataset.mean, dataset.std)
            x = dsa(x, dsa.draw(drawing, dataset.size, count=len(rows)))
            y = dataset.train_labels[rows]
            if config.optimiser == "gsam":
                gsam(net, optimiser, config, x, y)
            else:
                optimiser.zero_grad()
                cross_entropy(net(x), y).backward()
                optimiser.step()
        found.append(parameters_to_vector(net.parameters()).detach())
    return torch.stack(found)


def ours(dataset: Dataset, config: Config, most: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same, in stacks of at most so many; 0 for one by one, unstacked."""
    found = []
    for numbers in evenly(range(config.num_experts), max(1, most)):
        networks = [built(config, dataset, number).to(dtype) for number in numbers]
        group = Group(config, dataset, numbers, SideBySide(networks, stacked=most > 0))
        group.epoch(0, dataset.train_images, dataset.train_labels)
        found.append(group.snapshots())
    return torch.cat(found)


def error(result: object, exact: object) -> float:
    """The median over networks, or a hundredth of the worst."""
    assert isinstance(result, Tensor) and isinstance(exact, Tensor)
    found = (result.double() - exact).abs().amax(1) / exact.abs().amax(1)
    return max(float(found.median()), float(found.max()) / 100)


def case(
    dataset: Dataset, model: str, batch: int, optimiser: str, device: str, networks: int = NETWORKS
) -> Case:
    config = filled(
        Config(
            model=model,
            batch_train=batch,
            optimiser=optimiser,
            num_experts=networks,
            train_epochs=1,
            max_start_epoch=1,
            expert_epochs=1,
        ),
        dataset,
    )
    net = built(config, dataset, 0)
    weights = sum(p.numel() for p in net.parameters())
    rule = stack_size(net, (dataset.channels, *dataset.size), batch, None, networks)
    steps = -(-len(dataset.train_images) // batch)
    return Case(
        operator="experts",
        name=f"{model}, {networks} networks, batches of {batch}",
        mode=optimiser,
        exact=lambda: ours(dataset, config, networks, torch.float64),
        providers={
            "eager": lambda: eager(dataset, config),
            "ddfast, one by one": lambda: ours(dataset, config, 0),
            f"ddfast, stacks of {rule}": lambda: ours(dataset, config, rule),
            "ddfast, stacked": lambda: ours(dataset, config, networks),
        },
        bytes=3 * 4 * networks * weights * steps,
        rounds=5,
        device=device,
        error=error,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.device != "cpu":  # stacks are for small networks on a CPU
        return
    dataset = data.load("digits")
    for model, batch, optimiser in CASES[:2] if options.quick else CASES:
        yield case(dataset, model, batch, optimiser, options.device)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    # Stacks are for a CPU; the epoch is of one batch, "iteration" a step of each network.
    if options.device != "cpu" or "iteration" not in sizing.wanted(options, "iteration"):
        return
    networks, forward = 2, sizing.operations_of_image(size)
    few, note = sizing.share(
        sizing.batch_only(size),
        options,
        memory=networks * size.batch_real * 16 * size.width * size.side**2,
        operations=networks * 3 * forward * size.batch_real,
    )
    classes = min(size.classes, max(2, few.batch_real))  # with one there is nothing to learn
    dataset = noise(size, classes, max(1, few.batch_real // classes))
    made = case(dataset, sizing.network(size), len(dataset.train_labels), "sgd", "cpu", networks)
    for rule in (0, 1, networks):  # the same as one by one, or as stacked
        made.providers.pop(f"ddfast, stacks of {rule}", None)
    yield dataclasses.replace(
        made,
        mode="iteration",
        rounds=sizing.rounds(options, 5),
        flops=networks * 3 * forward * len(dataset.train_labels),
        size=sizing.label(size, note),
    )


if __name__ == "__main__":
    run(cases, __doc__ or "")
