"""IDC: stored images that decode to several, matched in networks trained on real images.

Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022
(arXiv 2205.14959). Images are stored in [0, 1] and decoded by multi-formation: each is cut into
factor^2 crops, which are upsampled to full size. Per iteration a fresh network theta goes through
`inner_loop` image updates, each on

    L = sum_c sum_l | grad_l CE(A(x of class c)) - grad_l CE(A(decode(s) of class c)) |

over the convolution weights l only; | | is a sum of squares (mse) or of absolute values (l1), never
a mean, so lr_img belongs to a network's size. A is color, crop and cutout in one, the same for both
sides of a class. Between two image updates theta is trained on `n_data` real images with CutMix.

Steps. The published code makes an optimiser step after each class, on all images: those of the
other classes move on by their momentum alone. `step="per_class"` does the same, exactly up to
rounding, and yet matches all classes together, for where the images of a class are at its turn is
known beforehand. `step="joint"`, the default, matches all classes where they stand and makes one
step. In the end both move an image by lr_img / (1 - momentum), as published 2 lr_img, times each of
its gradients. In per_class all of that has come before the class has its next turn, if there are
more than a few classes: no momentum is left from one update to the next. In joint one half comes at
once and the other half in the course of the updates that follow. After three updates with gradients
of 1 and lr_img 1, images of the first class have gone 6 in per_class and 4.25 in joint.

Images may leave [0, 1] between the iterations, at whose start they are clamped.

Unlike the published code: an iteration's real images come from permutations of its own; a class
with fewer than `batch_real` images has them all in each batch, with as many labels; an iteration
ends with its last image update. For ImageNet with 100 classes the code loads pretrained networks;
here each is trained for as many epochs (`early`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast.augment import DSA
from ddfast.cutmix import cutmix
from ddfast.data import Dataset
from ddfast.engine import match_gradients, segment_gradients, weight_names
from ddfast.memory import SECOND_ORDER
from ddfast.methods.class_steps import at_their_turn, step_by_class
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.run import Interrupted, Run, refuse_batchnorm
from ddfast.nets import Network
from ddfast.synthetic.multi_formation import decode, initialise, subsample

TITLE = "Dataset Condensation via Efficient Synthetic-Data Parameterization (Kim et al., ICML 2022)"
MATCHES = "convolutions' gradients of each class; stored images decode to several"
PROTOCOL = "idc"

METRICS = {"mse": "mse", "l1": "l1", "cos": "row_cosine"}

PUBLISHED = ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100")

MOST_EPOCHS = 4
"""Of network training per iteration with CIFAR: 100 times 2000 of 50000 images. MNIST: 0.8."""

LEAST_CELL = 8
"""Pixels. The smallest published cells have 14. On a split of the 8x8 digits' training images
factor 1 had 91.4 % at ipc 1 and factor 2 85.4 %; on the test images factor 2 had 83.8 ± 2.0 %
(random selection 72.3 ± 8.0) and at ipc 10 89.0 ± 2.1 % (random selection 96.5 ± 1.1)."""

LARGE = 64
"""Pixels a side, beyond which an unknown data set is treated as ImageNet."""


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of IDC, by default those of the paper's code (its option `reproduce`)."""

    space: ClassVar[str] = "pixel"

    model: str = setting("network (published: ConvNet, beyond 64 px ResNetAP10)")
    batch_real: int = setting("real images per class and step", 64, least=1)
    init: Literal["mix", "real", "noise"] = setting(
        "mix (the first images of the class, one in each cell), real or noise"
    )
    factor: int = setting("a stored image decodes to factor^2 (published: 2, ImageNet 3)", least=1)
    decode_type: Literal["single", "multi", "bound"] = setting(
        "single, multi (all factors), or bound (at most batch_syn_max a class)"
    )
    batch_syn_max: int = setting("decoded images of a class and step at most", 128, least=1)
    metric: Literal["mse", "l1", "cos"] = setting("distance of gradients (published: mse or l1)")
    aug_type: str = setting("augmentations in matching, joined by _, or none")
    step: Literal["joint", "per_class"] = setting(
        "optimiser steps: joint, or one after each class as published", "joint"
    )
    inner_loop: int = setting("image updates per network", 100, least=1)
    n_data: int = setting("real images that the network is trained on in between", least=0)
    early: int = setting("epochs that it is trained for before the first image update", least=0)
    cutmix: float = setting(
        "probability that a batch of that training is mixed; with 0, aug_type's cutout is in it",
        aliases=("mix_p",),
        least=0,
    )
    lr_net: float = setting("learning rate of the network training", above=0)
    momentum_net: float = setting("its momentum", 0.9, least=0, below=1)
    weight_decay: float = setting("its weight decay", least=0)
    batch_train: int = setting("its batch size", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutmix is not None and self.cutmix > 1:
            raise ValueError(f"cutmix: got {self.cutmix}, expected a probability")
        if self.parametrisation not in (None, "multi_formation"):
            raise ValueError(
                f"parametrisation: got {self.parametrisation!r}, and IDC is multi_formation"
            )
        DSA(self.aug_type)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """factor 2; 2000 iterations of 100 image updates; mse with lr_img 0.005 for CIFAR and SVHN,
        l1 with 0.0001 for MNIST and FashionMNIST, times ipc / 10 and by the size; ImageNet: factor
        3, 500 iterations, l1 with 0.003 (100 classes: 0.001), ResNetAP10.

        A data set that is none of these is treated as ImageNet beyond 64 pixels, as FashionMNIST
        with one channel, else as CIFAR-10. If it is small its networks see no more of it than
        those of the published sets, four times all of it in an iteration (n_data, at least one
        batch): a network that knows its training images by heart has no gradients to match. Digits
        are treated as MNIST, with 10 iterations and an lr_img chosen on a split of the training
        images. Images whose cells would be less than 8 pixels wide are not divided.
        """
        name = kin(dataset)
        factor = self.factor or (3 if name == "ImageNet" else 2)
        if self.factor is None and min(dataset.size) // factor < LEAST_CELL:
            factor = 1
        grey, many = name in ("MNIST", "FashionMNIST"), dataset.num_classes >= 100
        found: dict[str, Any] = {
            **super().published(dataset),
            "parametrisation": "multi_formation",
            "iterations": 2000 * 100 // self.inner_loop,
            "init": "mix",
            "factor": factor,
            "decode_type": "single",
            "metric": "l1" if grey else "mse",
            "lr_img": 1e-4 if grey else 5e-3,
            "aug_type": "color_crop_cutout",
            "n_data": 2000 if name.startswith("CIFAR") else 500,
            "early": 0,
            "cutmix": 0.5,
            "lr_net": 0.01,
            "weight_decay": 5e-4,
            "batch_train": 64,
        }
        if name == "MNIST" and factor > 1:
            found |= {"aug_type": "color_crop", "cutmix": 0.0}
        if name == "ImageNet":
            found |= {
                "model": "ResNetAP10",
                "iterations": 500 * 100 // self.inner_loop,
                "decode_type": "bound" if factor >= 3 and self.ipc >= 20 else "single",
                "metric": "l1",
                "lr_img": 1e-3 if many else 3e-3,
                "early": 5 if many else 10,
                "cutmix": 1.0,
            }
            if many:
                found |= {"lr_net": 0.1, "weight_decay": 1e-4, "batch_train": 128}
        if name != "ImageNet" and dataset.name not in PUBLISHED:
            all_of_it = MOST_EPOCHS * len(dataset.train_labels) // self.inner_loop
            found["n_data"] = min(found["n_data"], max(found["batch_train"], all_of_it))
        side = {"MNIST": 28, "ImageNet": 224}.get(name, 32)
        height, width = dataset.size
        found["lr_img"] *= self.ipc / 10 * (height * width / side**2)
        if dataset.name == "digits":
            found |= {
                "iterations": max(1, 10 * 100 // self.inner_loop),
                "lr_img": DIGITS_LR * self.ipc / 10,
            }
        return found

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        init = "random" if self.init == "real" else self.init
        selection = "random" if self.init == "real" else "first"
        images, labels = initialise(dataset, self.ipc, init, self.factor, generator, selection)
        return {"images": images}, labels

    def decoder(self, size: tuple[int, int]) -> Mapping[str, Any] | None:
        """For training; `bound` limits only what is matched, as in the published evaluation."""
        if self.factor == 1:
            return None
        kind = "multi" if self.decode_type == "multi" else "single"
        return {"name": "multi_formation", "factor": self.factor, "kind": kind}


DIGITS_LR = 1e-3
"""At ipc 10, and as everywhere in proportion to ipc. On a split of the training images four times
as much made no difference: at ipc 1 idc_i 91.3 and here 91.4 %, idc 86.8 and 85.4 % (standard
deviations 0.4 to 2.3); at ipc 10 idc_i 98.1 and 98.3 %."""


def kin(dataset: Dataset) -> str:
    """The data set whose published settings hold for this one."""
    if dataset.name in PUBLISHED:
        return dataset.name
    if dataset.name == "digits":
        return "MNIST"
    if max(dataset.size) > LARGE:
        return "ImageNet"
    return "FashionMNIST" if dataset.channels == 1 else "CIFAR10"


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: batch normalisation; a factor larger than the images; not even one synthetic
            image fits into the memory.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, "IDC")
    if config.factor > min(run.dataset.size):
        raise ValueError(f"factor: got {config.factor} for images of {run.dataset.size} pixels")
    run.at_once(2 * SECOND_ORDER)


def step(run: Run) -> Tensor:
    """`inner_loop` updates of the images. Returns each class's mean distance, (num_classes,)."""
    config = run.config
    assert isinstance(config, Config)
    net = run.fresh_net()
    optimiser = torch.optim.SGD(
        net.parameters(), config.lr_net, config.momentum_net, weight_decay=config.weight_decay
    )
    everything = torch.arange(len(run.real_images))
    batches = _batches(everything, config.batch_train, run.generator("network images"))
    for epoch in range(config.early):
        train(run, net, optimiser, batches, len(everything), run.generator("early", epoch))
    with torch.no_grad():
        run.images.clamp_(0, 1)
    classes = [
        _batches(run.sampler.indices(c), config.batch_real, run.generator("real images", c), True)
        for c in range(run.sampler.num_classes)
    ]
    total = run.images.new_zeros(len(classes))
    update = partial(step_by_class, run) if config.step == "per_class" else None
    for inner in range(config.inner_loop):
        gradient, losses = match(run, net, [next(each) for each in classes], inner)
        moment = f", image update {inner + 1} of {config.inner_loop}"
        run.update(gradient, losses, moment, update)
        total += losses
        if inner + 1 < config.inner_loop and config.n_data:
            train(
                *(run, net, optimiser, batches, config.n_data),
                run.generator("network training", inner),
            )
    return total / config.inner_loop


def match(run: Run, net: Network, real_images: list[Tensor], inner: int) -> tuple[Tensor, Tensor]:
    """The distances of all classes, (num_classes,), and their gradient, in the images' shape.

    Args:
        real_images: positions of those of each class.
    """
    config = run.config
    assert isinstance(config, Config)
    augment = DSA(config.aug_type, mode="C")
    classes = run.sampler.num_classes
    draw = augment.draw(
        run.generator("augmentation", inner), run.dataset.size, count=classes, independent=True
    )
    names, metric = weight_names(net, "conv"), METRICS[config.metric]
    stored = at_their_turn(run) if config.step == "per_class" else run.images.detach()
    gradient, losses = torch.empty_like(stored), []
    together = _classes_at_once(run, net, names)
    for first in range(0, classes, together):
        end = min(first + together, classes)
        rows, here = draw[:, first:end], run.of_classes(first, end)
        counts = [len(each) for each in real_images[first:end]]
        x = augment(run.real(torch.cat(real_images[first:end])), rows, counts)
        labels = torch.arange(first, end).repeat_interleave(torch.tensor(counts)).to(x.device)
        real = segment_gradients(net, x, labels, counts, names, run.memory // 2)

        leaf = stored[here].requires_grad_()
        images, labels, counts = _decoded(run, leaf, first, inner)
        s = augment(run.normalised(images), rows, counts)
        distances, by_s = match_gradients(
            *(net, s.detach(), labels, counts, real, names, metric), memory=run.memory // 2
        )
        gradient[here] = torch.autograd.grad(s, leaf, by_s)[0]
        losses.append(distances)
        run.processed += len(x) + len(s)
        if run.stop:
            raise Interrupted
    return gradient, torch.cat(losses)


def train(
    run: Run,
    net: Network,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    images: int,
    random: torch.Generator,
) -> None:
    """Train on the next batches, until it were so many images or all of them once."""
    config = run.config
    assert isinstance(config, Config)
    names = config.aug_type.split("_")
    if config.cutmix:
        names = [name for name in names if name != "cutout"]
    augment = DSA("_".join(names), mode="C")
    net.train()
    done = 0
    for positions in islice(batches, -(-len(run.real_images) // config.batch_train)):
        x = run.real(positions)
        x = augment(x, augment.draw(random, run.dataset.size, count=len(x)))
        mixed, partner, share = cutmix(x.unsqueeze(0), [random], config.cutmix)
        labels = run.dataset.train_labels[positions].to(run.device)
        logits = net(mixed[0])
        loss = share[0] * cross_entropy(logits, labels)
        if config.cutmix:
            loss = loss + (1 - share[0]) * cross_entropy(logits, labels[partner[0]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        done += len(x)
        if done >= images:
            break
    run.processed += done
    if run.stop:
        raise Interrupted


def _decoded(run: Run, images: Tensor, first: int, inner: int) -> tuple[Tensor, Tensor, list[int]]:
    """The images of the classes from `first` on, decoded; their labels, and how many of each class.

    Of a class with more than `batch_syn_max` so many are drawn anew for each step.
    """
    config = run.config
    assert isinstance(config, Config)
    classes, most = len(images) // config.ipc, config.batch_syn_max
    labels = run.labels[run.of_classes(first, first + classes)]
    decoded, labels, counts = decode(
        images, labels, config.factor, config.decode_type, [config.ipc] * classes, most
    )
    if max(counts) <= most:
        return decoded, labels, counts
    # Class by class, for the choice must not depend on which classes are together.
    random = [run.generator("subset of the decoded", inner, first + c) for c in range(classes)]
    parts = [
        subsample(x, y, [n], most, each)
        for x, y, n, each in zip(
            decoded.split(counts), labels.split(counts), counts, random, strict=True
        )
    ]
    return (
        torch.cat([x for x, _, _ in parts]),
        torch.cat([y for _, y, _ in parts]),
        [n for _, _, (n,) in parts],
    )


def _classes_at_once(run: Run, net: Network, names: tuple[str, ...]) -> int:
    """Classes whose images, and gradients on both sides, fit into half the memory."""
    config, parameters = run.config, dict(net.named_parameters())
    assert isinstance(config, Config)
    decoded = min(config.ipc * config.factor**2, config.batch_syn_max)
    numbers = 2 * (config.batch_real + decoded) * run.images[0].numel()
    numbers += 3 * sum(parameters[name].numel() for name in names)
    return max(1, run.memory // 2 // (numbers * run.images.element_size()))


def _batches(
    positions: Tensor, size: int, random: torch.Generator, whole: bool = False
) -> Iterator[Tensor]:
    """Batches without end: one permutation after another, in pieces.

    Args:
        whole: leave out a last piece that is smaller, unless it is the only one.
    """
    size = min(size, len(positions))
    while True:
        for piece in positions[torch.randperm(len(positions), generator=random)].split(size):
            if len(piece) == size or not whole:
                yield piece
