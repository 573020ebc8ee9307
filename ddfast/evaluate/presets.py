"""The published protocols by name: settings of a `ddfast.evaluate.protocols.Protocol`."""

from __future__ import annotations

import dataclasses
import math

from ddfast.data import Dataset
from ddfast.evaluate import squares
from ddfast.evaluate.protocols import Protocol
from ddfast.methods import idc, rat_bptt
from ddfast.methods.config import dsa_strategy as published_dsa_strategy

__all__ = ["LEARNED_LR", "PROTOCOLS", "protocol"]

PROTOCOLS = (
    *("dc", "dsa", "dm", "idc", "cafe", "m3d", "it_gan", "ncfm"),
    *("mtt", "datm", "dd", "linba", "rat_bptt", "rfad", "frepo", "kip"),
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
    `rfad`    squares of what networks have learned; for wide ones without normalisation. These
              are explained in `ddfast.evaluate.squares`
    `kip`     squares of centred labels, 5000 steps of SGD from the largest stable learning rate,
              schedule "cosine"; for wide networks without normalisation, such as ConvNetW1024NNPC
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
    elif name in squares.PRESETS:
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
