"""LinBa: bases that all classes share and coefficients, by back-propagation through long training.

Deng and Russakovsky, Remember the Past: Distilling Datasets into Addressable Memories for Neural
Networks, NeurIPS 2022 (arXiv 2206.02916). A fresh network is trained for `inner_steps` of SGD with
momentum, each on `batch_per_class` random images of each class; the loss is that of 64 real images
of each class. Images are linear combinations of bases (parametrisation "bases", as many as the
storage of ipc images holds; any other works as well). The gradient of all that is learned is cut to
a norm of 2 (`clip`), and SGD with momentum makes a step.

With b_{i+1} = mu b_i + g_i and theta_{i+1} = theta_i - lr b_{i+1}, the exact gradient is, from
a = dL/dtheta_T and c = 0 backwards,

    c <- c - lr a;    images += d<g_i, c>/d images;    a <- a + H_i c;    c <- mu c

where g_i and H_i are gradient and Hessian of minibatch i at theta_i, a is the derivative of the
loss by theta and c that by b: what b_{i+1} does in its own step, lr a, and in later ones, of which
mu is left after each. It needs the parameters of each step, kept in main memory (`history` "host"),
and one step at a time computed again: see `ddfast.unroll`. One draw of the augmentation serves all
steps and the real images of an iteration.

Unlike the official code: it adds the coefficients' size to the loss of the inner training, where it
has no effect; it is left out. Its `validation_ratio` is read and not used;
`ddfast.data.hold_out` does what it says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.methods import bilevel
from ddfast.methods.bilevel import Training
from ddfast.methods.config import setting
from ddfast.methods.run import Run
from ddfast.unroll import SGD

TITLE = "LinBa: Remember the Past (Deng and Russakovsky, NeurIPS 2022)"
MATCHES = "the loss on real data after long training, by shared bases and coefficients"
PROTOCOL = "linba"


@dataclass(frozen=True, kw_only=True)
class Config(bilevel.Config):
    """Settings of LinBa, by default the official script's."""

    batch_real: int = setting("real images per class of the outer loss", 64, least=1)
    inner_steps: int = setting(
        "steps of the inner training (150)", aliases=("bptt_inner_steps",), least=0
    )
    inner_lr: float = setting("learning rate of the inner training (0.01)", above=0)
    inner_momentum: float = setting("momentum of the inner training", 0.9, least=0, below=1)
    batch_per_class: int = setting(
        "synthetic images per class and inner step (bases 32, pixels 10)",
        aliases=("n_per_c", "compressor_minibatch_size"),
        least=1,
    )
    clip: float = setting("largest norm of the gradient (2)", above=0)
    dsa_strategy: str = setting("augmentations, such as flip_rotate, or none", "none")
    history: Literal["device", "host", "checkpoints"] = setting(
        "where each step's parameters wait: device, host, or checkpoints (only some are kept)",
        "host",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.dsa_strategy)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """500000 iterations of 150 inner steps, bases of Glorot's noise, lr_img 0.1.

        For digits 150 iterations of 30 inner steps from real images: inner_lr 0.02 and lr_img 0.3;
        from ipc 10 on 40 bases of the images' size, 0.03, 1 and clip 20. On a split of their
        training images 79.8 % at ipc 1 after 100, and at ipc 10 94.4 (random selection 93.3; 16
        bases of half the size 80.8, for they are too coarse for 8 pixels).
        """
        digits, large = dataset.name == "digits", self.ipc >= 10
        bases = self.parametrisation in (None, "bases")
        own = digits and large and bases
        return {
            **super().published(dataset),
            "parametrisation": "bases",
            "init": "real" if digits else "noise",
            "iterations": 150 if digits else 500_000,
            "inner_steps": 30 if digits else 150,
            "batch_per_class": 32 if bases and not digits else 10,
            "inner_lr": (0.03 if large else 0.02) if digits else 0.01,
            "lr_img": (1.0 if large else 0.3) if digits else 0.1,
            "clip": 20.0 if digits and large else 2.0,
            **({"shared": 40, "base_scale": 1} if own else {}),
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Noise is uniform with variance 2 / (rows + columns) of each matrix (Glorot), as released:
        of bases and coefficients, or of all images with a row for each."""
        tensors, labels = super().starting_set(dataset, generator)
        if self.init == "noise" and self.parametrisation in ("pixels", "bases"):
            for tensor in tensors.values():
                bound = math.sqrt(6 / (len(tensor) + tensor[0].numel()))
                tensor.uniform_(-bound, bound, generator=generator)
        return tensors, labels


def check(run: Run) -> None:
    """Refuse what cannot work before the first step, see `bilevel.check`."""
    config = run.config
    assert isinstance(config, Config)
    each = min(config.batch_per_class, run.decoded_per_class)
    optimiser = SGD(config.inner_momentum)
    bilevel.check(run, "LinBa", each * run.dataset.num_classes, config.inner_steps, optimiser)


def step(run: Run) -> Tensor:
    """One update of bases and coefficients. Returns the loss, once for each class."""
    config = run.config
    assert isinstance(config, Config)
    made = run.decoded(0, run.dataset.num_classes)
    random = run.generator("real batch")
    real, _ = run.sampler.sample_all(config.batch_real, random)
    draw = run.augment.draw(run.generator("augmentation"), run.dataset.size)
    training = Training(
        bilevel.fresh_start(run),
        bilevel.minibatches(run, made, config.inner_steps, config.batch_per_class),
        torch.tensor(config.inner_lr, dtype=run.dtype),
        real,
        SGD(config.inner_momentum),
        augment=lambda x, step: run.augment(x, draw),
        augment_real=lambda x, here: run.augment(x, draw),
    )
    gradients, loss = bilevel.gradients(run, made, {}, training)
    return bilevel.update(run, gradients, loss, training, partial(_clipped_step, run, config.clip))


def _clipped_step(run: Run, most: float) -> None:
    torch.nn.utils.clip_grad_norm_(run.tensors.values(), most)
    run.optimiser.step()
