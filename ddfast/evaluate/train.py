"""Training evaluation networks, several at once where that is faster."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddfast import nets
from ddfast.augment import DSA
from ddfast.cutmix import cutmix
from ddfast.data import Dataset
from ddfast.data.dataset import check_labels
from ddfast.evaluate import squares
from ddfast.evaluate.dc_augmentation import dc_augment
from ddfast.evaluate.largest_rate import largest_rates
from ddfast.evaluate.protocols import Protocol
from ddfast.evaluate.side_by_side import (
    SGD,
    AdamW,
    SideBySide,
    augmented,
    cross_entropies,
    evenly,
    shared_out,
    stack_size,
)
from ddfast.methods.dd import draw_weights, fixed_network, group_rows
from ddfast.random import generator

__all__ = ["NotFinite", "TrainingSet", "accuracy", "train_networks"]

TrainingSet = tuple[Tensor, Tensor]


class NotFinite(ArithmeticError):
    """A training or a network came to values that are not finite; the message says where."""


@dataclass(frozen=True)
class _Member:
    """One network to train: number `number` of those trained on set `place`."""

    place: int
    number: int

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        return generator(seed, f"evaluate: {purpose}", self.place, self.number)


def train_networks(
    sets: Sequence[TrainingSet],
    model: str,
    dataset: Dataset,
    protocol: Protocol,
    count: int,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    at_once: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[nets.Network]]:
    """Train `count` networks on each of several sets of the same size.

    Small networks are trained several at once: their weights are stacked, and the machine's threads
    share out the stacks. Each network draws its weights, the order of its images and their
    augmentation from generators of its own, derived from (`seed`, purpose, number of the set,
    number of the network), so that the others change its result by rounding only (which many steps
    amplify). Same arguments, same bits; for stacked networks with any number of threads. The order
    is DataLoader's: a fresh permutation for each pass, a short last batch kept. The loss is mean
    cross-entropy.

    While it runs, torch's number of threads is changed for the whole process.

    Args:
        sets: pairs of images `(N, channels, H, W)`, float in the data set's normalised space or
            uint8, and labels: int64 `(N,)`, or soft ones, float `(N, num_classes)`.
        model: name for `ddfast.nets.build`.
        dataset: says what the images are like (its own images are not used).
        protocol: how to train.
        count: networks for each set.
        seed: of all random numbers.
        device: where to train.
        dtype: of weights and images.
        at_once: networks to stack at most; None for a rule by size, 1 for one by one. Networks that
            cannot be stacked (see `ddfast.evaluate.stacked.can_stack`) go one by one in any case.
        on_progress: called with the number of networks whenever they have finished an epoch, from
            any thread.

    Returns:
        For each set its trained networks, in evaluation mode on `device`.

    Raises:
        TypeError, ValueError: sets, labels or numbers that do not fit, before any work.
        NotFinite: a loss was not finite; the message names the network and the epoch.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an integer of at least 1, got {count!r}")
    check_sets(sets, dataset)
    device = torch.device(device)
    members = [_Member(place, number) for place in range(len(sets)) for number in range(count)]
    images, targets = _joined(sets, dataset, dtype, device)

    def built(member: _Member) -> nets.Network:
        random = member.generator(seed, "weights")
        if protocol.start is not None:
            random = fixed_network(protocol.start[0], member.number % protocol.start[1])
        shape = (dataset.channels, dataset.num_classes, dataset.size)
        net = nets.build(model, *shape)
        if protocol.weights == "wide":
            nets.initialise_wide(net, random)
        else:
            draw_weights(net, random, protocol.weights)
        return net.to(device, dtype)

    batch = min(protocol.batch, images.shape[1])
    stack = stack_size(built(members[0]), images.shape[2:], batch, at_once, len(members))
    groups = evenly(members, max(1, stack))
    stop = threading.Event()

    def job(group: list[_Member]) -> list[nets.Network]:
        return _train(
            [built(member) for member in group],
            group,
            images,
            targets,
            dataset,
            protocol,
            seed,
            stack > 0,
            stop,
            on_progress,
        )

    # Two threads with a stack each are twice as fast as one; two threads inside each operation on
    # these small tensors gain a fifth at best, and many times slower when the cores are busy.
    cores = torch.get_num_threads()
    workers = min(cores, len(groups)) if device.type == "cpu" else 1
    found = shared_out(job, groups, stop, workers, 1 if stack else cores // workers)
    trained = [net for group in found for net in group]
    return [trained[start : start + count] for start in range(0, len(trained), count)]


def accuracy(net: nn.Module, dataset: Dataset, chunk: int = 500) -> float:
    """The share of the data set's test images that a network gets right, from 0 to 1.

    Args:
        net: in evaluation mode, on any device and of any floating-point type.
        dataset: its test images are normalised on the fly.
        chunk: images at a time.

    Raises:
        NotFinite: a logit is not finite, from which no class can be read.
    """
    parameter = next(net.parameters())
    right = 0
    with torch.no_grad():
        for start in range(0, len(dataset.test_labels), chunk):
            pixels = dataset.test_images[start : start + chunk].to(parameter.device)
            logits = net(dataset.normalised(pixels, parameter.dtype))
            if not torch.isfinite(logits).all():
                raise NotFinite("the logits of the test images are not finite")
            labels = dataset.test_labels[start : start + chunk].to(parameter.device)
            right += int((logits.argmax(1) == labels).sum())
    return right / len(dataset.test_labels)


def check_sets(sets: Sequence[TrainingSet], dataset: Dataset) -> None:
    """Raise unless `train_networks` can train on these sets together."""
    if not sets:
        raise ValueError("sets is empty: there is nothing to train on")
    expected = (dataset.channels, *dataset.size)
    for place, (images, labels) in enumerate(sets):
        what = f"images of set {place}"
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise TypeError(f"set {place} must be a pair of tensors")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"{what} must be uint8 or floating-point, got {images.dtype}")
        if images.dim() != 4 or images.shape[1:] != expected or not len(images):
            raise ValueError(
                f"{what} must have shape (N, {', '.join(map(str, expected))}) for "
                f"{dataset.name}, got {tuple(images.shape)}"
            )
        if images.is_floating_point() and not torch.isfinite(images).all():
            raise ValueError(f"{what} have pixels that are not finite")
        if labels.is_floating_point():
            if labels.shape != (len(images), dataset.num_classes):
                raise ValueError(
                    f"soft labels of set {place} must have shape "
                    f"{(len(images), dataset.num_classes)}, got {tuple(labels.shape)}"
                )
            if not torch.isfinite(labels).all():
                raise ValueError(f"soft labels of set {place} are not finite")
        else:
            check_labels(labels, dataset.num_classes, f"labels of set {place}")
            if len(labels) != len(images):
                raise ValueError(
                    f"images and labels of set {place} differ in length: "
                    f"{len(images)} and {len(labels)}"
                )
    if len({len(images) for images, _ in sets}) > 1:
        raise ValueError(
            "sets must be of one size to be trained on together, got "
            f"{[len(images) for images, _ in sets]} images"
        )
    if len({labels.is_floating_point() for _, labels in sets}) > 1:
        raise ValueError("sets must all have hard labels or all have soft ones")


