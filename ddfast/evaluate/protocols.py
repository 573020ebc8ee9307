"""How a network is trained to find out what a set of images is worth: the protocols by name."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.evaluate.dc_augmentation import dc_operations
from ddfast.methods.config import dsa_strategy as published_dsa_strategy

__all__ = ["PROTOCOLS", "Protocol", "protocol", "steps_matched"]

PROTOCOLS = ("dc", "dsa", "dm")

EPOCHS = 300
EPOCHS_AUGMENTED = 1000


@dataclass(frozen=True)
class Protocol:
    """SGD as the DC family trains its evaluation networks (Zhao, Mopuri and Bilen 2021).

    The official script makes `epochs + 1` passes, and after the pass with index `decay_epoch` (the
    first is 0) replaces the optimiser by a new one with a tenth of the learning rate, which
    forgets the momentum; so does this.

    Attributes:
        name: of the preset.
        epochs: E; there are E + 1 passes over the set.
        augmentation: `"none"`, `"dsa"` (differentiable Siamese augmentation, one operation a batch
            with parameters of its own for each image) or `"dc"` (an operation for each image, see
            `ddfast.evaluate.dc_augmentation`).
        strategy: names of the operations, joined by `_`; empty for `"none"`.
        batch: images a step; the last batch of a pass may be smaller.
        lr, momentum, weight_decay: of SGD.
    """

    name: str
    epochs: int
    augmentation: str = "none"
    strategy: str = ""
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for field, least in (("epochs", 0), ("batch", 1)):
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
        if self.augmentation not in ("none", "dsa", "dc"):
            raise ValueError(f"augmentation must be none, dsa or dc, got {self.augmentation!r}")
        if self.augmentation == "dsa":
            DSA(self.strategy)  # raises if it does not know an operation
        elif self.augmentation == "dc":
            dc_operations(self.strategy)

    @property
    def decay_epoch(self) -> int:
        """Index of the pass after which the learning rate drops."""
        return self.epochs // 2 + 1

    def steps(self, images: int) -> int:
        """SGD steps of a whole training on a set of this size."""
        return (self.epochs + 1) * math.ceil(images / self.batch)


def protocol(
    name: str,
    dataset: Dataset,
    batchnorm: bool = False,
    *,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    dsa_strategy: str | None = None,
) -> Protocol:
    """A preset for one data set and kind of network.

    ========  ==========================================================================
    `dc`      no augmentation and 300 epochs, but on MNIST `crop_scale_rotate` and for
              networks with batch normalisation `crop_noise`, and 1000 epochs then (the
              official script does the latter for the model `ConvNetBN` only)
    `dsa`     DSA and 1000 epochs
    `dm`      the same; the paper's name for it
    ========  ==========================================================================

    DSA's strategy is the published one: all operations, without flip for digits (`digits`, MNIST,
    SVHN). With the strategy `"none"` dsa and dm keep their 1000 epochs. The papers report 20
    networks for each of 5 distilled sets (DC, DSA) or 5 networks (DM); how many is up to
    `ddfast.evaluate.evaluate`.

    Args:
        name: one of `PROTOCOLS`.
        dataset: decides about the augmentation.
        batchnorm: whether the networks have batch normalisation.
        epochs, batch, lr, dsa_strategy: override the preset.

    Raises:
        TypeError, ValueError: an unknown name or an override out of range.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    if name == "dc":
        if dsa_strategy is not None:
            raise ValueError("dsa_strategy has no meaning for protocol 'dc'; use 'dsa' or 'dm'")
        strategy = "crop_noise" if batchnorm else "crop_scale_rotate"
        augmentation = "dc" if batchnorm or dataset.name == "MNIST" else "none"
    else:
        strategy = published_dsa_strategy(dataset) if dsa_strategy is None else dsa_strategy
        augmentation = "dsa"
        if strategy.lower() in ("", "none"):
            augmentation = "none"
    published = EPOCHS if name == "dc" and augmentation == "none" else EPOCHS_AUGMENTED
    preset = Protocol(name, published, augmentation, "" if augmentation == "none" else strategy)
    return dataclasses.replace(
        preset,
        epochs=preset.epochs if epochs is None else epochs,
        batch=preset.batch if batch is None else batch,
        lr=preset.lr if lr is None else lr,
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
    passes = min(max(passes, least), chosen.epochs + 1)
    return dataclasses.replace(chosen, epochs=passes - 1)
