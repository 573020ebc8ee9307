"""NCFM's statistic: the distance of characteristic functions of normalised features.

Also where its frequencies come from: drawn from N(0, I) where they are used and never stored, or
made by a sampling network (`ddfast.nets.sampling`), which learns to make the distance large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddfast.losses import (
    Frequencies,
    characteristic_function,
    characteristic_function_distance,
    characteristic_function_distance_and_gradient,
)
from ddfast.methods.feature_matching import Group
from ddfast.methods.run import Run
from ddfast.nets.sampling import released_frequencies, sampled_frequencies, sampling_weights
from ddfast.random import generator, seed_of

WEIGHT = 300.0
"""Of the distance in the loss."""

TINY = 1e-12
"""Features with a norm up to this are not divided by it, but by this."""

WEIGHTS, VELOCITY = "sampling network ", "sampling network's velocity "
"""Beginnings of names in `Run.state`."""


def start_sampling(run: Run, kind: str) -> dict[str, Tensor]:
    """The sampling network that `run.state` lacks; nothing if there is none to be.

    Args:
        kind: "none", "learned" or "released".
    """
    if kind == "none" or any(name.startswith(WEIGHTS) for name in run.state):
        return {}
    random = generator(run.config.seed, "sampling network")
    made = sampling_weights(run.net.classifier.in_features, random, kind == "released")
    weights = {name: weight.to(run.device, run.dtype) for name, weight in made.items()}
    found = {WEIGHTS + name: weight for name, weight in weights.items()}
    if kind == "learned":
        found |= {VELOCITY + name: torch.zeros_like(weight) for name, weight in weights.items()}
    return found


class Sampling:
    """Where the frequencies of an iteration come from.

    Args:
        kind: "none", "learned" or "released".
        count: frequencies of a class.
        lr, momentum: of the ascent, if they are learned.
    """

    def __init__(self, run: Run, kind: str, count: int, lr: float, momentum: float) -> None:
        self.run, self.kind, self.count, self.lr, self.momentum = run, kind, count, lr, momentum
        self.learns = kind == "learned"
        self.weights, self.velocity = (
            {
                name.removeprefix(start): value
                for name, value in run.state.items()
                if name.startswith(start)
            }
            for start in (WEIGHTS, VELOCITY)
        )
        self.start_over()

    def start_over(self) -> None:
        """Leaves of a graph of the weights, and no gradient yet."""
        self.leaves = {
            name: weight.detach().requires_grad_(self.learns)
            for name, weight in self.weights.items()
        }
        self.gradient = {name: torch.zeros_like(weight) for name, weight in self.velocity.items()}

    def frequencies(self, first: int, end: int) -> Frequencies | Tensor:
        """Of the classes first to end - 1: of each its own, however they are grouped."""
        run = self.run
        if self.kind == "none":
            seed = seed_of(run.config.seed, "frequencies", run.iteration)
            return Frequencies(self.count, seed, stream=first)
        random = [run.generator("frequencies", c) for c in range(first, end)]
        if not self.learns:
            return torch.stack([released_frequencies(self.leaves, each) for each in random])
        made = [sampled_frequencies(self.leaves, self.count, each) for each in random]
        return torch.stack(made)

    def ascend(self) -> None:
        """One step up the sum of the losses whose gradients were added to `gradient`."""
        if not self.learns:
            return
        self.velocity = {
            name: self.momentum * velocity + self.gradient[name]
            for name, velocity in self.velocity.items()
        }
        self.weights = {
            name: weight + self.lr * self.velocity[name] for name, weight in self.weights.items()
        }
        self.start_over()

    def state(self) -> dict[str, Tensor]:
        """What the next iteration begins with, for `Run.state`."""
        found = {WEIGHTS + name: weight for name, weight in self.weights.items()}
        return found | {VELOCITY + name: value for name, value in self.velocity.items()}


def distances(group: Group, sampling: Sampling, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Distances of the characteristic functions of all classes of a group, times 300.

    A sampling network that learns is given its gradient, too.
    """
    classes, norms = len(group.made.counts), group.features.norm(dim=1, keepdim=True)
    x = unit(group.features, norms)
    by_class = x.view(classes, len(x) // classes, -1)
    if sampling.learns:
        values, by_x = with_ascent(group, sampling, by_class, alpha, beta)
    else:
        t = sampling.frequencies(group.first, group.end)
        of_real = real_functions(group, t, sampling)
        values, by_x = characteristic_function_distance_and_gradient(
            by_class, None, t, alpha, beta, of_real
        )
    return WEIGHT * values, through_norm(WEIGHT * by_x.flatten(0, 1), x, norms)


def with_ascent(
    group: Group, sampling: Sampling, x: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The distances and their gradient; that by the sampling network is added to what it has."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        t = sampling.frequencies(group.first, group.end)
        of_real = real_functions(group, t, sampling)
        values = characteristic_function_distance(x, None, t, alpha, beta, of_real)
    names = list(sampling.gradient)
    leaves = [x, *(sampling.leaves[name] for name in names)]
    by_x, *by_weights = torch.autograd.grad(values.sum(), leaves)
    for name, found in zip(names, by_weights, strict=True):
        sampling.gradient[name] += WEIGHT * found
    return values.detach(), by_x


def unit(rows: Tensor, norms: Tensor) -> Tensor:
    """Each row divided by its norm, which is given."""
    return rows / norms.clamp(min=TINY)


def through_norm(by_unit: Tensor, units: Tensor, norms: Tensor) -> Tensor:
    """Gradient by the rows, from that by what `unit` made of them.

    A row of zeros gets none: there the derivative would be 1e12 times the gradient, in a direction
    that any other row nearby contradicts.
    """
    along = (by_unit * units).sum(1, keepdim=True)
    found = (by_unit - along * units) / norms.clamp(min=TINY)
    return torch.where(norms > TINY, found, 0)


def real_functions(group: Group, frequencies: Frequencies | Tensor, sampling: Sampling) -> Tensor:
    """Characteristic functions of the classes' real images, (classes, count, 2).

    Of a class with more images than fit they are the weighted means of those of its parts.
    """
    run = group.run
    numbers = group.features.shape[1] + sampling.count
    most = max(1, run.memory // 8 // (numbers * run.dtype.itemsize))
    found: dict[int, Tensor] = {}
    for c, share, rows in class_rows(group, most):
        x = unit(rows, rows.norm(dim=1, keepdim=True)).unsqueeze(0)
        with torch.set_grad_enabled(sampling.learns):
            part = share * characteristic_function(x, _of_class(frequencies, c))[0]
            found[c] = found[c] + part if c in found else part
    return torch.stack(list(found.values()))


def class_rows(group: Group, most: int) -> Iterator[tuple[int, float, Tensor]]:
    """Features of the real images of one class after the other, about `most` at a time.

    Yields:
        The class counted from that of the group, what share of its images they are, and they.
    """
    counts, seen = group.real_counts, 0
    waiting: list[Tensor] = []
    for part, first, within in group.real_pieces():
        for c, rows in enumerate(part.split(within), first):
            waiting.append(rows)
            seen += len(rows)
            together = sum(map(len, waiting))
            if seen == counts[c] or together >= most:
                yield c, together / counts[c], torch.cat(waiting)
                waiting = []
            if seen == counts[c]:
                seen = 0


def held(run: Run, sampling: Sampling, batch_real: int) -> int:
    """Numbers that `distances` holds of a class, beside its features."""
    numbers = sampling.count * (2 * run.decoded_per_class + 2)
    if sampling.learns:  # the frequencies, and the graph of the real images
        width = run.net.classifier.in_features
        numbers += 2 * sampling.count * width + batch_real * (width + 2 * sampling.count)
    return numbers


def _of_class(frequencies: Frequencies | Tensor, c: int) -> Frequencies | Tensor:
    """Those of one class of a group."""
    if isinstance(frequencies, Tensor):
        return frequencies[c : c + 1]
    return replace(frequencies, stream=frequencies.stream + c)
