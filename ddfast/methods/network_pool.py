"""A pool of networks that learn the synthetic set while it is made.

As FRePo has it (Zhou et al., NeurIPS 2022, algorithm 1): of `pool_size` networks one, drawn at
random, serves an iteration. It then makes one step of Adam on the synthetic set, or begins anew if
it has been through more than `max_online_updates`. At the start all are fresh, but their counts are
staggered, so that they do not begin anew together.

Everything lives in `run.state`, replaced and never written in place:

    pool.<slot>.weights, .mean, .square     (P,): parameters and Adam's means
    pool.<slot>.buffer.<name>               of batch normalisation
    pool.counts                             (pool_size, 2) int64: updates as counted for beginning
                                            anew, and steps that Adam has made
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast import nets
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.pretrained import flattened, set_weights
from ddfast.methods.run import Diverged, Run
from ddfast.nets import Network
from ddfast.random import generator
from ddfast.unroll import Adam

COUNTS = "pool.counts"
VECTORS = "weights", "mean", "square"  # Adam's state
ADAM = Adam()


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """The settings of a pool, for a method's config to inherit."""

    pool_size: int = setting("networks in the pool", 10, aliases=("num_nn_state",), least=1)
    max_online_updates: int = setting("steps after which a network begins anew", 100, least=0)
    lr_net: float = setting("learning rate of the networks (Adam)", 3e-4, above=0)


def begin(run: Run) -> tuple[dict[str, Tensor], int]:
    """The state as this iteration finds it, a mapping of its own, and the slot that serves it."""
    config, state = run.config, dict(run.state)
    assert isinstance(config, Config)
    size = config.pool_size
    if COUNTS not in state:
        stagger = config.max_online_updates // size * torch.arange(size)
        state[COUNTS] = torch.stack([stagger, torch.zeros_like(stagger)], 1)
        for slot in range(size):
            _fresh(run, state, slot, generator(config.seed, "pool network", slot))
    slot = int(torch.randint(size, (), generator=run.generator("pool")))
    return state, slot


def _fresh(run: Run, state: dict[str, Tensor], slot: int, random: torch.Generator) -> None:
    """Draw the network of a slot anew."""
    nets.initialise(run.net, random)
    _keep(state, slot, ADAM.begin(flattened(run.net)))
    _keep_buffers(run, state, slot)


def _keep(state: dict[str, Tensor], slot: int, of_adam: tuple[Tensor, ...]) -> None:
    for name, vector in zip(VECTORS, of_adam, strict=True):
        state[f"pool.{slot}.{name}"] = vector


def _keep_buffers(run: Run, state: dict[str, Tensor], slot: int) -> None:
    for name, buffer in run.net.named_buffers():
        state[f"pool.{slot}.buffer.{name}"] = buffer.detach().clone()


@torch.no_grad()
def load(run: Run, state: dict[str, Tensor], slot: int) -> Network:
    """The run's network with the weights of a slot, in evaluation mode."""
    set_weights(run.net, state[f"pool.{slot}.weights"])
    for name, buffer in run.net.named_buffers():
        buffer.copy_(state[f"pool.{slot}.buffer.{name}"])
    return run.net.eval()


def update(
    run: Run, state: dict[str, Tensor], slot: int, loss_of: Callable[[Network], Tensor]
) -> None:
    """One step of a slot's network on its loss, in training mode, or a fresh network in its place.

    Args:
        state: what `begin` returned; gets the new weights, means and counts.
        loss_of: of a network, 0-d.

    Raises:
        Diverged: the weights are no longer finite.
    """
    config = run.config
    assert isinstance(config, Config)
    counts = state[COUNTS].clone()
    updates, steps = counts[slot].tolist()
    if updates > config.max_online_updates:
        _fresh(run, state, slot, run.generator("pool network"))
        counts[slot] = 0
        state[COUNTS] = counts
        return
    net = load(run, state, slot).train().requires_grad_()
    found = torch.autograd.grad(loss_of(net), list(net.parameters()))
    with torch.no_grad():
        g = torch.cat([each.reshape(-1) for each in found])
        before = tuple(state[f"pool.{slot}.{name}"] for name in VECTORS)
        after = ADAM.step(before, g, g.new_tensor(config.lr_net), steps)
    if not torch.isfinite(after[0]).all():
        raise Diverged(
            f"the weights of network {slot} of the pool are not finite after its step at iteration "
            f"{run.iteration}; a smaller lr_net (now {config.lr_net:g}) may help"
        )
    _keep(state, slot, after)
    _keep_buffers(run, state, slot)
    net.eval()
    counts[slot] = torch.tensor([updates + 1, steps + 1])
    state[COUNTS] = counts
