"""One epoch of several experts side by side: plain SGD, or FTD's flatness-seeking GSAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.data.whitening import Recipe
from ddfast.evaluate.side_by_side import SGD, SideBySide, augmented, cross_entropies
from ddfast.methods.config import DIGITS_MODEL, ZCA_HELP, Task, convnet_of, dsa_strategy, setting
from ddfast.random import generator


@dataclass(frozen=True, kw_only=True)
class Config(Task):
    """How experts are trained, by default as MTT's buffer.py does; flags as there."""

    model: str = setting("network to train (ConvNet, one block more for each doubling from 32 px)")
    num_experts: int = setting("networks to train", least=1)
    max_start_epoch: int = setting("distillation begins at epochs below this one", least=1)
    expert_epochs: int = setting("epochs from there to the target", least=1)
    train_epochs: int = setting("epochs to train (max_start_epoch + expert_epochs - 1)", least=1)
    lr_teacher: float = setting("learning rate", above=0)
    mom: float = setting("momentum", 0.0, least=0, below=1)
    l2: float = setting("weight decay", 0.0, least=0)
    batch_train: int = setting("images of a step; the last batch may be smaller", least=1)
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    decay: bool = setting("a tenth of the learning rate from half of the epochs on", False)
    optimiser: Literal["sgd", "gsam"] = setting("gsam: FTD's, two gradients a step", "sgd")
    rho: float = setting("gsam: size of the perturbation", 0.01, aliases=("rho_max",), above=0)
    alpha: float = setting("gsam: weight of the gradient's orthogonal part", 0.3, least=0)
    zca: Recipe = setting(f"{ZCA_HELP}; the methods take it over", "none")
    adaptive: bool = setting("gsam: perturb each weight by its square", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.dsa_strategy)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """100 experts, lr_teacher 0.01, batches of 256, DSA, max_start_epoch 20, expert_epochs 2.

        Of their 50 epochs only those are trained that are read. For digits 20 experts, batches of
        32 and max_start_epoch 8: with 256 an epoch of their 1437 images would be six steps.
        """
        digits = dataset.name == "digits"
        start, epochs = self.max_start_epoch or (8 if digits else 20), self.expert_epochs or 2
        return {
            "model": DIGITS_MODEL if digits else convnet_of(dataset.size),
            "num_experts": 20 if digits else 100,
            "max_start_epoch": start,
            "expert_epochs": epochs,
            "train_epochs": start + epochs - 1,
            "lr_teacher": 0.01,
            "batch_train": 32 if digits else 256,
            "dsa_strategy": dsa_strategy(dataset),
        }


class Group:
    """Some experts on their way.

    Args:
        numbers: of the experts.
        weights: their networks' weights.
    """

    def __init__(
        self, config: Config, dataset: Dataset, numbers: Sequence[int], weights: SideBySide
    ) -> None:
        self.config, self.dataset = config, dataset
        self.numbers, self.weights = list(numbers), weights
        self.optimiser = SGD(weights.flat, config.mom, config.l2)
        self.dsa = DSA(config.dsa_strategy)

    def snapshots(self) -> Tensor:
        """(experts, parameters), each in the order of `net.parameters()`."""
        return torch.cat([leaf.detach().flatten(1) for leaf in self.weights.leaves], 1)

    def load(self, snapshots: Tensor) -> None:
        """Put such snapshots into the weights."""
        sizes = [leaf[0].numel() for leaf in self.weights.leaves]
        with torch.no_grad():
            for leaf, part in zip(self.weights.leaves, snapshots.split(sizes, 1), strict=True):
                leaf.copy_(part.view(leaf.shape))

    def epoch(self, epoch: int, images: Tensor, labels: Tensor) -> Tensor:
        """Train one epoch; the mean loss of each expert in it."""
        config, count = self.config, len(labels)
        lr = config.lr_teacher
        if config.decay and epoch > config.train_epochs // 2:
            lr *= 0.1
        order, draws = (
            [generator(config.seed, f"experts: {what}", k, epoch) for k in self.numbers]
            for what in ("order", "augmentation")
        )
        orders = torch.stack([torch.randperm(count, generator=random) for random in order])
        total = self.weights.flat.new_zeros(len(self.numbers))
        for begin in range(0, count, config.batch_train):
            where = orders[:, begin : begin + config.batch_train].to(images.device)
            x = self.dataset.normalised(images[where.flatten()], total.dtype)
            x = augmented(self.dsa, x.unflatten(0, where.shape), draws)
            total += len(where[0]) / count * self.step(x, labels[where.flatten()], lr)
        return total

    def step(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """One optimiser step of each expert; their losses before it."""
        losses, gradient = self.losses(x, y)
        with torch.no_grad():
            if self.config.optimiser == "gsam":
                gradient = self.flat_direction(x, y, gradient)
            self.optimiser.step(gradient, lr)
        return losses

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of each expert, and all gradients."""
        with torch.enable_grad():
            losses = cross_entropies(self.weights.logits(x), y)
            return losses.detach(), self.weights.gradient(losses)

    def flat_direction(self, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        """GSAM's direction (Zhuang et al., ICLR 2022, in FTD's adaptive form).

        With g the gradient at theta, e = rho theta^2 g / | |theta| g | and g' the gradient at
        theta + e, it is g' - alpha times the part of g that is orthogonal to g'.
        """
        theta = self.weights.flat.clone()
        scaled = theta.abs() * gradient if self.config.adaptive else gradient
        e = theta.square() * gradient if self.config.adaptive else gradient.clone()
        e = self.times(e, self.config.rho / (self.dot(scaled, scaled).sqrt() + 1e-12))
        self.weights.flat.add_(e)
        _, moved = self.losses(x, y)
        self.weights.flat.copy_(theta)
        share = self.dot(gradient, moved) / (self.dot(moved, moved) + 1e-12)
        return moved - self.config.alpha * (gradient - self.times(moved, share))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(experts,): inner products of each one's part of two vectors laid out as the weights."""
        parts = (a * b).split(self.weights.sizes)
        return torch.stack([p.view(len(self.numbers), -1).sum(1) for p in parts]).sum(0)

    def times(self, values: Tensor, factors: Tensor) -> Tensor:
        """Each expert's part by a factor of its own."""
        parts = [
            (part.view(len(factors), -1) * factors.unsqueeze(1)).flatten()
            for part in values.split(self.weights.sizes)
        ]
        return torch.cat(parts)
