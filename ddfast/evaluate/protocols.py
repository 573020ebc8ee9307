"""How a network is trained to find out what a set of images is worth: the protocols by name."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.evaluate import squares
from ddfast.evaluate.dc_augmentation import dc_operations
from ddfast.methods import idc, rat_bptt
from ddfast.methods.config import dsa_strategy as published_dsa_strategy

__all__ = ["PROTOCOLS", "Protocol", "protocol", "steps_matched"]

PROTOCOLS = (
    *("dc", "dsa", "dm", "idc", "cafe", "m3d", "it_gan", "ncfm"),
    *("mtt", "datm", "dd", "linba", "rat_bptt", "rfad", "frepo"),
    "krr",
)
"""Names of presets, see `protocol`."""

LEARNED_LR = ("mtt", "datm")
"""Those that train with the learning rate of the distilled set, if it has one."""

EPOCHS = 300
EPOCHS_CAFE = 600
EPOCHS_AUGMENTED = 1000
EPOCHS_IT_GAN = 200
EPOCHS_M3D = 1500
BATCH_DATM = 128
EPOCHS_LINBA, BATCH_LINBA = 300, 640
STEPS_RAT_BPTT = 1000
NCFM_EPOCHS, NCFM_EPOCHS_TINY = 2000, 300

# IDC beyond 64 pixels: epochs for up to so many images of a class, after decoding; beyond, 300.
IDC_EPOCHS = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))


@dataclass(frozen=True)
class Protocol:
    """How published evaluations train their networks: SGD or AdamW, with one of three schedules.

    `"dc"` (Zhao, Mopuri and Bilen 2021): the official script makes `epochs + 1` passes, and after
    the pass with index `epochs // 2 + 1` (the first is 0) replaces the optimiser by a new one with
    a tenth of the learning rate, which forgets the momentum; so does this.

    `"multistep"` (Kim et al. 2022, IDC): `epochs` passes; the learning rate drops to a fifth after
    two thirds and again after five sixths of them, and the momentum stays.

    `"fifths"` (Wang et al. 2025, NCFM): `epochs` passes; the learning rate is halved after each
    fifth of them, and the optimiser's state stays.

    `"constant"`: `epochs` passes with one learning rate.

    `"warmed_cosine"` (Zhou et al. 2022, FRePo): `epochs` passes; the learning rate rises along a
    line for 500 steps, then falls along a cosine to a hundredth.

    With `rates` (DD, Wang et al. 2018) none of these: one SGD step for each rate, on groups of
    images that take turns, see `ddfast.methods.dd`; a pass is then a turn of all groups.

    Attributes:
        name: of the preset.
        epochs: E, see above.
        augmentation: `"none"`, `"dsa"` (differentiable Siamese augmentation, one operation a batch
            with parameters of its own for each image), `"idc"` (flip and color always, one of crop,
            scale and rotate a batch, then cutout if it is named, with parameters of its own for
            each image) or `"dc"` (an operation for each image, see
            `ddfast.evaluate.dc_augmentation`).
        strategy: names of the operations, joined by `_`; empty for `"none"`.
        batch: images a step; the last batch of a pass may be smaller.
        lr, momentum, weight_decay: of the optimiser; with AdamW the momentum is its first beta.
        schedule: of the learning rate.
        cutmix: probability of a batch to be mixed, see `ddfast.cutmix`.
        optimiser: `"sgd"` or `"adamw"`, whose second beta is 0.999 and eps 1e-8.
        rates: learning rates of the steps, in their order, see above.
        groups: of images, with `rates`.
        weights: how fresh weights are drawn, see `ddfast.methods.dd`, or `"wide"`, see
            `ddfast.nets.initialise_wide`.
        start: None, or a seed and a number of networks: those that DD's images are for
            (`init_net` "fixed"), as which networks then begin, in turn.
        loss: mean `"cross_entropy"`, or `"squares"` between outputs and centred labels, see
            `ddfast.evaluate.squares`.
        label_scale: of the labels, with `"squares"`.
        reg: None, or the ridge of a kernel regression, which trains no network and has no use for
            the other settings (`krr`).
        from_start: what a network says is its output less the one that it had before its training,
            and weight decay pulls to where it began (RFAD, with `"squares"`).

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range; it is named.
    """

    name: str
    epochs: int
    augmentation: str = "none"
    strategy: str = ""
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "dc"
    cutmix: float = 0.0
    optimiser: str = "sgd"
    rates: tuple[float, ...] = ()
    groups: int = 1
    weights: str = "default"
    start: tuple[int, int] | None = None
    loss: str = "cross_entropy"
    label_scale: float = 1.0
    from_start: bool = False
    reg: float | None = None

    def __post_init__(self) -> None:
        schedules = ("dc", "multistep", "fifths", "constant", "warmed_cosine")
        if self.schedule not in schedules:
            raise ValueError(
                f"schedule must be one of {', '.join(schedules)}, got {self.schedule!r}"
            )
        if self.loss not in ("cross_entropy", "squares"):
            raise ValueError(f"loss must be cross_entropy or squares, got {self.loss!r}")
        if self.optimiser not in ("sgd", "adamw"):
            raise ValueError(f"optimiser must be sgd or adamw, got {self.optimiser!r}")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix must be a probability, got {self.cutmix!r}")
        for field, least in (("epochs", 0 if self.schedule == "dc" else 1), ("batch", 1)):
            value = getattr(self, field)
            try:
                number = operator.index(value)
            except TypeError:
                raise TypeError(f"{field} must be an integer, got {value!r}") from None
            if isinstance(value, bool) or number < least:
                raise ValueError(f"{field} must be an integer of at least {least}, got {value!r}")
            object.__setattr__(self, field, number)
        for field in ("lr", "momentum", "weight_decay"):
            value = float(getattr(self, field))
            if not math.isfinite(value) or value < 0 or (field == "lr" and value == 0):
                raise ValueError(f"{field} must be finite and above 0, got {value}")
            object.__setattr__(self, field, value)
        if self.reg is not None and not 0 <= self.reg < math.inf:
            raise ValueError(f"reg must be finite and at least 0, got {self.reg}")
        if self.augmentation not in ("none", "dsa", "idc", "dc"):
            raise ValueError(
                f"augmentation must be none, dsa, idc or dc, got {self.augmentation!r}"
            )
        if self.augmentation in ("dsa", "idc"):
            DSA(self.strategy)  # raises if it does not know an operation
        elif self.augmentation == "dc":
            dc_operations(self.strategy)

    @property
    def passes(self) -> int:
        """Over the set, in a whole training."""
        return self.epochs + 1 if self.schedule == "dc" else self.epochs

    def decay(self, index: int) -> float:
        """By what the learning rate is multiplied after the pass with this index."""
        if self.schedule == "dc":
            return 0.1 if index == self.epochs // 2 + 1 else 1.0
        if self.schedule in ("constant", "warmed_cosine"):
            return 1.0
        if self.schedule == "fifths":
            ends = [part * self.epochs // 5 for part in range(1, 5)]
            return float(0.5 ** ends.count(index + 1))
        milestones = (2 * self.epochs // 3, 5 * self.epochs // 6)
        return float(0.2 ** milestones.count(index + 1))

    def share(self, step: int, steps: int) -> float:
        """Of the learning rate, at `step`, the first being 0, of so many `steps` in all."""
        return squares.warmed_cosine(step, steps) if self.schedule == "warmed_cosine" else 1.0

    def steps(self, images: int) -> int:
        """Optimiser steps of a whole training on so many `images`."""
        return self.passes * math.ceil(images / self.batch)


def protocol(
    name: str,
    dataset: Dataset,
    batchnorm: bool = False,
    *,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    dsa_strategy: str | None = None,
    ipc: int = 1,
    factor: int = 1,
) -> Protocol:
    """A preset for one data set and kind of network.

    ========  ==========================================================================
    `dc`      no augmentation and 300 epochs, but on MNIST `crop_scale_rotate` and for
              networks with batch normalisation `crop_noise`, and 1000 epochs then (the
              official script does the latter for the model `ConvNetBN` only)
    `dsa`     DSA and 1000 epochs
    `dm`      the same; the paper's name for it
    `it_gan`  DSA and 200 epochs. The published code leaves out the last batch of an epoch if
              it is smaller, which would leave nothing of a small set; here it counts
    `idc`     schedule "multistep", batches of 64; flip, color and one of crop, scale and
              rotate; CutMix on half of the batches; 1000 epochs. Beyond 64 pixels CutMix
              on all batches and 3000 to 300 epochs by the images per class (two thirds of
              that from 100 classes on)
    `m3d`     as `idc`, with 1500 epochs, CutMix and without cutout on all data sets
    `cafe`    as `dc`, with 600 epochs where it has no augmentation; with a `dsa_strategy`
              (CAFE+DSA) as `dsa`
    `ncfm`    AdamW with 0.001, schedule "fifths", batches of 128; the augmentation of `idc`;
              CutMix on half of the batches; 2000 epochs, for Tiny-ImageNet 300
    `mtt`     as `dsa`; `ddfast.evaluate.evaluate` takes the learning rate that was learned
              with the set (MTT, TESLA, FTD)
    `datm`    the same with batches of 128
    `dd`      as `dc`; `ddfast.evaluate.evaluate` trains on the distilled set by its own schedule
    `linba`   SGD with 0.01 and momentum 0.9, constant, no weight decay, batches of 640, 300
              epochs; the augmentation that the set was distilled with, by default none
    `rat_bptt`  Adam with 0.001, constant, about 1000 steps, on as many images as a step of its
              student has (the published code draws them class by class, here the set is shuffled);
              rotated or, but for digits, mirrored. The best of four numbers of steps on the test
              images, which the published code reports, is no evaluation
    `frepo`   squares of centred labels, Adam with 0.0003, schedule "warmed_cosine", DSA
    `rfad`    squares of what networks have learned; for wide ones without normalisation. Both are
              explained in `ddfast.evaluate.squares`
    `krr`     kernel regression, for which no network is trained: see
              `ddfast.evaluate.kernel_regression`
    ========  ==========================================================================

    IDC's exceptions are kept: MNIST with factor > 1, and SVHN with one image per class and
    factor 1, are trained without CutMix (SVHN then with cutout). Its augmentation of ImageNet
    (random resized crops, jitter, lighting) is not offered; the above stands in for it. Its code
    prints the best of four accuracies measured on the test set in the course of the training beside
    the last one, and M3D and NCFM report the best. Choosing on the test set is no evaluation: here
    it is always the last. NCFM's code leaves AdamW's weight decay at PyTorch's 0.01. Soft labels,
    with which its paper's main table is made for few images, are not part of the protocol.

    DSA's strategy is the published one: all operations, without flip for digits (`digits`, MNIST,
    SVHN). With the strategy `"none"` dsa and dm keep their 1000 epochs. `ddfast.evaluate.evaluate`
    gives cafe, linba and rat_bptt the strategy that the set was distilled with. The papers report
    20 networks for each of 5 distilled sets (DC, DSA) or 5 networks (DM); how many is up to the
    evaluation.

    Args:
        name: one of `PROTOCOLS`.
        dataset: decides about the augmentation.
        batchnorm: whether the networks have batch normalisation.
        epochs, batch, lr, dsa_strategy: override the preset.
        ipc, factor: for `idc`, images of each class after decoding, and the factor they were
            decoded with.

    Raises:
        TypeError, ValueError: an unknown name or an override out of range.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    if name == "ncfm":
        preset = _ncfm(dataset, dsa_strategy)
    elif name == "idc":
        preset = _idc(dataset, ipc, factor, dsa_strategy)
    elif name == "m3d":
        preset = _m3d(dataset, dsa_strategy)
    elif name == "linba":
        preset = Protocol(
            name,
            EPOCHS_LINBA,
            *_augmentation("dsa", dsa_strategy or "none"),
            BATCH_LINBA,
            weight_decay=0,
            schedule="constant",
        )
    elif name == "krr":
        given = {"epochs": epochs, "batch": batch, "lr": lr, "dsa_strategy": dsa_strategy}
        for setting, value in given.items():
            if value is not None:
                raise ValueError(f"{setting} has no meaning for protocol 'krr'")
        return Protocol(name, 1, schedule="constant", reg=1e-6)
    elif name in ("rfad", "frepo"):
        preset = Protocol(name, **squares.preset(name, dataset, ipc, dsa_strategy))
    elif name == "rat_bptt":
        preset = _rat_bptt(dataset, ipc, dsa_strategy, batch)
    elif name in ("dc", "dd") or (name == "cafe" and (dsa_strategy or "none").lower() == "none"):
        if dsa_strategy is not None and name != "cafe":
            raise ValueError(f"dsa_strategy has no meaning for protocol {name!r}; use another one")
        strategy = "crop_noise" if batchnorm else "crop_scale_rotate"
        if batchnorm or dataset.name == "MNIST":
            preset = Protocol(name, EPOCHS_AUGMENTED, "dc", strategy)
        else:
            preset = Protocol(name, EPOCHS_CAFE if name == "cafe" else EPOCHS)
    else:
        strategy = published_dsa_strategy(dataset) if dsa_strategy is None else dsa_strategy
        epochs_here = EPOCHS_IT_GAN if name == "it_gan" else EPOCHS_AUGMENTED
        preset = Protocol(name, epochs_here, *_augmentation("dsa", strategy))
        if name == "datm":
            preset = dataclasses.replace(preset, batch=BATCH_DATM)
    return dataclasses.replace(
        preset,
        epochs=preset.epochs if epochs is None else epochs,
        batch=preset.batch if batch is None else batch,
        lr=preset.lr if lr is None else lr,
    )


