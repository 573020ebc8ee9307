"""NCFM: matching characteristic functions of features, in networks between two stages of training.

Wang S. et al., Dataset Distillation with Neural Characteristic Function, CVPR 2025 (arXiv
2502.20653). With psi the features before the classifier, each divided by its norm, and for M
frequencies t of every class and step

    phi(t) = mean_i exp(j <t, psi_i>)

    L_c = 300 mean_t sqrt( alpha (|phi_r| - |phi_s|)^2 + beta 2 (|phi_r| |phi_s| - Re phi_r Re phi_s
                                                                - Im phi_r Im phi_s) )

where r are real and s decoded synthetic images of a class, augmented alike: amplitudes and phases;
with alpha = beta it is the root of alpha |phi_r - phi_s|^2. Networks are trained on the real images
beforehand (`prepare`); each iteration takes one of them, and weights on the line from its initial
to its final ones (`ddfast.methods.pretrained`). The images are in [0, 1], where each iteration
clamps them, and stored as IDC stores them. After the matching comes a second update on the
cross-entropy of the synthetic images in the final network (`calib_weight`). AdamW; the learning
rate is halved whenever the loss has not fallen for 500 iterations.

`sampling_net="learned"` draws the frequencies from a network (`ddfast.nets.sampling`), which takes
a step up the same loss for each step of the images down. The released configurations have none:
t ~ N(0, I).

Where the released code differs from its paper, or from what it seems to intend, the default is what
is intended and a switch does as released:

- `real_batches="first"`: the first `batch_real` images of a class, always. Here: others each time,
  drawn from all.
- `step="per_class"`: AdamW makes a step on all images after each class, whose gradient is zero for
  those of the other classes. They move on by their momentum and decay once per class, so the result
  depends on the order of the classes (and there on how many GPUs share them). Here: one step.
- `sampling_net="released"`: its gradient cancels itself, so it never learns, and it makes four
  distinct frequencies.

Not emulated: decoded images come from a thread that runs up to ten class steps ahead of the
updates, so how stale they are depends on the machine's speed. Not offered: features of several
layers for networks with more than 5 blocks, which in the released code call what no network of it
has, and soft labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.methods.characteristic import Sampling, distances, held, start_sampling
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.feature_matching import (
    Group,
    RealBatch,
    Statistic,
    check_memory,
    cross_entropy_by_features,
    sweep,
)
from ddfast.methods.idc import LEAST_CELL, kin
from ddfast.methods.pretrained import FINAL, between, pretrain, set_weights
from ddfast.methods.run import Run, refuse_batchnorm
from ddfast.nets import Network

TITLE = "Dataset Distillation with Neural Characteristic Function (Wang et al., CVPR 2025)"
MATCHES = "characteristic functions of each class's features, in networks partly trained"
PROTOCOL = "ncfm"

PATIENCE, FACTOR, THRESHOLD = 500, 0.5, 1e-4
"""Iterations without a loss lower by a share of 1e-4, after which the learning rate is halved."""

PLATEAU = "plateau"
"""In `Run.state`: lowest loss, iterations since then, and what the learning rate has fallen to."""


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of NCFM, by default those of the released configurations."""

    space: ClassVar[str] = "pixel"

    batch_real: int = setting("real images per class and step (1024)", least=1)
    momentum: float = setting("of the synthetic images: AdamW's first beta", 0.9, least=0, below=1)
    weight_decay: float = setting("AdamW's, of the synthetic images", 5e-4, least=0)
    num_freqs: int = setting("frequencies of each class and step (4096)", least=1)
    alpha: float = setting("weight of the amplitudes", 0.5, aliases=("alpha_for_loss",), least=0)
    beta: float = setting("weight of the phases", 0.5, aliases=("beta_for_loss",), least=0)
    calib_weight: float = setting("weight of the cross-entropy; 0: no such update", 1.0, least=0)
    real_batches: Literal["all", "first"] = setting(
        "real batches from all images of a class, or its first ones always, as released", "all"
    )
    step: Literal["joint", "per_class"] = setting(
        "optimiser steps: joint, or one after each class as released", "joint"
    )
    sampling_net: Literal["none", "learned", "released"] = setting(
        "what the frequencies come from: none (normal), learned, or released (never learns)", "none"
    )
    lr_sampling_net: float = setting("its learning rate", 1e-3, above=0)
    momentum_sampling_net: float = setting("its momentum", 0.5, least=0, below=1)
    aug_type: str = setting("augmentations in matching, joined by _, or none", "color_crop_cutout")
    num_premodel: int = setting("networks that are trained beforehand (20)", least=1)
    pretrain_epochs: int = setting(
        "epochs of their training (60)", aliases=("pertrain_epochs",), least=0
    )
    cutmix: float = setting(
        "probability that a batch of that training is mixed; with 0, aug_type's cutout is in it",
        0.5,
        aliases=("mix_p",),
        least=0,
    )
    lr_net: float = setting("learning rate of that training", 0.01, above=0)
    momentum_net: float = setting("its momentum", 0.9, least=0, below=1)
    weight_decay_net: float = setting("its weight decay", 5e-4, least=0)
    batch_train: int = setting("its batch size", 128, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutmix > 1:
            raise ValueError(f"cutmix: got {self.cutmix}, expected a probability")
        if self.alpha == self.beta == 0:
            raise ValueError("alpha, beta: got 0 for both, expected one of them above")
        DSA(self.aug_type)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """20000 iterations with 20 networks of 60 epochs (ImageNet: 80); multi_formation with
        factor 2, lr_img 0.001, 1024 real images and 4096 frequencies for every data set and ipc.

        Images whose cells would be less than 8 pixels wide are not divided, as in IDC. Digits have
        300 iterations with 10 networks of 30 epochs, lr_img 0.01 and 1024 frequencies.
        """
        imagenet = kin(dataset) == "ImageNet"
        storage = self.parametrisation or "multi_formation"
        return {
            **super().published(dataset),
            "parametrisation": "multi_formation",
            "iterations": 20000,
            "factor": 2 if min(dataset.size) // 2 >= LEAST_CELL else 1,
            "init": "mix" if storage == "multi_formation" else "real",
            "lr_img": 1e-3,
            "batch_real": 1024,
            "num_freqs": 4096,
            "num_premodel": 20,
            "pretrain_epochs": 80 if imagenet else 60,
            **(DIGITS if dataset.name == "digits" else {}),
        }

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameter_groups(tensors),
            self.lr_img,
            betas=(self.momentum, 0.999),
            weight_decay=self.weight_decay,
        )


