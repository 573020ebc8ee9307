"""What the methods that match features share: decode, augment, features, statistic, one way back.

    real images ----> augment ---> network ---> features, in pieces, never all at once
                         | the same draw for a class
    what is stored -> decode -> augment ---> network ---> features
                                                             |
    gradient of what is stored <----- one vector-Jacobian product <----- statistic: losses of the
                                                                   classes, gradient of the features

A method brings the statistic: a function of the features of some classes that returns their losses
and the gradient of these with respect to the synthetic features, in closed form. No graph of a loss
is made, and classes go through in groups that fit into the memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ddfast.engine import features
from ddfast.engine.chain import recognise
from ddfast.engine.features import Features, images_at_once
from ddfast.losses import class_mean
from ddfast.memory import FIRST_ORDER, FORWARD
from ddfast.methods.run import Decoded, Interrupted, Run
from ddfast.nets import Network, has_batchnorm


@dataclass
class RealBatch:
    """Real images of all classes for one sweep: where they are, class after class.

    Attributes:
        indices: positions in the training images.
        counts: images of each class.
        draw: augmentation parameters of each class, `DSA.draw(..., count=classes)`.
    """

    indices: Tensor
    counts: list[int]
    draw: Tensor


@dataclass
class Group:
    """Some classes whose statistic is computed together.

    Attributes:
        run, net: as everywhere.
        first, end: the classes.
        made: their synthetic images, decoded.
        features: (n, width), of these, augmented.
        real: what real images they are matched to.
    """

    run: Run
    net: Network
    first: int
    end: int
    made: Decoded
    features: Tensor
    real: RealBatch

    @property
    def real_counts(self) -> list[int]:
        return self.real.counts[self.first : self.end]

    def real_pieces(self) -> Iterator[tuple[Tensor, int, list[int]]]:
        """Features of the real images, some at a time: they, their first class counted from that
        of the group, and how many of each class they are."""
        return real_features(self.run, self.net, self.real, self.first, self.end)

    def real_means(self) -> Tensor:
        """Mean feature of each class's real images, (classes, width)."""
        means = self.features.new_zeros(self.end - self.first, self.features.shape[1])
        counts = self.real_counts
        for part, first, within in self.real_pieces():
            add_means(means, class_mean(part, within), first, within, counts)
        return means

    def real_rows(self) -> Tensor:
        """Features of all real images of these classes, class after class."""
        return torch.cat([part for part, _, _ in self.real_pieces()])


Statistic = Callable[[Group], tuple[Tensor, Tensor]]
"""Losses of a group's classes, (classes,), and the gradient of their sum by `Group.features`."""


def add_means(
    total: Tensor, means: Tensor, first: int, within: list[int], counts: list[int]
) -> None:
    """Add to the means of whole classes those of a piece of them, by their shares."""
    factors = _shares(first, within, counts, total)
    total[first : first + len(within)] += _times(means, factors)


def _shares(first: int, within: list[int], counts: list[int], like: Tensor) -> Tensor:
    """Of a piece in each of its classes, (classes of the piece,)."""
    shares = [n / counts[first + c] for c, n in enumerate(within)]
    return torch.tensor(shares, dtype=like.dtype).to(like.device)


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """Each row times its factor."""
    return rows * factors.view(-1, *[1] * (rows.dim() - 1))