def _augmentation(kind: str, strategy: str) -> tuple[str, str]:
    """Kind and strategy, or none at all."""
    return ("none", "") if strategy.lower() in ("", "none") else (kind, strategy)


def _idc(dataset: Dataset, ipc: int, factor: int, given: str | None) -> Protocol:
    """The published preset of IDC (Kim et al., ICML 2022) for images decoded with this factor."""
    kin = idc.kin(dataset)
    mixed = not ((kin == "MNIST" and factor > 1) or (kin == "SVHN" and ipc == factor == 1))
    epochs, cutmix = EPOCHS_AUGMENTED, 0.5
    if kin == "ImageNet":
        epochs = next((epochs for most, epochs in IDC_EPOCHS if ipc <= most), 300)
        if dataset.num_classes >= 100:
            epochs = 2 * epochs // 300 * 100
        cutmix = 1.0
    strategy = given
    if strategy is None:
        names = published_dsa_strategy(dataset).split("_")
        # Nowhere both: CutMix or cutout. MNIST with factor > 1 has neither.
        cutout = kin == "SVHN" and not mixed
        strategy = "_".join(name for name in names if cutout or name != "cutout")
    return Protocol(
        "idc",
        epochs,
        *_augmentation("idc", strategy),
        batch=64,
        schedule="multistep",
        cutmix=cutmix if mixed else 0.0,
    )


