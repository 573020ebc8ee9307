"""Networks of one architecture trained side by side: their weights, their stacks, the threads."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import nets
from ddfast.augment import DSA
from ddfast.evaluate.stacked import can_stack, stacked_logits

__all__ = [
    "SGD",
    "AdamW",
    "SideBySide",
    "augmented",
    "cross_entropies",
    "evenly",
    "shared_out",
    "stack_size",
]

SECOND_BETA, ADAM_EPS = 0.999, 1e-8

G = TypeVar("G")
M = TypeVar("M")
T = TypeVar("T")

# Milliseconds of one core with 2 MiB of cache for a training step of one network, augmentation
# included, when it is trained one by one, and 2, 5 and 8 at once.
#            10 images of 8x8         100 images               256 images
#   D2W16    1.66  0.92  0.48  0.35   3.23  1.88  1.79  1.61   5.49  3.91  4.19  4.19
#   D2W32    2.04  1.15  0.64  0.49   4.95  3.05  2.78  3.00   9.97  6.75  8.50  8.93
#   D3W32    2.52  1.39  0.81  0.61   5.70  3.76  3.36  3.60   12.0  8.63  9.08  10.3
#   MLP      1.01  0.55  0.30  0.24   1.33  0.85  0.53  0.47   1.92  1.25  0.90  0.87
# On images of 3x32x32 nothing is gained (W32, 10 images: 6.8 and 6.7; 100 images: 86 and 89).
# So: stack on images of up to 16x16, as many networks as keep the largest activation under 4 MiB,
# but not more than 8, and in two stacks at least, so that two cores have work.
STACKED_PIXELS = 256
STACKED_FLOATS = 1 << 20
MOST_STACKED = 8


class SideBySide:
    """The weights of K networks of one architecture, in one piece, and how to differentiate them.

    An optimiser's step is then a few operations, whatever the network.

    Attributes:
        flat: all weights, one vector. It holds the first parameter of every network, then the
            second of every network, and so on. To be changed in place.
        leaves: views of it, `(K, *shape)`, one for each parameter.

    Args:
        group: the networks, in the mode in which they are to run; they keep their weights.
        stacked: whether `stacked_logits` is to run them; else there may be one only.
    """

    def __init__(self, group: Sequence[nets.Network], stacked: bool) -> None:
        self.net, self.stacked = group[0], stacked
        self.names = [name for name, _ in self.net.named_parameters()]
        values = [
            torch.stack([p.detach() for p in each])
            for each in zip(*(n.parameters() for n in group), strict=True)
        ]
        self.flat = torch.cat([value.reshape(-1) for value in values])
        self.sizes = [value.numel() for value in values]
        self.leaves = [
            piece.view(value.shape).detach().requires_grad_()
            for piece, value in zip(self.flat.split(self.sizes), values, strict=True)
        ]

    def logits(self, x: Tensor) -> Tensor:
        """(K, n, channels, H, W) -> (K, n, classes)"""
        if self.stacked:
            return stacked_logits(self.net, dict(zip(self.names, self.leaves, strict=True)), x)
        single = {name: leaf[0] for name, leaf in zip(self.names, self.leaves, strict=True)}
        return torch.func.functional_call(self.net, single, (x[0],)).unsqueeze(0)

    def gradient(self, losses: Tensor) -> Tensor:
        """Of each network's loss `(K,)` in its own weights, laid out as `flat`."""
        gradients = torch.autograd.grad(losses.sum(), self.leaves)
        return torch.cat([each.reshape(-1) for each in gradients])

    def by_network(self, flat: Tensor) -> Tensor:
        """(K, weights of a network): a vector that is laid out as `flat`, a row a network."""
        networks = len(self.leaves[0])
        return torch.cat([piece.view(networks, -1) for piece in flat.split(self.sizes)], 1)

    def spread(self, values: Tensor) -> Tensor:
        """One number of each network `(K,)`, at all of its weights: laid out as `flat`."""
        return torch.cat([values.repeat_interleave(size // len(values)) for size in self.sizes])

    def copy_to(self, group: Sequence[nets.Network]) -> None:
        """Write the weights into networks."""
        with torch.no_grad():
            for net, *trained in zip(group, *self.leaves, strict=True):
                for parameter, value in zip(net.parameters(), trained, strict=True):
                    parameter.copy_(value)


class SGD:
    """torch.optim.SGD of a vector of weights."""

    def __init__(self, weights: Tensor, momentum: float, weight_decay: float) -> None:
        self.weights, self.momentum, self.weight_decay = weights, momentum, weight_decay
        self.velocity = torch.zeros_like(weights)

    def step(self, gradient: Tensor, lr: float) -> None:
        """Change the weights. The gradient is used up."""
        gradient.add_(self.weights, alpha=self.weight_decay)
        self.velocity.mul_(self.momentum).add_(gradient)
        self.weights.add_(self.velocity, alpha=-lr)


class AdamW:
    """torch.optim.AdamW of a vector of weights."""

    def __init__(self, weights: Tensor, beta: float, weight_decay: float) -> None:
        self.weights, self.beta, self.weight_decay, self.steps = weights, beta, weight_decay, 0
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)

    def step(self, gradient: Tensor, lr: float) -> None:
        """Change the weights."""
        first, self.steps = self.beta, self.steps + 1
        self.weights.mul_(1 - lr * self.weight_decay)
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(SECOND_BETA).addcmul_(gradient, gradient, value=1 - SECOND_BETA)
        size = lr / (1 - first**self.steps)
        root = self.square.sqrt().div_(math.sqrt(1 - SECOND_BETA**self.steps)).add_(ADAM_EPS)
        self.weights.addcdiv_(self.mean, root, value=-size)


def augmented(dsa: DSA, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Images (K, n, channels, H, W), those of each network by a draw from its own generator."""
    draws = [dsa.draw(each, x.shape[-2:], count=x.shape[1]) for each in generators]
    return dsa(x.flatten(0, 1), torch.cat(draws, 1)).view(x.shape)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """(K,): the mean of each network, from (K, n, classes) and the K * n targets in their order."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return losses.view(logits.shape[:2]).mean(1)


def stack_size(
    net: nets.Network, image: Sequence[int], batch: int, at_once: int | None, networks: int
) -> int:
    """How many networks to train at once at most; 0 for one by one, as they are.

    Args:
        net: one of them.
        image: (channels, H, W).
        batch: images a step.
        at_once: what was asked for; None for a rule by size.
        networks: how many there are.

    Raises:
        ValueError: at_once below 1.
    """
    if at_once is not None and (isinstance(at_once, bool) or at_once < 1):
        raise ValueError(f"at_once must be at least 1, got {at_once!r}")
    if not can_stack(net) or at_once == 1:
        return 0
    if at_once is not None:
        return at_once
    if math.prod(image[1:]) > STACKED_PIXELS:
        return 0
    largest = 0

    def measure(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    hooks = [module.register_forward_hook(measure) for module in net.modules()]
    parameter = next(net.parameters())
    with torch.no_grad():
        net(parameter.new_zeros(1, *image))
    for hook in hooks:
        hook.remove()
    fitting = STACKED_FLOATS // (batch * largest)
    return max(1, min(fitting, MOST_STACKED, math.ceil(networks / 2)))


def evenly(members: Sequence[M], most: int) -> list[list[M]]:
    """Groups of at most so many, as even as can be: 5 in groups of up to 4 are 3 and 2."""
    number = math.ceil(len(members) / most)
    cuts = [len(members) * place // number for place in range(number + 1)]
    return [list(members[start:end]) for start, end in itertools.pairwise(cuts)]


def shared_out(
    job: Callable[[G], T],
    groups: Sequence[G],
    stop: threading.Event,
    workers: int,
    threads: int,
) -> list[T]:
    """Do the job for every group, in several threads, each with `threads` threads of torch's."""
    before = torch.get_num_threads()
    try:
        # One worker, too, is a thread of its own: grad mode and number of threads are its own.
        with ThreadPoolExecutor(workers, "ddfast", torch.set_num_threads, (threads,)) as pool:
            futures = [pool.submit(job, group) for group in groups]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # after an exception here or in a thread, Ctrl-C for one, the others end soon
                if not all(future.done() for future in futures):
                    stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            if not future.cancelled() and future.exception() is not None:
                future.result()
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(before)
