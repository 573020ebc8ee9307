"""Weight gradients of all classes at once, and their matching, for any network."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddfast.engine import fused, general
from ddfast.engine.chain import Chain, recognise
from ddfast.engine.graph import replayed
from ddfast.engine.segments import (
    Piece,
    check_batch,
    check_names,
    groups,
    pieces,
    shares,
    weight_names,
)
from ddfast.losses import gradient_distance_and_gradient
from ddfast.memory import DEFAULT, FIRST_ORDER, SECOND_ORDER, activation_bytes, parse_memory
from ddfast.ops.first_block import MOST_CHANNELS
from ddfast.ops.registry import refuse_transforms

PATHS = ("auto", "fused", "general")
ALGORITHMS = ("auto", "direct", "winograd")

CACHE = 48 << 20
"""Bytes of activations that go through the network together on a CPU, to stay in its cache."""

# Peak numbers held per image of the fused passes, in (convolution outputs, block inputs); measured.
FUSED_FIRST = (3.0, 2.0)
FUSED_SECOND = (6.0, 5.0)


@dataclass(frozen=True)
class Plan:
    """How a network's passes are divided: images that may, and that should, go together."""

    chain: Chain | None
    first: int  # most images of a first-order pass
    second: int  # most images of a second-order pass
    together: int  # images of several segments that are better taken together than apart


