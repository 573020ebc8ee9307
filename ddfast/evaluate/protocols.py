"""How a network is trained to find out what a set of images is worth."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass

from ddfast.augment import DSA
from ddfast.evaluate import squares
from ddfast.evaluate.dc_augmentation import dc_operations

__all__ = ["Protocol", "by_own_schedule", "steps_matched"]


@dataclass(frozen=True)
class Protocol:
    """How published evaluations train their networks: SGD or AdamW, with a schedule.

    `"dc"` (Zhao, Mopuri and Bilen 2021): the official script makes `epochs + 1` passes, and after
    the pass with index `epochs // 2 + 1` (the first is 0) replaces the optimiser by a new one with
    a tenth of the learning rate, which forgets the momentum; so does this.

    `"multistep"` (Kim et al. 2022, IDC): `epochs` passes; the learning rate drops to a fifth after
    two thirds and again after five sixths of them, and the momentum stays.

    `"fifths"` (Wang et al. 2025, NCFM): `epochs` passes; the learning rate is halved after each
    fifth of them, and the optimiser's state stays.

    `"constant"`: `epochs` passes with one learning rate.

    `"cosine"` (Nguyen et al. 2021, KIP): `epochs` passes; the learning rate falls to 0 along a
    cosine, step by step.

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
        loss: mean `"cross_entropy"`, or `"squares"` or `"mean_squares"` between outputs and centred
            labels, see `ddfast.evaluate.squares`.
        of_largest: the learning rate is in units of each network's largest stable one, see
            `ddfast.evaluate.largest_rate`.
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
    of_largest: bool = False
    reg: float | None = None

    def __post_init__(self) -> None:
        schedules = ("dc", "multistep", "fifths", "constant", "cosine", "warmed_cosine")
        if self.schedule not in schedules:
            raise ValueError(
                f"schedule must be one of {', '.join(schedules)}, got {self.schedule!r}"
            )
        losses = ("cross_entropy", "squares", "mean_squares")
        if self.loss not in losses:
            raise ValueError(f"loss must be one of {', '.join(losses)}, got {self.loss!r}")
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
        if self.schedule in ("constant", "cosine", "warmed_cosine"):
            return 1.0
        if self.schedule == "fifths":
            ends = [part * self.epochs // 5 for part in range(1, 5)]
            return float(0.5 ** ends.count(index + 1))
        milestones = (2 * self.epochs // 3, 5 * self.epochs // 6)
        return float(0.2 ** milestones.count(index + 1))

    def share(self, step: int, steps: int) -> float:
        """Of the learning rate, at `step`, the first being 0, of so many `steps` in all."""
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * step / steps)) / 2
        return squares.warmed_cosine(step, steps) if self.schedule == "warmed_cosine" else 1.0

    def steps(self, images: int) -> int:
        """Optimiser steps of a whole training on so many `images`."""
        return self.passes * math.ceil(images / self.batch)


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
