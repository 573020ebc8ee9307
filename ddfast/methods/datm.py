"""DATM: trajectory matching of a window of epochs that fits the size of the set, with soft labels.

Guo, Wang, Cazenavette, Li, Zhang and You, Towards Lossless Dataset Distillation via
Difficulty-Aligned Trajectory Matching, ICLR 2024 (arXiv 2310.05773). The objective is MTT's, see
`ddfast.methods.trajectory_matching`, with these differences:

- The student begins at epochs from `min_start_epoch` on, up to a bound that grows from
  `current_max_start_epoch` to `max_start_epoch` until the iteration `expansion_end_epoch`.
- Labels are logits, learned with `lr_y`; the student's loss is the cross-entropy with their
  softmax. At first they are the mean logits of those experts' last epochs that are right.
- Images are at first real ones that an expert has right (`correct`).
- An iteration whose loss is above `threshold` changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast import nets
from ddfast.data import ClassSampler, Dataset, normalise
from ddfast.experts import Experts, check_experts, open_experts
from ddfast.methods import mtt, trajectory_matching
from ddfast.methods.config import setting
from ddfast.methods.run import Decoded, Run
from ddfast.methods.trajectory_matching import Drawn, pick

TITLE = "DATM: Difficulty-Aligned Trajectory Matching (Guo et al., ICLR 2024)"
MATCHES = "as MTT, a window of epochs, soft labels learned as well"
PROTOCOL = "datm"

NAMES = (
    *("syn_steps", "expert_epochs", "batch_syn", "lr_img", "lr_y"),
    *("min_start_epoch", "current_max_start_epoch", "max_start_epoch", "expansion_end_epoch"),
    *("lr_lr", "threshold"),
)
# The repository's configs.
PUBLISHED: dict[tuple[str, int], Mapping[str, Any]] = {
    key: dict(zip(NAMES, values, strict=True))
    for key, values in {
        ("CIFAR10", 1): (80, 2, 10, 1e2, 5.0, 0, 4, 4, 0, 1e-7, 1.1),
        ("CIFAR10", 10): (80, 2, 100, 1e2, 2.0, 0, 10, 20, 1000, 1e-5, 1.0),
        ("CIFAR10", 50): (80, 2, 500, 1e3, 2.0, 0, 20, 40, 2000, 1e-5, 1.0),
        ("CIFAR10", 500): (40, 2, 1000, 50.0, 10.0, 40, 60, 60, 0, 1e-5, 1.0),
        ("CIFAR10", 1000): (100, 2, 1000, 50.0, 10.0, 40, 60, 60, 0, 1e-5, 1.0),
        ("CIFAR100", 1): (40, 3, 1000, 1e3, 10.0, 0, 10, 20, 1000, 1e-5, 1.0),
        ("CIFAR100", 10): (80, 2, 1000, 1e3, 10.0, 0, 30, 50, 2000, 1e-5, 1.0),
        ("CIFAR100", 50): (80, 2, 1000, 1e3, 10.0, 20, 70, 70, 0, 1e-5, 1.0),
        ("CIFAR100", 100): (80, 2, 1000, 50.0, 10.0, 30, 70, 70, 0, 1e-5, 1.0),
        ("TinyImageNet", 1): (40, 2, 1000, 1e4, 10.0, 0, 15, 20, 2000, 1e-4, 1.0),
        ("TinyImageNet", 10): (40, 2, 500, 1e2, 10.0, 10, 50, 50, 0, 1e-4, 1.0),
        ("TinyImageNet", 50): (20, 2, 500, 1e2, 10.0, 40, 70, 70, 0, 1e-4, 1.0),
    }.items()
}

MOMENTUM_LABELS = 0.9
CHUNK = 500


@dataclass(frozen=True, kw_only=True)
class Config(trajectory_matching.Config):
    """Settings of DATM."""

    beside: ClassVar[tuple[str, ...]] = ("lr", "label_logits")

    lr_y: float = setting("learning rate of the label logits", least=0)
    current_max_start_epoch: int = setting("max_start_epoch of the first iteration", least=1)
    expansion_end_epoch: int = setting("iteration by which it is whole (0: the first)", least=0)
    correct: bool = setting("begin with images that an expert has right", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parametrisation not in (None, "pixels"):
            raise ValueError(
                f"parametrisation: got {self.parametrisation!r}; DATM's labels belong to images"
            )

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """10000 iterations, lr_teacher 0.01 and the repository's settings for data set and ipc.

        For digits MTT's, lr_y 1 and threshold 2, for its short trajectories begin above 1.
        """
        digits = dataset.name == "digits"
        found: Mapping[str, Any] = {"lr_teacher": 0.01, **pick(PUBLISHED, dataset, self.ipc)}
        if digits:
            window = mtt.DIGITS[self.ipc >= 10]
            found = {
                **window,
                "lr_y": 1.0,
                "current_max_start_epoch": window["max_start_epoch"],
                "expansion_end_epoch": 0,
                "threshold": 2.0,
            }
        return {
            **self.shared_settings(dataset),
            **found,
            "iterations": (150 if self.ipc >= 10 else 200) if digits else 10000,
        }

    def start_epochs(self, iteration: int) -> tuple[int, int]:
        """The window; its end grows to max_start_epoch."""
        end = self.max_start_epoch
        if self.expansion_end_epoch:
            grown = (end - self.current_max_start_epoch) * iteration // self.expansion_end_epoch
            end = min(end, self.current_max_start_epoch + grown)
        return self.min_start_epoch, end

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The labels' SGD has momentum 0.9, as published."""
        optimiser = super().optimiser(tensors)
        labels = {"params": [tensors["label_logits"]], "lr": self.lr_y}
        optimiser.add_param_group({**labels, "momentum": MOMENTUM_LABELS})
        return optimiser

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Images and labels as experts see them, and the student's learning rate.

        Raises:
            ValueError: no experts, or of another data set or network.
        """
        tensors, labels = super().starting_set(dataset, generator)
        net = nets.build(self.model, dataset.channels, dataset.num_classes, dataset.size)
        if not self.experts:
            raise ValueError("experts: missing; make some with `ddfast experts`")
        experts = open_experts(self.experts)
        check_experts(experts, dataset, net, self.model)
        if self.correct and self.init == "real":
            places = _right(net, experts, dataset, self.ipc, generator)
            images = dataset.train_images[places]
            tensors["images"] = normalise(images, dataset.mean, dataset.std, torch.float32)
        logits = mean_logits(net, experts, tensors["images"], labels)
        return {**tensors, "label_logits": logits}, labels

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """With the labels, as probabilities."""
        soft = tensors["label_logits"].detach().float().softmax(1)
        return {**super().distilled(tensors, state), "soft_labels": soft}


def check(run: Run) -> None:
    """Refuse what cannot work before the first step, see `trajectory_matching.check`."""
    config = run.config
    assert isinstance(config, Config)
    trajectory_matching.check(run, "DATM")
    if not config.min_start_epoch < config.current_max_start_epoch <= config.max_start_epoch:
        raise ValueError(
            f"current_max_start_epoch: got {config.current_max_start_epoch}, expected more than "
            f"min_start_epoch, {config.min_start_epoch}, and not more than max_start_epoch, "
            f"{config.max_start_epoch}"
        )


def step(run: Run) -> Tensor:
    """One update of images, labels and learning rate. Returns the loss, once for each class."""
    return trajectory_matching.step(run, label_logits)


def label_logits(
    run: Run, made: Decoded, drawn: Drawn, beside: Mapping[str, Tensor]
) -> tuple[Tensor, str]:
    """The labels that are learned."""
    return beside["label_logits"], "logits"


def mean_logits(net: nets.Network, experts: Experts, images: Tensor, labels: Tensor) -> Tensor:
    """Mean over experts that have the image right of their last logits, (N, classes).

    Where none has, the logits of a label that is nearly certain, of the size of the others.
    """
    total = torch.zeros(len(images), net.classifier.out_features)
    count = torch.zeros(len(images), 1)
    for expert in range(experts.num_experts):
        logits = _logits(net, experts.snapshot(expert, experts.epochs), images)
        right = (logits.argmax(1) == labels).unsqueeze(1)
        total += logits * right
        count += right
    mean = total / count.clamp(min=1)
    size = mean.abs().amax() if mean.any() else torch.ones(())
    certain = torch.nn.functional.one_hot(labels, total.shape[1]) * size
    return torch.where(count > 0, mean, certain)


def _right(
    net: nets.Network, experts: Experts, dataset: Dataset, ipc: int, random: torch.Generator
) -> Tensor:
    """Positions of ipc training images of each class that an expert has right, in random order.

    A class with fewer of them is filled up with others.
    """
    expert = int(torch.randint(experts.num_experts, (), generator=random))
    theta = experts.snapshot(expert, experts.epochs)
    sampler, found = ClassSampler(dataset.train_labels, dataset.num_classes), []
    for c, count in enumerate(sampler.counts):
        candidates = sampler.sample(c, count, random)
        right: list[Tensor] = []
        wrong: list[Tensor] = []
        for some in candidates.split(CHUNK):
            x = normalise(dataset.train_images[some], dataset.mean, dataset.std, torch.float32)
            correct = _logits(net, theta, x).argmax(1) == c
            right.append(some[correct])
            wrong.append(some[~correct])
            if sum(map(len, right)) >= ipc:
                break
        found.append(torch.cat([*right, *wrong])[:ipc])
    return torch.cat(found)


def _logits(net: nets.Network, theta: Tensor, images: Tensor) -> Tensor:
    named = dict(net.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    weights = {
        name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)
    }
    with torch.no_grad():
        return torch.cat(
            [torch.func.functional_call(net, weights, (x,)) for x in images.split(CHUNK)]
        )
