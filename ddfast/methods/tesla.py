"""TESLA: trajectory matching whose gradient holds the student's parameters of each step constant.

Cui, Wang, Si and Hsieh, Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory, ICML
2023 (arXiv 2211.10586). The objective is MTT's, see `ddfast.methods.trajectory_matching`. Of its
gradient the paths through later parameters are left out ("frozen"); what is left is not exact, as
the paper says, and at long trajectories and large learning rates far from it. adjoint "exact" costs
as much memory and a few per cent of time more.

Soft labels (`teacher_label`, published for ImageNet): in each iteration the target expert's softmax
of the images as they are, without augmentation and without a gradient; here of the images drawn
only, the official code computes them for all. The set is left with the labels of the last
iteration, and evaluated with them.

The official code multiplies the gradient of the images by one half, by mistake; its lr_img belong
to that, and `half_image_gradient` is on for them by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.memory import FORWARD
from ddfast.methods import mtt, trajectory_matching
from ddfast.methods.config import setting
from ddfast.methods.run import Decoded, Run
from ddfast.methods.trajectory_matching import Drawn, pick

TITLE = "TESLA: Scaling Up to ImageNet-1K with Constant Memory (Cui et al., ICML 2023)"
MATCHES = "as MTT, the parameters of each step held constant"
PROTOCOL = "mtt"

# The repository's examples; for the rest MTT's.
PUBLISHED: dict[tuple[str, int], Mapping[str, Any]] = {
    **mtt.PUBLISHED,
    **{
        key: dict(zip(mtt.NAMES, values, strict=True))
        for key, values in {
            ("CIFAR10", 1): (50, 2, 5, None, 1e3, 1e-7, 1e-2),
            ("CIFAR100", 50): (80, 2, 40, 125, 1e3, 1e-5, 1e-2),
            ("ImageNet-1K", 1): (10, 3, 10, 100, 1e4, 1e-4, 1e-2),
        }.items()
    },
}


@dataclass(frozen=True, kw_only=True)
class Config(trajectory_matching.Config):
    """Settings of TESLA."""

    teacher_label: bool = setting("soft labels from the target expert")
    half_image_gradient: bool = setting("the official code's factor of the images' gradient")

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """10000 iterations and the repository's settings, else MTT's; for 1000 classes ImageNet's.

        For digits MTT's settings, without the factor one half.
        """
        digits = dataset.name == "digits"
        large = dataset.num_classes >= 1000
        if large:
            found: Mapping[str, Any] = PUBLISHED["ImageNet-1K", 1]
        else:
            found = mtt.DIGITS[self.ipc >= 10] if digits else pick(PUBLISHED, dataset, self.ipc)
        return {
            **self.shared_settings(dataset),
            **found,
            "iterations": (150 if self.ipc >= 10 else 200) if digits else 10000,
            "adjoint": "frozen",
            "teacher_label": large,
            "half_image_gradient": not digits and self.adjoint != "graph",
        }


def check(run: Run) -> None:
    """Refuse what cannot work before the first step, see `trajectory_matching.check`."""
    trajectory_matching.check(run, "TESLA")


def step(run: Run) -> Tensor:
    """One update of images and learning rate. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    labels = teacher_labels if config.teacher_label else None
    return trajectory_matching.step(run, labels, half_image_gradient=config.half_image_gradient)


def teacher_labels(
    run: Run, made: Decoded, drawn: Drawn, beside: Mapping[str, Tensor]
) -> tuple[Tensor, str]:
    """Soft labels of the images drawn; at the last iteration of all, kept for the artefact."""
    last = run.iteration == run.config.iterations - 1
    rows = torch.arange(len(made.images), device=run.device)
    if not last:
        rows = torch.cat(drawn.batches).unique()
    names = [name for name, _ in run.net.named_parameters()]
    sizes = [p.numel() for p in run.net.parameters()]
    weights = {
        name: part.view(p.shape)
        for name, part, p in zip(
            names, drawn.target.split(sizes), run.net.parameters(), strict=True
        )
    }
    labels = made.images.new_zeros(len(made.images), run.dataset.num_classes)
    with torch.no_grad():
        for some in rows.split(run.at_once(FORWARD)):
            logits = torch.func.functional_call(run.net, weights, (made.images[some],))
            labels[some] = logits.softmax(1)
    if last:
        run.state = {**run.state, "soft_labels": labels.float()}
    return labels, "probabilities"
