"""CAFE: matching what every block makes of a class, by which real images are told apart, too.

Wang et al., CAFE: Learning to Condense Dataset by Aligning FEatures, CVPR 2022 (arXiv 2203.01531).
Of a ConvNet with D blocks f_1, ..., f_D are the activations before pooling, and f the features
before the classifier: f_D pooled. mu_l and mu are their means over a class, of a batch of real
images x or of all synthetic images s. Per image update

    L = sum_c sum_l w_l | mu_l(x) - mu_l(s) |^2 + (w + 1) | mu(x) - mu(s) |^2
      + 0.01 sum_i CE( logits <f(x_i), mu(s of class c)> over the classes c, y_i )

with the squares summed over all values, and the cross-entropy over all real images. The published
weights belong to D = 3: 0.1, 0.1 and 1 for the blocks and w = 1. The released code counts the last
pooled map once more as the features, hence w + 1. For another depth the last block has 1 and all
blocks before it 0.1.

Schedule. Each iteration draws a network theta. After each image update the accuracy of theta on 128
real images of each class is taken, and the iteration ends once the last ten accuracies lie within
`lambda_1`. Otherwise theta is trained on the synthetic set, epoch by epoch, until its last ten
accuracies differ by more than `lambda_2`. The learning rate of the images is halved at iterations
1200, 1600 and 1800.

Unlike the released code:

- Any number of classes and any size of images; it has 10 and 3x32x32 written into it. CIFAR-100,
  with which it does not run, has its own normalisation here, not that of CIFAR-10.
- Both loops end: after `outer_most` image updates, and `inner_most` epochs. There they do not if
  the accuracy keeps moving, or does not move (a network that is right about all images).
- The window holds accuracies. There the sum is not set back to 0 before the next accuracy is added,
  so that it holds value_t = accuracy_t + value_(t-1) / C; `accumulate="released"` does the same.
  It matters: with ten classes the second value is above the first by a tenth of it, which is beyond
  `lambda_2`, so that the training of theta mostly ends after ten epochs.
- Real images are not back-propagated through, and the network's own cross-entropy on them, which
  has no gradient by the images, is not part of the loss that is logged.

CAFE+DSA is `dsa_strategy`, with the same draw for both sides of a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.engine import features
from ddfast.engine.features import Features
from ddfast.losses import class_mean
from ddfast.methods import dc
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.dm import real_batch
from ddfast.methods.feature_matching import (
    RealBatch,
    add_means,
    at_once,
    check_memory,
    classes_at_once,
    kept,
    mean_distance,
    real_images,
)
from ddfast.methods.run import Decoded, Interrupted, Run
from ddfast.nets import Network, has_batchnorm
from ddfast.nets.convnet import ConvNet

TITLE = "CAFE: Learning to Condense Dataset by Aligning FEatures (Wang et al., CVPR 2022)"
MATCHES = "mean activations of each class in every block, and real images told apart by them"
PROTOCOL = "cafe"

MILESTONES = (1200, 1600, 1800)
WINDOW = 10
WATCHED = 128
"""Real images of each class that an accuracy is taken on."""


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of CAFE, by default those of the paper and its code."""

    dsa_strategy: str = setting("augmentations to draw from, joined by _ (CAFE+DSA), or none")
    first_weight: float = setting("weight of the last pooled map, beside its own 1", 1.0, least=0)
    second_weight: float = setting("weight of the last block before pooling", 1.0, least=0)
    third_weight: float = setting("weight of every block before the last", 0.1, least=0)
    inner_weight: float = setting("weight of the discrimination of real images", 0.01, least=0)
    lambda_1: float = setting("an iteration ends when ten accuracies lie within it", 0.04, least=0)
    lambda_2: float = setting(
        "network training ends when ten accuracies differ by more", 0.03, least=0
    )
    outer_most: int = setting("image updates per network at most", 50, least=1)
    inner_most: int = setting("epochs of network training in between at most", 50, least=1)
    accumulate: Literal["reset", "released"] = setting(
        "released: to each accuracy 1/C of the last value is added, as in the code", "reset"
    )
    lr_net: float = setting("learning rate of the network training", 0.01, above=0)
    batch_train: int = setting("batch size of the network training", 256, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dsa_strategy is not None:
            DSA(self.dsa_strategy)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """2001 iterations from noise, lr_img 0.1, no augmentation.

        An iteration is some 20 image updates and 700 epochs of network training, seconds on one
        core even for digits. They have 12, and lr_img 1, with which fewer iterations do: on a split
        of their training images it had 94.4 % at ipc 10 after 2 (0.1: 91.8, and 93.5 after 4); at
        ipc 1 after 6 lr_img 0.1, 0.5 and 2 had 84.4, 86.2 and 88.3 % (standard deviations about 2),
        after 3 within 0.7 of that.
        """
        few = dataset.name == "digits"
        return {
            **super().published(dataset),
            "iterations": 12 if few else 2001,
            "init": "noise",
            "lr_img": 1.0 if few else 0.1,
            "dsa_strategy": "none",
        }


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: a network without blocks, or with batch normalisation; not even one image fits
            into the memory.
    """
    model = run.config.model
    if not isinstance(run.net, ConvNet):
        raise ValueError(f"model: {model} has no blocks for CAFE to match; only ConvNets have")
    if has_batchnorm(run.net):
        raise ValueError(
            f"model: {model} has batch normalisation, with which the features of an image depend "
            "on the others; CAFE is offered for the other norms"
        )
    check_memory(run, [])


def step(run: Run) -> Tensor:
    """Image updates in one network. Returns each class's mean loss, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    _set_learning_rates(run)
    net = run.fresh_net()
    optimiser = torch.optim.SGD(net.parameters(), lr=config.lr_net)
    total = torch.zeros(run.sampler.num_classes, dtype=run.dtype, device=run.device)
    seen: list[float] = []
    for outer in range(config.outer_most):
        gradients, losses = match(run, net, outer)
        run.update(gradients, losses, f", image update {outer + 1}")
        total += losses
        _watch(run, seen, accuracy(run, net, outer))
        if len(seen) == WINDOW and max(seen) - min(seen) < config.lambda_1:
            break
        if outer + 1 < config.outer_most:
            train(run, net, optimiser, outer)
    return total / (outer + 1)


def _set_learning_rates(run: Run) -> None:
    """From the number of the iteration alone, so that they are right after a resume."""
    halved = 0.5 ** sum(run.iteration >= milestone for milestone in MILESTONES)
    start = run.config.parameter_groups(run.tensors)
    for group, at_first in zip(run.optimiser.param_groups, start, strict=True):
        group["lr"] = halved * at_first["lr"]


def _watch(run: Run, seen: list[float], now: float) -> None:
    """Add an accuracy to the last ones, of which the oldest goes."""
    config = run.config
    assert isinstance(config, Config)
    if config.accumulate == "released" and seen:
        now += seen[-1] / run.sampler.num_classes
    seen.append(now)
    del seen[:-WINDOW]


def accuracy(run: Run, net: Network, *moment: int) -> float:
    """Mean over the classes of the accuracy on real training images."""
    indices, counts = run.sampler.sample_all(WATCHED, run.generator("accuracy", *moment))
    labels = run.dataset.train_labels[indices].to(run.device)
    right, most = [], at_once(run, net, False)
    with torch.no_grad():
        for piece, own in zip(indices.split(most), labels.split(most), strict=True):
            logits = net.classifier(features(net, run.real(piece)).features)
            right.append(logits.argmax(1) == own)
            run.processed += len(piece)
            if run.stop:
                raise Interrupted
    return class_mean(torch.cat(right).double().unsqueeze(1), counts).mean().item()


def train(run: Run, net: Network, optimiser: torch.optim.Optimizer, outer: int) -> None:
    """Epochs on the synthetic set until the accuracy has moved, or `inner_most`."""
    config = run.config
    assert isinstance(config, Config)
    images, labels = run.training_set()
    random = run.generator("network training", outer)
    seen: list[float] = []
    for inner in range(config.inner_most):
        dc.epoch(run, net, optimiser, images, labels, config.batch_train, random)
        _watch(run, seen, accuracy(run, net, outer, inner))
        if len(seen) == WINDOW and max(seen) - min(seen) > config.lambda_2:
            break


# --- the loss ---------------------------------------------------------------------------------


@dataclass
class _Passed:
    """Synthetic images of some classes that have been through the network.

    Attributes:
        made: decoded.
        x: augmented, with a graph to what they are made of.
        found: their features, class means of blocks if asked for, and the way back.
    """

    made: Decoded
    x: Tensor
    found: Features

    def centres(self) -> Tensor:
        """Mean feature of each class."""
        return class_mean(self.found.features, self.made.counts)

    def back(
        self,
        run: Run,
        gradients: dict[str, Tensor],
        by_centres: Tensor,
        by_maps: list[Tensor] | None = None,
    ) -> None:
        """Bring gradients of the class means back to what the images are made of."""
        counts = torch.tensor(self.made.counts, device=by_centres.device)
        each = by_centres / counts.to(by_centres.dtype).unsqueeze(1)
        by_x = self.found.backward(each.repeat_interleave(counts, 0), by_maps)
        run.chain(gradients, self.made, self.x, by_x)


def match(run: Run, net: Network, outer: int) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by what is learned, and the losses of all classes, (num_classes,).

    The discrimination term ties the classes together: its gradient by a class's mean feature is
    known only when all real images have been seen. Where the classes do not fit into the memory
    together, their synthetic images go through the network three times (for all mean features; for
    the distances; for the discrimination), the real ones always once.
    """
    config = run.config
    assert isinstance(config, Config)
    real, classes = real_batch(run, outer), run.dataset.num_classes
    together = classes_at_once(run, net, 3 * _numbers_of_maps(run, net))
    groups = [(c, min(c + together, classes)) for c in range(0, classes, together)]
    whole = _passed(run, net, real, *groups[0]) if len(groups) == 1 else None
    if whole is not None:
        centres = whole.centres()
    else:
        centres = torch.cat([_passed(run, net, real, *g, layers=False).centres() for g in groups])
    gradients, losses = run.no_gradients(), []
    by_all = torch.zeros_like(centres)  # of the discrimination
    for first, end in groups:
        side = whole or _passed(run, net, real, first, end)
        means, maps, entropies, part = _real_side(run, net, real, (first, end), centres)
        by_all += part
        own = centres[first:end]
        distances, by_centres = mean_distance(own, means, [1] * len(own))
        value = config.inner_weight * entropies + (config.first_weight + 1) * distances
        by_centres = (config.first_weight + 1) * by_centres
        by_maps = []
        weights = [config.third_weight] * (len(maps) - 1) + [config.second_weight]
        for weight, of_syn, of_real in zip(weights, side.found.maps, maps, strict=True):
            difference = of_syn - of_real
            value += weight * difference.square().flatten(1).sum(1)
            by_maps.append(2 * weight * difference)
        if end == classes:  # the sum over the real images is complete
            by_centres += config.inner_weight * by_all[first:end]
        side.back(run, gradients, by_centres, by_maps)
        losses.append(value)
        if run.stop:
            raise Interrupted
    for first, end in groups[:-1]:
        side = _passed(run, net, real, first, end, layers=False)
        side.back(run, gradients, config.inner_weight * by_all[first:end])
    return gradients, torch.cat(losses)


def _passed(
    run: Run, net: Network, real: RealBatch, first: int, end: int, layers: bool = True
) -> _Passed:
    made = run.decoded(first, end)
    x = run.augment(run.normalised(made.images), real.draw[:, first:end], made.counts)
    run.processed += len(x)
    return _Passed(made, x, kept(run, net, x.detach(), made.counts if layers else None))


def _real_side(
    run: Run, net: Network, real: RealBatch, classes: tuple[int, int], centres: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """The real images of some classes, seen once, in pieces.

    Args:
        centres: mean features of all classes' synthetic images.

    Returns:
        Of each class the mean feature, the means of all blocks, and the summed cross-entropy of
        telling its images by the centres; and the gradient of the latter's sum by the centres.
    """
    first, end = classes
    counts = real.counts[first:end]
    means, maps = centres.new_zeros(len(counts), centres.shape[1]), list[Tensor]()
    entropies, by_centres = centres.new_zeros(len(counts)), torch.zeros_like(centres)
    with torch.no_grad():
        for images, begin, within in real_images(run, real, first, end, at_once(run, net, False)):
            found = features(net, images, within, layers=True)
            add_means(means, class_mean(found.features, within), begin, within, counts)
            maps = maps or [part.new_zeros(len(counts), *part.shape[1:]) for part in found.maps]
            for total, part in zip(maps, found.maps, strict=True):
                add_means(total, part, begin, within, counts)
            logits = found.features @ centres.T
            sizes = torch.tensor(within, device=logits.device)
            own = torch.arange(len(within), device=logits.device).repeat_interleave(sizes)
            places = torch.arange(len(images), device=logits.device), first + begin + own
            entropy = class_mean((logits.logsumexp(1) - logits[places]).unsqueeze(1), within)
            entropies[begin : begin + len(within)] += sizes * entropy[:, 0]
            by_logits = logits.softmax(1)
            by_logits[places] -= 1
            by_centres += by_logits.T @ found.features
    return means, maps, entropies, by_centres


def _numbers_of_maps(run: Run, net: Network) -> int:
    """Values that the blocks of one image have before pooling."""
    image = torch.zeros(
        (1, run.dataset.channels, *run.dataset.size), dtype=run.dtype, device=run.device
    )
    return sum(part.numel() for part in features(net, image, [1], layers=True).maps)
