"""The synthetic set as IDC stores it: every image holds factor^2 smaller ones.

Source: Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022,
section 4, and the authors' code. Images live in [0, 1] here, not in normalised space.

    images, labels = initialise(dataset, ipc=10, init="mix", factor=2, generator=generator)
    decoded, decoded_labels, counts = decode(images, labels, factor=2)
    few, few_labels, few_counts = subsample(decoded, decoded_labels, counts, 128, generator)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ddfast.data.dataset import Dataset
from ddfast.data.sampling import ClassSampler, random_selection
from ddfast.ops.multi_formation import multi_formation
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.multi_formation import crop_side

__all__ = ["KINDS", "decode", "decoded_count", "initialise", "quadrants", "subsample"]

KINDS = ("single", "multi", "bound")
"""Ways to cut images into crops, see `decode`."""

INITS = ("random", "mix", "noise")
FILL = 0.5  # mid-grey, where a factor does not divide the side


# --- decoding -----------------------------------------------------------------------------------


def _check(factor: int, kind: str, bound: int) -> None:
    for name, value in (("factor", factor), ("bound", bound)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")


def _plan(count: int, factor: int, kind: str, bound: int) -> list[tuple[int, int, int]]:
    """(factor, first image, images) of each part of a class of `count` images, in order."""
    if kind == "single" or factor == 1:
        return [(factor, 0, count)]
    if kind == "multi":
        return [(each, 0, count) for each in range(1, factor + 1)]
    parts, first, decoded = [], 0, 0
    for each in range(factor, 0, -1):
        left = count - first
        # Every image left keeps a place of its own, as published: the bound is seldom reached.
        fit = max(0, bound - decoded - left) // each**2
        n = left if each == 1 else min(fit, left)
        if n:
            parts.append((each, first, n))
        first, decoded = first + n, decoded + n * each**2
    return parts


def decoded_count(ipc: int, factor: int, kind: str = "single", bound: int = 128) -> int:
    """How many images `decode` makes of a class's images.

    Args:
        ipc: stored images of the class.
        factor, kind, bound: as for `decode`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; it is named.
    """
    _check(factor, kind, bound)
    if ipc < 0:
        raise ValueError(f"ipc: got {ipc}, expected at least 0")
    return sum(n * each**2 for each, _, n in _plan(ipc, factor, kind, bound))


def _classes(labels: Tensor, counts: Sequence[int] | None, total: int) -> list[int]:
    if counts is None:
        return [int(n) for n in labels.unique_consecutive(return_counts=True)[1]]
    counts = list(counts)
    if any(not isinstance(c, int) or c < 0 for c in counts) or sum(counts) != total:
        raise ValueError(f"counts: got {counts}, expected integers >= 0 with sum {total}")
    return counts


def _check_set(images: Tensor, labels: Tensor) -> None:
    refuse_transforms(images)
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: got {images.dtype} of shape {tuple(images.shape)}, expected floating point "
            "(N, channels, H, W)"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({len(images)},)")


def decode(
    images: Tensor,
    labels: Tensor,
    factor: int,
    kind: str = "single",
    counts: Sequence[int] | None = None,
    bound: int = 128,
    fill: float = FILL,
) -> tuple[Tensor, Tensor, list[int]]:
    """The images that a network sees: the crops of each stored image, enlarged to its size.

    A side that factor does not divide is continued with `fill` below and to the right.
    Differentiable in the images to every order.

    Args:
        images: (N, channels, H, W), in [0, 1], class after class; any floating dtype.
        labels: (N,) integers, one for each.
        factor: crops per side. 1: the images and labels themselves.
        kind: "single", as above; "multi", the crops of every factor from 1 to this one; "bound", a
            mix in which the first images of each class get this factor and later ones smaller
            factors, so that a class of up to `bound` images stays within `bound` when decoded.
        counts: images of each class, in order; None: a class is a run of equal labels.
        bound: with "bound", see there. A class of more images is left as it is.
        fill: grey for images in [0, 1]; normalised ones have 0 there.

    Returns:
        Images (M, channels, H, W), class after class as before, their labels (M,), and the number
        of each class. Within a class the crops of one image follow each other in rows (the
        published code has all images of a crop together; no loss depends on it); "multi" starts
        with factor 1, "bound" with the largest.

    Raises:
        TypeError, ValueError: an argument that is out of range or does not fit the others.
        NotImplementedError: under a torch.func transform.
    """
    _check(factor, kind, bound)
    _check_set(images, labels)
    counts = _classes(labels, counts, len(images))
    if factor == 1:
        return images, labels, counts
    if kind == "single":
        crops = factor**2
        decoded = multi_formation(images, factor, "image", fill)
        return decoded, labels.repeat_interleave(crops), [crops * n for n in counts]
    plans = [_plan(n, factor, kind, bound) for n in counts]
    starts = list(itertools.accumulate(counts, initial=0))
    # One pass for each factor over all classes; then the parts are brought into class order.
    parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for each in sorted({f for plan in plans for f, _, _ in plan}):
        pieces = [
            (c, starts[c] + first, n)
            for c, plan in enumerate(plans)
            for f, first, n in plan
            if f == each
        ]
        rows = torch.cat([torch.arange(first, first + n) for _, first, n in pieces])
        rows = rows.to(images.device)
        whole = len(rows) == len(images)  # then they are all images, in order
        chosen = images if whole else images.index_select(0, rows)
        sizes = [n * each**2 for _, _, n in pieces]
        decoded = chosen if each == 1 else multi_formation(chosen, each, "image", fill)
        repeated = labels[rows.to(labels.device)].repeat_interleave(each**2)
        for (c, _, _), image, label in zip(
            pieces, decoded.split(sizes), repeated.split(sizes), strict=True
        ):
            parts[c, each] = image, label
    order = [parts[c, f] for c, plan in enumerate(plans) for f, _, _ in plan]
    totals = [sum(n * f**2 for f, _, n in plan) for plan in plans]
    if not order:
        return images, labels, totals
    return torch.cat([i for i, _ in order]), torch.cat([k for _, k in order]), totals


def quadrants(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """IDM's partition and expand (Zhao G. et al., CVPR 2023, section 3.2): `decode` in its order.

    All top left quadrants come first, then the bottom left, top right and bottom right ones, each
    enlarged to the size of the images; no loss depends on that order. A side that is odd is
    continued with zeros, the mean of normalised images.

    Args:
        images: (N, channels, H, W), floating.
        labels: (N,) integers.

    Returns:
        (4 N, channels, H, W), and the labels four times over.

    Raises:
        ValueError: images or labels of another shape or type.
    """
    _check_set(images, labels)
    rows_first = multi_formation(images, 2, "crop", 0.0).unflatten(0, (4, len(images)))
    return rows_first[[0, 2, 1, 3]].flatten(0, 1), labels.repeat(4)


def subsample(
    images: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    batch_syn_max: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, list[int]]:
    """At most `batch_syn_max` images of each class, drawn at random without replacement.

    Args:
        images: (N, channels, H, W), floating, as all three what `decode` returned.
        labels: (N,) integers.
        counts: images of each class.
        batch_syn_max: the published default is 128; 0 or less: all.
        generator: a CPU generator; it moves only for classes that have too many.

    Returns:
        Images (M, channels, H, W), labels and counts; the arguments themselves if no class has too
        many.

    Raises:
        ValueError: images, labels or counts that do not fit together.
    """
    _check_set(images, labels)
    counts = _classes(labels, counts, len(images))
    if batch_syn_max < 1 or max(counts, default=0) <= batch_syn_max:
        return images, labels, counts
    rows = []
    for first, n in zip(itertools.accumulate(counts, initial=0), counts, strict=False):
        if n > batch_syn_max:
            rows.append(first + torch.randperm(n, generator=generator)[:batch_syn_max])
        else:
            rows.append(torch.arange(first, first + n))
    chosen = torch.cat(rows)
    kept = images.index_select(0, chosen.to(images.device))
    return kept, labels[chosen.to(labels.device)], [min(n, batch_syn_max) for n in counts]


# --- the first images ---------------------------------------------------------------------------


def _cells(side: int, factor: int, cells: str) -> list[tuple[int, int]]:
    """First pixel and number of pixels of each cell along a side; none where a crop is all grey."""
    if cells == "crops":
        crop = crop_side(side, factor)
        ends = [min(p * crop, side) for p in range(factor + 1)]
    else:
        short, rest = divmod(side, factor)
        ends = [p * short + min(p, rest) for p in range(factor + 1)]
    return [(first, end - first) for first, end in itertools.pairwise(ends)]


def _mixed(images: Tensor, factor: int, cells: str) -> Tensor:
    """(factor^2, ipc, channels, H, W) -> (ipc, channels, H, W): image k shrunk into cell k."""
    stored = torch.empty_like(images[0])
    height, width = stored.shape[2:]
    for p, (top, tall) in enumerate(_cells(height, factor, cells)):
        for q, (left, broad) in enumerate(_cells(width, factor, cells)):
            if tall and broad:
                cell = interpolate(images[p * factor + q], size=(tall, broad), mode="nearest")
                stored[:, :, top : top + tall, left : left + broad] = cell
    return stored


def initialise(
    dataset: Dataset,
    ipc: int,
    init: str,
    factor: int,
    generator: torch.Generator,
    selection: str = "first",
    cells: str = "crops",
) -> tuple[Tensor, Tensor]:
    """The starting synthetic set: `ipc` stored images of each class.

    Args:
        dataset: gives shapes, classes and the images.
        ipc: stored images per class.
        init: "random", real images (the published choice for factor 1); "mix", factor^2 real images
            shrunk (nearest neighbour) into the cells of each stored one; "noise", normal with mean
            0.5 and standard deviation 0.25, clamped to [0, 1].
        factor: crops per side.
        generator: a CPU generator, for "noise" and for random selection.
        selection: which images of a class: "first", in the order of the data set, which is what the
            authors' code takes although it calls it random; "random", drawn without replacement.
        cells: "crops": cells are what `decode` cuts out; "published": the authors' sizes, which
            differ where 0 < side mod factor < factor - 1 (64 pixels and factor 3, say: crops then
            hold parts of two images). They agree everywhere else.

    Returns:
        Images float32 (num_classes * ipc, channels, H, W) in [0, 1], class 0 first, and labels
        int64.

    Raises:
        TypeError: a factor that is not an integer.
        ValueError: an unknown option, ipc or factor below 1, or a class with too few images: ipc
            for "random", ipc * factor^2 for "mix".
    """
    _check(factor, "single", 1)
    if ipc < 1:
        raise ValueError(f"ipc must be at least 1, got {ipc}")
    for name, value, known in (
        ("init", init, INITS),
        ("selection", selection, ("first", "random")),
        ("cells", cells, ("crops", "published")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    labels = torch.arange(dataset.num_classes).repeat_interleave(ipc)
    shape = (dataset.channels, *dataset.size)
    if init == "noise":
        drawn = torch.randn(len(labels), *shape, generator=generator, dtype=torch.float32)
        return (drawn / 4 + 0.5).clamp(0, 1), labels
    needed = ipc * factor**2 if init == "mix" else ipc
    if selection == "random":
        images, _ = random_selection(dataset, needed, generator)
    else:
        images = dataset.train_images[_first(dataset, needed)]
    images = images.float() / 255
    if init == "mix":
        classes = images.view(dataset.num_classes, factor**2, ipc, *shape)
        images = torch.cat([_mixed(each, factor, cells) for each in classes])
    return images, labels


def _first(dataset: Dataset, n: int) -> Tensor:
    """Positions of the first n images of each class, class 0 first."""
    sampler = ClassSampler(dataset.train_labels, dataset.num_classes)
    for c, count in enumerate(sampler.counts):
        if count < n:
            raise ValueError(
                f"class {c} ({dataset.class_names[c]}) of {dataset.name} has {count} training "
                f"images, fewer than the {n} needed"
            )
    return torch.cat([sampler.indices(c)[:n] for c in range(dataset.num_classes)])