DIGITS = {
    "iterations": 300,
    "lr_img": 0.01,
    "num_freqs": 1024,
    "num_premodel": 10,
    "pretrain_epochs": 30,
}
"""For scikit-learn's digits: networks that train in half a minute on one core, the frequencies of
the paper's text. On a split of the training images lr_img 0.01 had 92.7 % after 100 iterations at
ipc 1 and 93.5 after 300, and 0.03 had 92.9 and 91.1 (standard deviations 0.5 to 1.0)."""


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: batch normalisation; a factor larger than the images; beyond the memory.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, "NCFM", "whose running means are not on the line between two networks")
    if (config.factor or 1) > min(run.dataset.size):
        raise ValueError(f"factor: got {config.factor} for images of {run.dataset.size} pixels")
    check_memory(run, [min(count, config.batch_real) for count in run.sampler.counts])


def prepare(run: Run) -> Iterator[str]:
    """Train the networks, and make the sampling network."""
    config = run.config
    assert isinstance(config, Config)
    names = config.aug_type.split("_")
    yield from pretrain(
        run,
        config.num_premodel,
        config.pretrain_epochs,
        batch=config.batch_train,
        lr=config.lr_net,
        momentum=config.momentum_net,
        weight_decay=config.weight_decay_net,
        strategy="_".join(name for name in names if name != "cutout" or not config.cutmix),
        mixed=config.cutmix,
    )
    run.state = {**run.state, **start_sampling(run, config.sampling_net)}