def plan(net: nn.Module, images: Tensor, memory: int | str | None, path: str) -> Plan:
    """Which path serves the network, and in what pieces.

    Raises:
        ValueError: an unknown path; the fused path for a network it cannot serve; a budget that
            holds not even one image.
    """
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}, expected one of {', '.join(PATHS)}")
    chain = None if path == "general" else recognise(net)
    if path == "fused" and chain is None:
        raise ValueError(
            f"path: 'fused' cannot serve this {type(net).__name__}; it serves ddfast's ConvNet "
            "with instance, group or no normalisation in float32 or float64"
        )
    budget = DEFAULT if memory is None else parse_memory(memory)
    image = tuple(images.shape[1:])
    if chain is None:
        each = activation_bytes(net, image) if len(image) == 3 else 4 * images[:1].numel()
        needs = FIRST_ORDER * each, SECOND_ORDER * each
        together = budget // max(int(needs[1]), 1)
    else:
        outputs, inputs = chain.elements(image)
        size = images.element_size()
        needs = (
            size * (FUSED_FIRST[0] * outputs + FUSED_FIRST[1] * inputs),
            size * (FUSED_SECOND[0] * outputs + FUSED_SECOND[1] * inputs),
        )
        together = CACHE // (size * (outputs + inputs))
    if needs[1] > budget:
        raise ValueError(
            f"memory: the budget of {budget} bytes is too small, one image needs {needs[1]:.0f}"
        )
    first, second = int(budget // needs[0]), int(budget // needs[1])
    if images.device.type == "cpu" and chain is not None:
        first, together = min(first, max(together, 1)), max(together, 1)
    else:
        together = second
    return Plan(chain, first, second, min(second, together))


def class_gradients(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    memory: int | str | None = None,
    *,
    path: str = "auto",
    algorithm: str = "auto",
) -> list[Tensor]:
    """Gradients of each class's mean cross-entropy with respect to the network's weights.

    Equal to a loop over classes, from one pass over all images: the images of a class differ from
    the others' only in where their share of the weight gradient is added (exact for networks in
    which the images of a batch do not depend on each other). Outside autograd.

    Args:
        net: any classifier; :class:`ddfast.nets.convnet.ConvNet` runs on fused operators. Batch
            normalisation must be in evaluation mode. Its `.grad` fields are left alone.
        images: (N, channels, H, W), in the network's dtype and device.
        labels: (N,) integers in any order, each below `num_classes`.
        num_classes: how many classes to return.
        memory: bytes for activations, as "8GiB" or a number (default 1 GiB). Results do not depend
            on it beyond rounding.
        path: "fused", "general" (autograd), or "auto", fused where it can be.
        algorithm: of the fused convolutions: "direct", "winograd" or "auto".

    Returns:
        For every parameter, in the order of `net.parameters()`, a tensor (num_classes, *shape). A
        class without images has zeros.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    num_classes = operator.index(num_classes)
    check_batch(net, images, labels, [len(images)])
    if num_classes < 1 or (len(labels) and int(labels.max()) >= num_classes):
        most = int(labels.max()) if len(labels) else -1
        raise ValueError(f"num_classes: got {num_classes}, and the largest label is {most}")
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    order = torch.argsort(labels, stable=True)
    return segment_gradients(
        net, images[order], labels[order], counts, None, memory, path=path, algorithm=algorithm
    )


@torch.no_grad()
def segment_gradients(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    names: Sequence[str] | None = None,
    memory: int | str | None = None,
    *,
    weights: Tensor | None = None,
    path: str = "auto",
    algorithm: str = "auto",
    recompute: bool | None = None,
) -> list[Tensor]:
    """As :func:`class_gradients`, of consecutive segments of images whose labels may differ.

    Args:
        counts: sizes of the segments, which sum to N.
        names: the parameters wanted (see :func:`weight_names`), by default all.
        weights: (N,), floating: the factor of each image's cross-entropy in place of 1 / (size of
            its segment).
        recompute: compute the first convolution again in the backward pass rather than store it,
            on the fused path. Default: where that is faster, which is on CPUs, for images of up to
            four channels.

    Returns:
        (segments, *shape) for each name.
    """
    counts = check_batch(net, images, labels, counts)
    names = check_names(net, names)
    _check_call(net, images, algorithm)
    images, share = images.detach(), shares(counts, images, weights)
    p = plan(net, images, memory, path)
    if p.chain is None:
        return general.gradients(net, images, labels, counts, share, names, p.first)
    again = recompute
    if again is None:
        again = images.device.type == "cpu" and images.shape[1] <= MOST_CHANNELS
    parameters = dict(net.named_parameters())
    out = [parameters[name].new_empty((len(counts), *parameters[name].shape)) for name in names]
    written = 0  # segments before this one have been begun
    # Below autograd's dispatch, which costs more than the smallest of these operators; what is
    # returned was made outside and is an ordinary tensor.
    with torch.inference_mode():
        for piece in pieces(counts, p.first) if len(images) else ():
            found, _ = fused.forward_backward(
                p.chain,
                images[piece.images],
                labels[piece.images],
                share[piece.images],
                piece.counts,
                names,
                algorithm,
                keep=False,
                recompute=again,
            )
            begun = (
                piece.first < written
            )  # only its first segment can have images in earlier pieces
            fresh = piece.first + begun
            for name, total in zip(names, out, strict=True):
                part = found[name]
                if begun:
                    total[piece.first] += part[0]
                total[written:fresh] = 0
                total[fresh : piece.segments.stop] = part[begun:]
            written = max(written, piece.segments.stop)
    for total in out:
        total[written:] = 0
    return out


@torch.no_grad()
def match_gradients(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    real: Sequence[Tensor],
    names: Sequence[str] | None = None,
    metric: str = "row_cosine",
    eps: float = 1e-6,
    memory: int | str | None = None,
    *,
    path: str = "auto",
    algorithm: str = "auto",
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Distance of each segment's weight gradient to a given one, and its gradient to the images.

    The matching step of DC, DSA, DCC and IDC (Zhao, Mopuri and Bilen, ICLR 2021, eq. 8), without
    `create_graph`: the distance gives V = d loss / d gradient, and d loss / d images is the tangent
    of the ordinary image gradient when the weights move along V, which costs one tangent forward
    and one tangent backward pass (forward-over-reverse). Exact, not a finite difference. Networks
    other than ConvNet go through autograd's double backward, with the same result.

    Args:
        net, images, labels, counts, memory, path, algorithm: as in :func:`segment_gradients`.
        real: (segments, *shape) for each name, constants in the images' dtype.
        names: the parameters matched, by default those of two or more dimensions for "row_cosine",
            which ignores the others, and all for the other metrics.
        metric, eps: as in :func:`ddfast.losses.gradient_distance`.
        graph: on a GPU, record the step as a CUDA graph and replay it in later calls with the same
            network and shapes: one launch in place of dozens. Only for the fused path.

    Returns:
        ``(losses, gradient)``: (segments,), and the gradient of their sum with respect to the
        images, in their shape. Chain it to what made the images with
        ``torch.autograd.grad(images, leaf, gradient)``.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    counts = check_batch(net, images, labels, counts)
    if names is None:
        names = weight_names(net, "matrices" if metric == "row_cosine" else "all")
    names = check_names(net, names)
    _check_call(net, images, algorithm)
    parameters = dict(net.named_parameters())
    real = list(real)
    if len(real) != len(names):
        raise ValueError(f"real: got {len(real)} tensors, expected {len(names)}: {names}")
    for name, tensor in zip(names, real, strict=True):
        expected = (len(counts), *parameters[name].shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"real: got {tuple(tensor.shape)} for {name}, expected {expected}")

    images, share = images.detach(), shares(counts, images, None)
    p = plan(net, images, memory, path)
    if graph and p.chain is None:
        raise ValueError("graph: only the fused path, of ddfast's ConvNet, can be recorded")

    def step(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x, y, factor, *target = tensors

        def distance(found: list[Tensor], segments: slice) -> tuple[Tensor, list[Tensor]]:
            wanted = [tensor[segments] for tensor in target]
            return gradient_distance_and_gradient(found, wanted, metric, eps, batched=True)

        if p.chain is None:
            return general.match(net, x, y, counts, factor, names, distance, p.second)
        out, losses = torch.empty_like(x), x.new_empty(len(counts))
        with torch.inference_mode():  # as in segment_gradients
            for group in groups(counts, p.together):
                batch = x[group.images], y[group.images], factor[group.images]
                losses[group.segments] = _match_group(
                    p, batch, group, names, distance, algorithm, out[group.images]
                )
        return losses, out

    inputs = [images, labels, share, *real]
    if graph:
        key = (tuple(counts), names, metric, eps, p.second, p.together, algorithm)
        return replayed(net, key, inputs, step)
    return step(inputs)


def _match_group(
    p: Plan,
    batch: tuple[Tensor, Tensor, Tensor],
    group: Piece,
    names: Sequence[str],
    distance: general.Distance,
    algorithm: str,
    out: Tensor,
) -> Tensor:
    """Losses of a group of segments; writes their image gradients into `out`."""
    assert p.chain is not None
    counts, total = group.counts, group.stop - group.start
    if total <= p.second:
        found, trace = fused.forward_backward(p.chain, *batch, counts, names, algorithm, keep=True)
        losses, v = distance([found[name] for name in names], group.segments)
        out.copy_(fused.tangent(p.chain, trace, dict(zip(names, v, strict=True)), algorithm))
        return losses
    # One segment too large for the budget: its weight gradient in pieces, then each piece again.
    sums: list[Tensor] = []
    for piece in pieces(counts, p.second):
        found, _ = fused.forward_backward(
            p.chain, *_of(batch, piece), piece.counts, names, algorithm, keep=False
        )
        here = [found[name] for name in names]
        sums = [a.add_(b) for a, b in zip(sums, here, strict=True)] if sums else here
    losses, v = distance(sums, group.segments)
    direction = dict(zip(names, v, strict=True))
    for piece in pieces(counts, p.second):
        _, trace = fused.forward_backward(
            p.chain, *_of(batch, piece), piece.counts, names, algorithm, keep=True
        )
        out[piece.images] = fused.tangent(p.chain, trace, direction, algorithm)
    return losses


def _of(batch: tuple[Tensor, Tensor, Tensor], piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    images, labels, share = batch
    return images[piece.images], labels[piece.images], share[piece.images]


def _check_call(net: nn.Module, images: Tensor, algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: got {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
    refuse_transforms(images, *net.parameters())
