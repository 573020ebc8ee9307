"""Networks trained on the real images before a run, and those between their beginning and end.

NCFM (and whatever else matches in trained networks) keeps the weights of each network before and
after its training in the run's state, one vector each, and mixes the two:

    theta = l theta_initial + (1 - l) theta_final,    l from 0 to 1
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.augment import DSA
from ddfast.cutmix import cutmix
from ddfast.memory import FORWARD
from ddfast.methods.run import Interrupted, Run
from ddfast.nets import Network
from ddfast.random import generator

INITIAL, FINAL = "initial network {}", "final network {}"
"""Names in `Run.state`."""


def pretrain(
    run: Run,
    count: int,
    epochs: int,
    *,
    batch: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    strategy: str,
    mixed: float,
) -> Iterator[str]:
    """Train the networks that `run.state` lacks, one after the other.

    SGD on permutations of all training images, the last batch of each maybe smaller; the learning
    rate falls to a fifth after two thirds and again after five sixths of the epochs. What a network
    becomes depends on its number and the settings alone.

    Args:
        count: networks in all.
        strategy: augmentations, one draw for each image, see `DSA` mode "C".
        mixed: probability of a batch to be mixed, see `ddfast.cutmix`.

    Yields:
        A line about each network that was trained.

    Raises:
        Interrupted: the run was asked to stop; the network in training is lost.
    """
    for number in range(count):
        if FINAL.format(number) in run.state:
            continue
        net = run.net
        nets.initialise(net, generator(run.config.seed, "pretrained network", number))
        before = flattened(net)
        net.requires_grad_(True)
        optimiser = torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay)
        decay = [2 * epochs // 3, 5 * epochs // 6]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, decay, 0.2)
        random = generator(run.config.seed, "pretraining", number)
        for _ in range(epochs):
            _epoch(run, net, optimiser, batch, strategy, mixed, random)
            schedule.step()
        after = flattened(net)
        found = {INITIAL.format(number): before, FINAL.format(number): after}
        run.state = {**run.state, **found}
        said = "not trained"
        if epochs:
            share = _training_accuracy(run, net)
            said = f"{100 * share:.1f} % of the training images right"
        yield f"network {number + 1} of {count}: {said}"


def _epoch(
    run: Run,
    net: Network,
    optimiser: torch.optim.Optimizer,
    batch: int,
    strategy: str,
    mixed: float,
    random: torch.Generator,
) -> None:
    """Train on every training image once."""
    augment, labels = DSA(strategy, mode="C"), run.dataset.train_labels
    net.train()
    for where in torch.randperm(len(labels), generator=random).split(batch):
        x = run.real(where)
        x = augment(x, augment.draw(random, run.dataset.size, count=len(x)))
        x, partner, share = (each[0] for each in cutmix(x.unsqueeze(0), [random], mixed))
        y = labels[where].to(run.device)
        logits = net(x)
        loss = share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[partner])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        run.processed += len(x)
        if run.stop:
            raise Interrupted


def _training_accuracy(run: Run, net: Network) -> float:
    """Share of the training images that a network gets right."""
    labels, right = run.dataset.train_labels, 0
    net.eval()
    with torch.no_grad():
        for where in torch.arange(len(labels)).split(min(run.at_once(FORWARD), 1024)):
            predicted = net(run.real(where)).argmax(1).cpu()
            right += int((predicted == labels[where]).sum())
    return right / len(labels)


def flattened(net: Network) -> Tensor:
    """All weights of a network in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def set_weights(net: Network, weights: Tensor) -> Network:
    """The network with the weights of a vector, as constants, in training mode."""
    with torch.no_grad():
        sizes = [p.numel() for p in net.parameters()]
        for p, values in zip(net.parameters(), weights.split(sizes), strict=True):
            p.copy_(values.view_as(p))
    return net.requires_grad_(False).train()


def between(run: Run, number: int, share: float) -> Tensor:
    """Weights of a network in the course of its training: `share` 1 at its beginning, 0 at its end.

    On the straight line, that is, not on the way that the training took.
    """
    before, after = run.state[INITIAL.format(number)], run.state[FINAL.format(number)]
    return share * before + (1 - share) * after