def step(run: Run) -> Tensor:
    """One update by matching and one by calibration. Returns each class's loss, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    plateau = run.state.get(PLATEAU, torch.tensor([float("inf"), 0, 1], dtype=torch.float64))
    base = config.parameter_groups(run.tensors)
    for group, published in zip(run.optimiser.param_groups, base, strict=True):
        group["lr"] = published["lr"] * plateau[2].item()
    if config.parametrisation in ("pixels", "multi_formation"):
        with torch.no_grad():
            run.images.clamp_(0, 1)

    random = run.generator("network")
    number = int(torch.randint(config.num_premodel, (), generator=random))
    share = float(torch.rand((), generator=random, dtype=torch.float64))
    sampling = Sampling(
        run,
        config.sampling_net,
        config.num_freqs,
        config.lr_sampling_net,
        config.momentum_sampling_net,
    )
    net = set_weights(run.net, between(run, number, share))
    statistic = partial(distances, sampling=sampling, alpha=config.alpha, beta=config.beta)
    losses = update(run, net, real_batch(run), statistic, "", sampling)
    if config.calib_weight:
        net = set_weights(run.net, run.state[FINAL.format(number)])
        real = RealBatch(torch.empty(0, dtype=torch.int64), [], _draw(run, "calibration"))
        losses = losses + update(run, net, real, calibration, " (calibration)")
    now = after_loss(plateau, losses.mean().item(), config.lr_img)
    run.state = {**run.state, PLATEAU: now, **sampling.state()}
    return losses


def update(
    run: Run,
    net: Network,
    real: RealBatch,
    statistic: Statistic,
    moment: str,
    sampling: Sampling | None = None,
) -> Tensor:
    """Match every class, and make the optimiser steps. Returns the losses, (num_classes,)."""
    config, classes = run.config, run.dataset.num_classes
    assert isinstance(config, Config)
    each = 1 if config.step == "per_class" else classes
    total = run.tensors[run.rows].new_zeros(classes)
    numbers = 0 if sampling is None else held(run, sampling, config.batch_real)
    for first in range(0, classes, each):
        here = first, first + each
        gradients, losses = sweep(run, net, real, statistic, held=numbers, classes=here)
        of_all = torch.zeros_like(total)  # so that an error names the right class
        of_all[first : first + each] = losses
        run.update(gradients, of_all, moment)
        total += of_all
        if sampling is not None:
            sampling.ascend()
    return total


def real_batch(run: Run) -> RealBatch:
    """`batch_real` images of every class, and the same augmentation for both sides of a class."""
    config = run.config
    assert isinstance(config, Config)
    if config.real_batches == "all":
        random = run.generator("real images")
        indices, counts = run.sampler.sample_all(config.batch_real, random)
    else:
        every = range(run.dataset.num_classes)
        chosen = [run.sampler.indices(c)[: config.batch_real] for c in every]
        indices, counts = torch.cat(chosen), [len(each) for each in chosen]
    return RealBatch(indices, counts, _draw(run, "augmentation"))


def calibration(group: Group) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each class's synthetic images, times `calib_weight`."""
    config, counts = group.run.config, group.made.counts
    assert isinstance(config, Config)
    losses, by_rows, _ = cross_entropy_by_features(group.net, group.features, group.made.labels)
    share = config.calib_weight / counts[0]
    return share * losses.view(len(counts), -1).sum(1), share * by_rows


def after_loss(plateau: Tensor, loss: float, lr: float) -> Tensor:
    """What `PLATEAU` is after an iteration: torch's ReduceLROnPlateau(factor=0.5, patience=500).

    Args:
        lr: that of the beginning; one below 1e-8 is not halved.
    """
    lowest, waited, scale = plateau.tolist()
    if loss < lowest * (1 - THRESHOLD):
        lowest, waited = loss, 0
    else:
        waited += 1
    if waited > PATIENCE:
        waited = 0
        if lr * scale * (1 - FACTOR) > 1e-8:
            scale *= FACTOR
    return torch.tensor([lowest, waited, scale], dtype=torch.float64)


def _draw(run: Run, purpose: str) -> Tensor:
    """Parameters of the augmentation, the same for all images of a class."""
    config = run.config
    assert isinstance(config, Config)
    return DSA(config.aug_type, mode="C").draw(
        run.generator(purpose),
        run.dataset.size,
        count=run.dataset.num_classes,
        independent=True,
    )
