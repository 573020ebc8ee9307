"""A method of one's own, in 40 lines: docs/your-own-method.md explains it.

ddfast distill moments --plugin examples/moments.py --dataset digits --ipc 10 --out runs/moments
"""

from dataclasses import dataclass

import torch

from ddfast import methods
from ddfast.losses import class_mean
from ddfast.methods import dm
from ddfast.methods.feature_matching import check_memory, sweep


@dataclass(frozen=True, kw_only=True)
class Config(dm.Config):
    """DM's settings and one more."""

    weight: float = methods.setting("of the mean squares beside the means", 1.0, least=0)


def moments(features, counts, weight):
    """Means of the features of each class, and of their squares: (classes, 2 width)."""
    return class_mean(torch.cat([features, weight * features.square()], 1), counts)


def distance(group):
    """The losses of some classes, and the gradient of their sum by the synthetic features."""
    weight, syn = group.run.config.weight, group.features.detach().requires_grad_()
    real = moments(group.real_rows(), group.real_counts, weight)
    losses = (moments(syn, group.made.counts, weight) - real).square().sum(1)
    return losses.detach(), torch.autograd.grad(losses.sum(), syn)[0]


def step(run):
    net = run.fresh_net().requires_grad_(False)
    gradients, losses = sweep(run, net, dm.real_batch(run), distance)
    run.update(gradients, losses)
    return losses


def check(run):
    check_memory(run, [min(count, run.config.batch_real) for count in run.sampler.counts])


methods.register("moments", Config, step, check=check, matches="two moments of features")
