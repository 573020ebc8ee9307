"""A queue of networks that live through many iterations of a run and are trained on real images.

As in IDM's released code: the queue starts with three networks; at iteration 0 and from then on
every `net_generate_interval` iterations a fresh one joins, and when there would be more than
`net_num` the oldest leaves. Whoever is chosen is trained for `model_train_steps` steps of SGD, with
the momentum that it was left with. How well it classifies the batches of its training is counted,
and all counts begin anew every `reset_interval` iterations.

Networks are numbered in the order in which they join. Everything lives in `run.state`, replaced and
never written in place:

    queue.<slot>.weight.<parameter>      of network number, slot = number % net_num
    queue.<slot>.momentum.<parameter>    once it has been trained
    queue.accuracy                       (net_num, 2) int64: images classified, and how many right
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.run import Diverged, Interrupted, Run
from ddfast.nets import Network
from ddfast.random import generator

START = 3
"""Networks before the first one joins."""

ACCURACY = "queue.accuracy"


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """The settings of a queue, for a method's config to inherit."""

    net_num: int = setting("networks in the queue at most", least=1)
    net_generate_interval: int = setting("iterations between two new ones", least=1)
    fetch_net_num: int = setting("networks that are trained in an iteration", 2, least=0)
    model_train_steps: int = setting("steps of training, each time", least=0)
    reset_interval: int = setting(
        "iterations until accuracies are counted anew", aliases=("eval_interval",), least=1
    )
    lr_net: float = setting("learning rate of the networks", 0.01, above=0)
    momentum_net: float = setting("their momentum", 0.9, least=0, below=1)
    weight_decay: float = setting("their weight decay", 5e-4, least=0)
    batch_train: int = setting("their batch size", aliases=("trained_bs",), least=1)


def numbers(config: Config, iteration: int) -> range:
    """The networks that are in the queue while an iteration lasts, the oldest first."""
    joined = START + 1 + iteration // config.net_generate_interval
    return range(max(0, joined - config.net_num), joined)


def begin(run: Run) -> dict[str, Tensor]:
    """The state as this iteration finds it: newcomers have joined, counts begin anew if it is time.

    A mapping of its own, for `train` to change and for the step to put into the run at its end.
    """
    config, state = run.config, dict(run.state)
    assert isinstance(config, Config)
    if run.iteration == 0:
        state[ACCURACY] = torch.zeros(config.net_num, 2, dtype=torch.int64, device=run.device)
    elif run.iteration % config.reset_interval == 0:
        state[ACCURACY] = torch.zeros_like(state[ACCURACY])
    before = numbers(config, run.iteration - 1) if run.iteration else range(0)
    for number in numbers(config, run.iteration):
        if number not in before:
            _join(run, state, number)
    return state


def _join(run: Run, state: dict[str, Tensor], number: int) -> None:
    slot = _slot(state, number)
    nets.initialise(run.net, generator(run.config.seed, "queue", number))
    for name, parameter in run.net.named_parameters():
        state[f"queue.{slot}.weight.{name}"] = parameter.detach().clone()
        state.pop(f"queue.{slot}.momentum.{name}", None)
    counted = state[ACCURACY].clone()
    counted[slot] = 0
    state[ACCURACY] = counted


def _slot(state: dict[str, Tensor], number: int) -> int:
    return number % len(state[ACCURACY])


def load(run: Run, state: dict[str, Tensor], number: int) -> Network:
    """The run's network with the weights of one from the queue, in evaluation mode."""
    slot = _slot(state, number)
    with torch.no_grad():
        for name, parameter in run.net.named_parameters():
            parameter.copy_(state[f"queue.{slot}.weight.{name}"])
    return run.net.eval()


def accuracy(state: dict[str, Tensor], number: int) -> float:
    """In percent, on the batches that it was trained on since the last reset; 0 without any."""
    seen, right = state[ACCURACY][_slot(state, number)].tolist()
    return 100 * right / seen if seen else 0.0


def train(run: Run, state: dict[str, Tensor], number: int, turn: int) -> None:
    """Some steps on batches of real images, all different within a batch, without augmentation.

    Args:
        state: what `begin` returned; gets the new weights, momentum and counts.
        turn: tells the batches of the networks that an iteration trains apart.

    Raises:
        Diverged: the weights are no longer finite.
        Interrupted: the run was asked to stop.
    """
    config, slot = run.config, _slot(state, number)
    assert isinstance(config, Config)
    net = load(run, state, number).train()
    optimiser = torch.optim.SGD(
        net.parameters(), config.lr_net, config.momentum_net, weight_decay=config.weight_decay
    )
    for name, parameter in net.named_parameters():
        momentum = state.get(f"queue.{slot}.momentum.{name}")
        if momentum is not None:
            optimiser.state[parameter]["momentum_buffer"] = momentum.clone()
    random = run.generator("network images", turn)
    counted = state[ACCURACY].clone()
    for _ in range(config.model_train_steps):
        order = torch.randperm(len(run.real_images), generator=random)
        positions = order[: config.batch_train]
        labels = run.dataset.train_labels[positions].to(run.device)
        logits = net(run.real(positions))
        optimiser.zero_grad()
        cross_entropy(logits, labels).backward()
        optimiser.step()
        counted[slot, 0] += len(labels)
        counted[slot, 1] += (logits.detach().argmax(1) == labels).sum()
        run.processed += len(labels)
        if run.stop:
            raise Interrupted
    state[ACCURACY] = counted
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise Diverged(
                f"the weights ({name}) of network {number} are not finite after its training at "
                f"iteration {run.iteration}; a smaller lr_net (now {config.lr_net:g}) may help"
            )
        state[f"queue.{slot}.weight.{name}"] = parameter.detach().clone()
        momentum = optimiser.state[parameter].get("momentum_buffer")
        if momentum is not None:
            state[f"queue.{slot}.momentum.{name}"] = momentum.detach().clone()
    optimiser.zero_grad()