def _joined(
    sets: Sequence[TrainingSet], dataset: Dataset, dtype: torch.dtype, device: torch.device
) -> TrainingSet:
    """All sets as `(sets, N, ...)`: uint8 if all are (normalised batch by batch), else `dtype`."""
    as_pixels = all(images.dtype == torch.uint8 for images, _ in sets)

    def ready(images: Tensor) -> Tensor:
        images = images.detach().to(device)
        if as_pixels:
            return images
        if images.dtype == torch.uint8:
            return dataset.normalised(images, dtype)
        return images.to(dtype)

    def stacked(tensors: list[Tensor]) -> Tensor:  # a single set, maybe a large one, is not copied
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    targets = stacked([labels.detach().to(device) for _, labels in sets])
    if targets.is_floating_point():
        targets = targets.to(dtype)
    return stacked([ready(images) for images, _ in sets]), targets


def _train(
    group_nets: list[nets.Network],
    group: list[_Member],
    images: Tensor,
    targets: Tensor,
    dataset: Dataset,
    protocol: Protocol,
    seed: int,
    stacked: bool,
    stop: threading.Event,
    on_progress: Callable[[int], None] | None,
) -> list[nets.Network]:
    """Train networks of one architecture side by side, each with random numbers of its own."""
    group_nets[0].train()
    networks, count = len(group), images.shape[1]
    weights = SideBySide(group_nets, stacked)
    flat = weights.flat
    orders = [member.generator(seed, "order") for member in group]
    augment = _augmentation(protocol, [member.generator(seed, "augmentation") for member in group])
    mixing = [member.generator(seed, "cutmix") for member in group]
    first = torch.tensor([member.place * count for member in group]).unsqueeze(1)
    images, targets = images.flatten(0, 1), targets.flatten(0, 1)
    if protocol.rates:
        _by_rates(protocol, weights, first, images, targets, dataset, group, count)
        weights.copy_to(group_nets)
        return [each.eval() for each in group_nets]
    start = None
    if protocol.loss != "cross_entropy":
        targets = squares.targets(targets, dataset.num_classes, flat.dtype, protocol)
    rates = largest_rates(weights, dataset, seed) if protocol.of_largest else None
    if protocol.from_start:
        start = SideBySide(group_nets, stacked)
        begun = [copy.deepcopy(net) for net in group_nets]

    def loss_of(predicted: Tensor, wanted: Tensor) -> Tensor:
        if protocol.loss != "cross_entropy":
            return squares.losses(predicted, wanted, protocol)
        return cross_entropies(predicted, wanted)

    optimiser = _optimiser(protocol, flat)
    lr, done, steps = protocol.lr, 0, protocol.steps(count)
    for epoch in range(protocol.passes):
        order = first + torch.stack([torch.randperm(count, generator=g) for g in orders])
        total = flat.new_zeros(networks)
        for begin in range(0, count, protocol.batch):
            if stop.is_set():
                return group_nets
            where = order[:, begin : begin + protocol.batch].to(images.device)
            x = images[where.flatten()]
            if x.dtype == torch.uint8:
                x = dataset.normalised(x, flat.dtype)
            x = augment(x.unflatten(0, where.shape))
            if protocol.cutmix:
                x, partner, share = cutmix(x, mixing, protocol.cutmix)
            predicted = weights.logits(x)
            if start is not None:
                with torch.no_grad():
                    before = start.logits(x)
                predicted = predicted - before
            losses = loss_of(predicted, targets[where.flatten()])
            if protocol.cutmix:
                others = loss_of(predicted, targets[where.gather(1, partner).flatten()])
                losses = share * losses + (1 - share) * others
            gradient = weights.gradient(losses)
            with torch.no_grad():
                total += losses
                if start is not None:
                    gradient.add_(flat - start.flat, alpha=2 * protocol.weight_decay)
                if rates is not None:  # momentum and all then are in units of each network's rate
                    gradient.add_(flat, alpha=protocol.weight_decay).mul_(rates)
                optimiser.step(gradient, lr * protocol.share(done, steps))
            done += 1
        _check_losses(total, group, epoch, protocol)
        if protocol.decay(epoch) != 1:
            lr *= protocol.decay(epoch)
            if protocol.schedule == "dc":
                optimiser = _optimiser(protocol, flat)
        if on_progress is not None:
            on_progress(networks)
    weights.copy_to(group_nets)
    if start is not None:
        return [
            squares.Learned(net, old).eval() for net, old in zip(group_nets, begun, strict=True)
        ]
    return [each.eval() for each in group_nets]


