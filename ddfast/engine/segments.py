"""Consecutive segments of a batch, what a caller may ask of them, and how they are divided."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Images start to stop - 1; they lie in segments first to first + len(counts) - 1."""

    start: int
    stop: int
    first: int
    counts: list[int]

    @property
    def images(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def segments(self) -> slice:
        return slice(self.first, self.first + len(self.counts))


def pieces(counts: Sequence[int], most: int) -> Iterator[Piece]:
    """The whole batch in pieces of at most `most` images, cut wherever they are full."""
    ends = list(itertools.accumulate(counts))
    total, segment = ends[-1], 0
    for start in range(0, total, most):
        stop = min(start + most, total)
        while ends[segment] <= start:
            segment += 1
        first, here, position = segment, [], start
        while position < stop:
            end = min(ends[segment], stop)
            here.append(end - position)
            position = end
            if end == ends[segment] and position < stop:
                segment += 1
        yield Piece(start, stop, first, here)


def groups(counts: Sequence[int], most: int) -> Iterator[Piece]:
    """Whole segments together while they are at most `most` images; a longer one by itself."""
    start = first = 0
    here: list[int] = []
    for segment, count in enumerate(counts):
        if here and sum(here) + count > most:
            yield Piece(start, start + sum(here), first, here)
            start, first, here = start + sum(here), segment, []
        here.append(count)
    if here:
        yield Piece(start, start + sum(here), first, here)


def weight_names(net: nn.Module, kind: str = "matrices") -> tuple[str, ...]:
    """Names of the parameters that a method matches.

    Args:
        net: any module.
        kind: "matrices": two or more dimensions, all that `row_cosine` counts (DC, DSA, DCC);
            "all"; "conv": four dimensions (IDC).

    Raises:
        ValueError: another kind; a network without such parameters.
    """
    least = {"matrices": 2, "all": 0, "conv": 4}.get(kind)
    if least is None:
        raise ValueError(f"kind: got {kind!r}, expected 'matrices', 'all' or 'conv'")
    names = tuple(
        name
        for name, p in net.named_parameters()
        if (p.dim() == 4 if kind == "conv" else p.dim() >= least)
    )
    if not names:
        raise ValueError(f"kind: {type(net).__name__} has no parameters of kind {kind!r}")
    return names


def check_batch(net: nn.Module, images: Tensor, labels: Tensor, counts: Sequence[int]) -> list[int]:
    """The counts as a list, or the error that says what is wrong with the batch or network."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        raise TypeError("images: expected a floating-point tensor (N, ...)")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        raise TypeError("labels: expected a tensor of N class numbers")
    if len(labels) != len(images):
        raise ValueError(f"labels: got {len(labels)}, expected {len(images)}, one for each image")
    counts = [int(count) for count in counts]
    if not counts or min(counts) < 0 or sum(counts) != len(images):
        raise ValueError(
            f"counts: got {counts}, expected sizes of segments that sum to {len(images)}"
        )
    parameter = next(net.parameters(), None)
    if parameter is None:
        raise ValueError("net: has no parameters")
    if images.dtype != parameter.dtype or images.device != parameter.device:
        raise ValueError(
            f"images: got {images.dtype} on {images.device}, expected {parameter.dtype} on "
            f"{parameter.device}, as the network's parameters"
        )
    if labels.device.type == "cpu" and len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels: got {int(labels.min())}, expected class numbers from 0 on")
    for name, module in net.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"net: batch normalisation {name!r} is in training mode, so that the images of a "
                "batch depend on each other; freeze its statistics with .eval() first"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"net: dropout {name!r} is in training mode and would draw at random")
    return counts


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError where a label has no logit; on a GPU the comparison would have to wait."""
    if labels.device.type == "cpu" and len(labels) and int(labels.max()) >= classes:
        raise ValueError(f"labels: got {int(labels.max())}, the network has {classes} classes")


def check_names(net: nn.Module, names: Sequence[str] | None) -> tuple[str, ...]:
    """All parameter names if none are given, or the error that names an unknown one."""
    known = [name for name, _ in net.named_parameters()]
    if names is None:
        return tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"names: got {unknown or 'none'}, expected parameters among {known}")
    return tuple(names)


def shares(counts: Sequence[int], like: Tensor, weights: Tensor | None) -> Tensor:
    """The factor of each image's cross-entropy: 1 / (images of its segment), or as given."""
    if weights is not None:
        if weights.shape != (len(like),):
            raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected ({len(like)},)")
        return weights.to(like)
    sizes = torch.tensor(counts)
    return (1.0 / sizes.clamp(min=1).double()).repeat_interleave(sizes).to(like)