def sweep(
    run: Run,
    net: Network,
    real: RealBatch,
    statistic: Statistic,
    *,
    held: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
    classes: tuple[int, int] | None = None,
    fewer: Callable[[Decoded], Decoded] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Every class matched once.

    Args:
        net: with weights that stay as they are.
        held: numbers that the statistic holds for a class, beside the mean of its features.
        tensors: what is learned, if not `run.tensors`.
        classes: first and end of those that are matched; None: all.
        fewer: chooses of the decoded images those that are matched, such as `subset`.

    Returns:
        Gradients of the summed losses by what is learned, and the losses, (classes,).

    Raises:
        Interrupted: between two groups, if the run was asked to stop.
    """
    gradients, losses = run.no_gradients(), []
    begin, stop = classes or (0, run.dataset.num_classes)
    together = classes_at_once(run, net, held)
    for first in range(begin, stop, together):
        end = min(first + together, stop)
        made = run.decoded(first, end, tensors)
        if fewer is not None:
            made = fewer(made)
        x = run.augment(run.normalised(made.images), real.draw[:, first:end], made.counts)
        found = kept(run, net, x.detach())
        values, by_features = statistic(Group(run, net, first, end, made, found.features, real))
        run.chain(gradients, made, x, found.backward(by_features))
        losses.append(values)
        run.processed += len(x)
        if run.stop:
            raise Interrupted
    return gradients, torch.cat(losses)


def subset(run: Run, made: Decoded, most: int) -> Decoded:
    """At most so many of the decoded images of each class, drawn anew in every iteration."""
    if max(made.counts) <= most:
        return made
    # Class by class, for the choice must not depend on which classes are together.
    chosen, start = [], 0
    for c, count in enumerate(made.counts, made.classes[0]):
        random = run.generator("subset of the decoded", c)
        chosen.append(start + torch.randperm(count, generator=random)[:most])
        start += count
    rows = torch.cat(chosen).to(made.images.device)
    counts = [len(each) for each in chosen]
    return replace(made, images=made.images[rows], labels=made.labels[rows], counts=counts)


def kept(run: Run, net: Network, x: Tensor, counts: list[int] | None = None) -> Features:
    """Features of images and their way back, with the class means of blocks if `counts` are given.

    Where the images do not fit together into the memory, they go through the network twice: for
    their features, and again piece by piece for the way back.

    Args:
        x: normalised, augmented.
        counts: images of each class.
    """
    layers = counts is not None
    most = len(x) if has_batchnorm(net) else at_once(run, net, True)
    if len(x) <= most:
        return features(net, x, counts, keep=True, layers=layers)
    counts = counts or [len(x)]
    pieces = list(pieces_of(counts, most))
    rows, maps = list[Tensor](), list[Tensor]()
    for piece, first, within in pieces:
        found = features(net, x[piece], within, layers=layers)
        rows.append(found.features)
        maps = maps or [part.new_zeros(len(counts), *part.shape[1:]) for part in found.maps]
        for total, part in zip(maps, found.maps, strict=True):
            add_means(total, part, first, within, counts)

    def backward(by_features: Tensor | None, by_maps: Sequence[Tensor] | None) -> Tensor:
        by_x = torch.empty_like(x)
        for piece, first, within in pieces:
            found = features(net, x[piece], within, keep=True, layers=layers)
            shares = [
                _times(by[first : first + len(within)], _shares(first, within, counts, by))
                for by in by_maps or ()
            ]
            by_rows = None if by_features is None else by_features[piece]
            by_x[piece] = found.backward(by_rows, shares or None)
        return by_x

    return Features(torch.cat(rows), maps, backward)


def real_images(
    run: Run, real: RealBatch, first: int, end: int, most: int
) -> Iterator[tuple[Tensor, int, list[int]]]:
    """Real images of classes first to end - 1, augmented, at most so many at a time.

    Yields:
        Images, the first class counted from `first`, and how many of each class.
    """
    start = sum(real.counts[:first])
    draw = real.draw[:, first:end]
    for piece, begin, within in pieces_of(real.counts[first:end], most):
        chosen = real.indices[start + piece.start : start + piece.stop]
        yield (
            run.augment(run.real(chosen), draw[:, begin : begin + len(within)], within),
            begin,
            within,
        )
        run.processed += len(chosen)


def real_features(
    run: Run, net: Network, real: RealBatch, first: int, end: int
) -> Iterator[tuple[Tensor, int, list[int]]]:
    """As `real_images`, their features. With batch normalisation all in one pass."""
    most = sum(real.counts[first:end]) if has_batchnorm(net) else at_once(run, net, False)
    with torch.no_grad():
        for images, begin, within in real_images(run, real, first, end, most):
            yield features(net, images).features, begin, within


def pieces_of(counts: list[int], most: int) -> Iterator[tuple[slice, int, list[int]]]:
    """Cuts into runs of at most `most`: the run, its first class, and its images of each class."""
    ends = list(accumulate(counts))
    for start in range(0, ends[-1], most):
        stop = min(start + most, ends[-1])
        first, last = bisect_right(ends, start), bisect_left(ends, stop)
        within = [
            min(ends[c], stop) - max(ends[c] - counts[c], start) for c in range(first, last + 1)
        ]
        yield slice(start, stop), first, within


def at_once(run: Run, net: Network, keep: bool) -> int:
    """Images that may go through a network of the run together, see `images_at_once`."""
    if recognise(net) is None:
        return run.at_once(FIRST_ORDER if keep else FORWARD)
    return images_at_once(net, (run.dataset.channels, *run.dataset.size), run.memory, keep)


def classes_at_once(run: Run, net: Network, held: int = 0) -> int:
    """Classes whose synthetic images fit into the memory, and what is held of them in a quarter."""
    if has_batchnorm(net):  # in training mode an image's features depend on all others
        return run.dataset.num_classes
    fit = at_once(run, net, True) // run.decoded_per_class
    numbers = net.classifier.in_features * (1 + run.decoded_per_class) + held
    room = run.memory // 4 // (numbers * run.dtype.itemsize)
    return max(1, min(fit, room, run.dataset.num_classes))


def check_memory(run: Run, batches: list[int]) -> None:
    """Refuse what does not fit, see the raised errors.

    Args:
        batches: real images of each class in a sweep.

    Raises:
        ValueError: not even one image fits; batch normalisation with classes of unequal batches,
            or with more images than fit in one pass.
    """
    if not has_batchnorm(run.net):
        at_once(run, run.net, True)
        return
    if min(batches) < max(batches):
        c = batches.index(min(batches))
        raise ValueError(
            f"batch_real: class {c} ({run.dataset.class_names[c]}) has {batches[c]} of "
            f"{max(batches)} images; with batch normalisation all classes need the same number"
        )
    synthetic = run.decoded_per_class * run.dataset.num_classes
    for images, keep in ((sum(batches), False), (synthetic, True)):
        fit = at_once(run, run.net, keep)
        if images > fit:
            raise ValueError(
                f"memory: batch normalisation needs all {images} images in one pass, and the "
                f"budget of {run.memory} bytes holds {fit}"
            )


def mean_distance(of_syn: Tensor, of_real: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Squared distances of class means, and their gradient by each synthetic row (methods 1.1).

    Args:
        of_syn, of_real: (classes, width).
        counts: synthetic rows of each class.

    Returns:
        (classes,), and (rows, width): 2 / n times the difference, the same for every row of a
        class.
    """
    difference = of_syn - of_real
    sizes = torch.tensor(counts, device=difference.device)
    each = difference * (2 / sizes.to(difference.dtype)).unsqueeze(1)
    return (difference * difference).sum(1), each.repeat_interleave(sizes, 0)


def cross_entropy_by_features(
    net: Network, rows: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row of features, its gradient by the row, and the logits."""
    weight, bias = net.classifier.weight.detach(), net.classifier.bias.detach()
    logits = torch.nn.functional.linear(rows, weight, bias)
    by_logits = logits.softmax(1)
    places = torch.arange(len(rows), device=rows.device)
    losses = torch.logsumexp(logits, 1) - logits[places, labels]
    by_logits[places, labels] -= 1
    return losses, by_logits @ weight, logits