def _by_rates(
    protocol: Protocol,
    weights: SideBySide,
    first: Tensor,
    images: Tensor,
    targets: Tensor,
    dataset: Dataset,
    group: Sequence[_Member],
    count: int,
) -> None:
    """Plain SGD with a rate for each step, on groups of images that take turns."""
    rows = group_rows(count // dataset.num_classes, dataset.num_classes, protocol.groups)
    for number, rate in enumerate(protocol.rates):
        where = (first + rows[number % protocol.groups]).to(images.device)
        x = images[where.flatten()]
        if x.dtype == torch.uint8:
            x = dataset.normalised(x, weights.flat.dtype)
        predicted = weights.logits(x.unflatten(0, where.shape))
        losses = cross_entropies(predicted, targets[where.flatten()])
        gradient = weights.gradient(losses)
        with torch.no_grad():
            _check_losses(losses, group, number // protocol.groups, protocol)
            weights.flat.sub_(gradient, alpha=rate)


def _optimiser(protocol: Protocol, weights: Tensor) -> SGD | AdamW:
    """The protocol's, as new."""
    if protocol.optimiser == "adamw":
        return AdamW(weights, protocol.momentum, protocol.weight_decay)
    decay = 0.0 if protocol.from_start or protocol.of_largest else protocol.weight_decay
    return SGD(weights, protocol.momentum, decay)


def _augmentation(
    protocol: Protocol, generators: Sequence[torch.Generator]
) -> Callable[[Tensor], Tensor]:
    """What is done to a batch `(networks, n, channels, H, W)`; a generator for each network."""
    if protocol.augmentation in ("dsa", "idc"):
        dsa = DSA(protocol.strategy, mode="S" if protocol.augmentation == "dsa" else "C")
        return lambda x: augmented(dsa, x, generators)
    if protocol.augmentation == "dc":
        return lambda x: torch.stack(
            [
                dc_augment(each, protocol.strategy, random)
                for each, random in zip(x, generators, strict=True)
            ]
        )
    return lambda x: x


def _check_losses(total: Tensor, group: Sequence[_Member], epoch: int, protocol: Protocol) -> None:
    finite = torch.isfinite(total)
    if not finite.all():
        member = group[int((~finite).nonzero()[0])]
        raise NotFinite(
            f"the loss of network {member.number} on set {member.place} is not finite in epoch "
            f"{epoch} of {protocol.epochs}; a learning rate below {protocol.lr:g} may help"
        )