def _m3d(dataset: Dataset, given: str | None) -> Protocol:
    """M3D's (Zhang H. et al., AAAI 2024): that of IDC without its exceptions, for longer."""
    if given is None:
        names = published_dsa_strategy(dataset).split("_")
        given = "_".join(name for name in names if name != "cutout")
    preset = _idc(dataset, 1, 1, given)
    cutmix = 1.0 if idc.kin(dataset) == "ImageNet" else 0.5
    return dataclasses.replace(preset, name="m3d", epochs=EPOCHS_M3D, cutmix=cutmix)


def _ncfm(dataset: Dataset, given: str | None) -> Protocol:
    """The published preset of NCFM (Wang et al., CVPR 2025)."""
    strategy = given
    if strategy is None:  # no cutout beside CutMix, as in IDC
        names = published_dsa_strategy(dataset).split("_")
        strategy = "_".join(name for name in names if name != "cutout")
    return Protocol(
        "ncfm",
        NCFM_EPOCHS_TINY if "tiny" in dataset.name.lower() else NCFM_EPOCHS,
        *_augmentation("idc", strategy),
        batch=128,
        lr=1e-3,
        weight_decay=0.01,
        schedule="fifths",
        cutmix=0.5,
        optimiser="adamw",
    )


def _rat_bptt(dataset: Dataset, ipc: int, given: str | None, batch: int | None) -> Protocol:
    """RaT-BPTT's (Feng et al., ICLR 2024): so many steps of Adam."""
    batch = batch or Protocol("", 1).batch
    strategy = rat_bptt.strategy(dataset) if given is None else given
    return Protocol(
        "rat_bptt",
        -(-STEPS_RAT_BPTT // math.ceil(ipc * dataset.num_classes / batch)),
        *_augmentation("dsa", strategy),
        batch,
        lr=1e-3,
        weight_decay=0,
        schedule="constant",
        optimiser="adamw",
    )


def by_own_schedule(
    preset: Protocol,
    rates: tuple[float, ...],
    groups: int,
    weights: str,
    start: tuple[int, int] | None = None,
) -> Protocol:
    """The protocol of a set that was distilled with its own step sizes (DD).

    Args:
        rates, groups, weights, start: as in `Protocol`.
    """
    return dataclasses.replace(
        preset,
        epochs=len(rates) // groups,
        augmentation="none",
        strategy="",
        schedule="constant",
        rates=rates,
        groups=groups,
        weights=weights,
        start=start,
    )


def steps_matched(chosen: Protocol, images: int, full: int, least: int = 30) -> Protocol:
    """The protocol for the full data: about as many SGD steps as on the synthetic set.

    A thousand epochs over all the data would be another experiment, and a hundred times as long.
    The passes are as many as give at least the same number of steps, not fewer than `least` (few
    passes over much data do not converge), and never more than the protocol has.

    Args:
        chosen: of the synthetic set.
        images: how many are in the synthetic set.
        full: how many in the full data.
        least: passes over the full data.
    """
    passes = math.ceil(chosen.steps(images) / math.ceil(full / chosen.batch))
    passes = min(max(passes, least), chosen.passes)
    return dataclasses.replace(chosen, epochs=passes - (chosen.passes - chosen.epochs))
