"""DC: matching the weight gradients of real and synthetic images while a network learns.

Zhao, Mopuri and Bilen, Dataset Condensation with Gradient Matching, ICLR 2021 (arXiv 2006.05929).
Per iteration a fresh network theta goes through `outer_loop` image updates, each on

    L = sum_c D( grad_theta CE(x of class c), grad_theta CE(s of class c) )

with real images x and all synthetic images s of the class, D a sum over output units of 1 - cosine.
Between two image updates theta is trained on the synthetic set for `inner_loop` epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast.data import Dataset
from ddfast.engine import match_gradients, segment_gradients, weight_names
from ddfast.memory import SECOND_ORDER
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.run import Interrupted, Run
from ddfast.nets import Network, has_batchnorm

TITLE = "Dataset Condensation with Gradient Matching (Zhao, Mopuri and Bilen, ICLR 2021)"
MATCHES = "weight gradients of each class, in networks trained on the synthetic set"
PROTOCOL = "dc"

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""ipc: (outer_loop, inner_loop) as published."""

METRICS = {"ours": "row_cosine", "cos": "cosine", "mse": "mse"}

BATCHNORM_IMAGES = 16  # real images of each class that set the running statistics


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of DC, by default those of the paper and its code."""

    dis_metric: Literal["ours", "cos", "mse"] = setting(
        "distance of gradients: ours (cosine per output unit), cos (one cosine) or mse", "ours"
    )
    outer_loop: int = setting("image updates per network (published: ipc)", least=1)
    inner_loop: int = setting(
        "epochs of network training between two image updates (published: 500 / ipc, about)",
        least=0,
    )
    lr_net: float = setting("learning rate of the network training", 0.01, above=0)
    batch_train: int = setting("batch size of the network training", 256, least=1)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """1001 iterations from noise, lr_img 0.1 (0.01 for MLP), loops by ipc.

        An ipc without published loops has outer_loop = ipc and inner_loop = 500 // ipc, at least 1,
        which meets the published 10, 20 and 50.
        """
        outer, inner = loops(self.ipc)
        return {
            **super().published(dataset),
            "iterations": 1001,
            "init": "noise",
            "lr_img": 0.01 if self.model == "MLP" else 0.1,
            "outer_loop": outer,
            "inner_loop": inner,
        }


def loops(ipc: int) -> tuple[int, int]:
    """outer_loop and inner_loop for so many images per class."""
    return LOOPS.get(ipc, (ipc, max(1, 500 // ipc)))


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: not even one synthetic image fits into the memory.
    """
    run.at_once(2 * SECOND_ORDER)


def step(run: Run) -> Tensor:
    """`outer_loop` updates of the images. Returns each class's mean distance, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    net = run.fresh_net()
    optimiser = torch.optim.SGD(net.parameters(), lr=config.lr_net)
    total = torch.zeros(run.sampler.num_classes, dtype=run.dtype, device=run.device)
    for outer in range(config.outer_loop):
        if has_batchnorm(net):
            _freeze_statistics(run, net, outer)
        gradients, losses = match(run, net, outer)
        run.update(gradients, losses, f", image update {outer + 1} of {config.outer_loop}")
        total += losses
        if outer + 1 < config.outer_loop:
            train(run, net, optimiser, outer)
    return total / config.outer_loop


def match(run: Run, net: Network, outer: int) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by what is learned, and the distances of all classes, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    metric = METRICS[config.dis_metric]
    # Biases and norm layers do not count in row_cosine: their gradients need not be computed.
    names = weight_names(net, "matrices" if metric == "row_cosine" else "all")
    indices, counts = run.sampler.sample_all(config.batch_real, run.generator("real images", outer))
    positions = indices.split(counts)
    gradients, losses = run.no_gradients(), []
    for first, end in class_groups(run, net, names):
        classes = range(first, end)
        # One augmentation for both sides of a class, another for every class.
        draws = [
            run.augment.draw(run.generator("augmentation", outer, c), run.dataset.size)
            for c in classes
        ]
        draw = torch.cat(draws, 1)
        sizes = [counts[c] for c in classes]
        x = run.augment(run.real(torch.cat(positions[first:end])), draw, sizes)
        labels = run.labels.new_tensor(classes).repeat_interleave(run.labels.new_tensor(sizes))
        real = segment_gradients(net, x, labels, sizes, names, run.memory // 2)
        made = run.decoded(first, end)
        s = run.augment(made.images, draw, made.counts)
        distances, by_s = match_gradients(
            *(net, s.detach(), made.labels, made.counts, real, names, metric),
            memory=run.memory // 2,
        )
        run.chain(gradients, made, s, by_s)
        losses.append(distances)
        run.processed += sum(sizes) + len(s)
        if run.stop:
            raise Interrupted
    return gradients, torch.cat(losses)


def class_groups(run: Run, net: Network, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """First and end of groups of classes whose images and gradients fit into half the memory."""
    parameters = dict(net.named_parameters())
    size = run.dtype.itemsize
    image = run.dataset.channels * run.dataset.size[0] * run.dataset.size[1] * size
    matched = sum(parameters[name].numel() for name in names) * size
    # Real images before and after augmentation; gradients of both sides and their derivative.
    each = 2 * (run.config.batch_real + run.decoded_per_class) * image + 3 * matched
    classes, most = run.sampler.num_classes, max(1, run.memory // 2 // each)
    for first in range(0, classes, most):
        yield first, min(first + most, classes)


def train(run: Run, net: Network, optimiser: torch.optim.Optimizer, outer: int) -> None:
    """`inner_loop` epochs on the synthetic set, each image augmented on its own if at all."""
    config = run.config
    assert isinstance(config, Config)
    images, labels = run.training_set()
    random = run.generator("network training", outer)
    for _ in range(config.inner_loop):
        epoch(run, net, optimiser, images, labels, config.batch_train, random)


def epoch(
    run: Run,
    net: Network,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch: int,
    random: torch.Generator,
) -> None:
    """One pass over the synthetic set, as `run.training_set` gives it."""
    net.train()
    order = torch.randperm(len(images), generator=random).to(run.device)
    for chosen in order.split(batch):
        draw = run.augment.draw(random, run.dataset.size, count=len(chosen))
        x = run.augment(images[chosen], draw)
        optimiser.zero_grad()
        cross_entropy(net(x), labels[chosen]).backward()
        optimiser.step()
    run.processed += len(images)
    if run.stop:
        raise Interrupted


def _freeze_statistics(run: Run, net: Network, outer: int) -> None:
    """Batch normalisation as in the official code: statistics from one pass over real images.

    One pass moves a tenth of the way from the initial statistics to those of the images, so that
    after the first update they are mostly the initial ones (the official behaviour, kept).
    """
    indices, _ = run.sampler.sample_all(
        BATCHNORM_IMAGES, run.generator("batch normalisation", outer)
    )
    net.train()
    with torch.no_grad():
        net(run.real(indices))
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
