"""The engine for any network: reverse-over-reverse autograd, segment by segment, in pieces.

The definition of what the fused engine computes. Weights are replaced by leaves of our own, so that
frozen networks work and nothing reaches the network's `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddfast.engine.segments import check_labels, pieces

Distance = Callable[[list[Tensor], slice], tuple[Tensor, list[Tensor]]]
"""From gradients (segments, *shape) and which segments they are: losses and d loss / d gradient."""


def leaves(net: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Detached weights by name; those of `names` require gradients."""
    return {name: p.detach().requires_grad_(name in names) for name, p in net.named_parameters()}


def loss_of(
    net: nn.Module, weights: Mapping[str, Tensor], x: Tensor, labels: Tensor, share: Tensor
) -> Tensor:
    """Cross-entropy of the images, each by its share, summed."""
    logits = torch.func.functional_call(net, dict(weights), (x,))
    check_labels(labels, logits.shape[1])
    return (cross_entropy(logits, labels, reduction="none") * share).sum()


def gradients(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    counts: list[int],
    share: Tensor,
    names: Sequence[str],
    most: int,
) -> list[Tensor]:
    """Weight gradients of each segment, (segments, *shape) in the order of `names`."""
    weights = leaves(net, names)
    wanted = [weights[name] for name in names]
    out = [w.new_zeros((len(counts), *w.shape)) for w in wanted]
    position = 0
    for segment, count in enumerate(counts):
        for start in range(position, position + count, most):
            here = slice(start, min(start + most, position + count))
            with torch.enable_grad():
                loss = loss_of(net, weights, images[here], labels[here], share[here])
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            for total, part in zip(out, found, strict=True):
                if part is not None:
                    total[segment] += part
        position += count
    return out


def match(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    counts: list[int],
    share: Tensor,
    names: Sequence[str],
    distance: Distance,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Each segment's loss, and the gradient of their sum with respect to the images.

    A segment of at most `most` images goes through once, with the graph of its gradient. A longer
    one goes through twice: its weight gradient first, in pieces, and from it V = d loss / d
    gradient; then, since <V, gradient> is a sum over images, the gradient of that piece by piece.
    """
    weights = leaves(net, names)
    wanted = [weights[name] for name in names]
    losses, out = [], torch.zeros_like(images)
    position = 0
    for segment, count in enumerate(counts):
        whole = slice(position, position + count)
        position += count
        here = slice(segment, segment + 1)
        v: list[Tensor] | None = None
        if count > most or count == 0:
            first = gradients(net, images[whole], labels[whole], [count], share[whole], names, most)
            loss, v = distance(first, here)
        for piece in pieces([count], most) if count else ():
            inside = slice(whole.start + piece.start, whole.start + piece.stop)
            with torch.enable_grad():
                x = images[inside].detach().requires_grad_()
                value = loss_of(net, weights, x, labels[inside], share[inside])
                found = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
            if v is None:
                filled = [
                    torch.zeros_like(w) if g is None else g.detach()
                    for w, g in zip(wanted, found, strict=True)
                ]
                loss, v = distance([g.unsqueeze(0) for g in filled], here)
            pairs = [
                (g, d[0])
                for g, d in zip(found, v, strict=True)
                if g is not None and g.requires_grad
            ]
            if pairs:
                by_images = torch.autograd.grad(
                    [g for g, _ in pairs], x, [d for _, d in pairs], allow_unused=True
                )[0]
                if by_images is not None:
                    out[inside] = by_images
        losses.append(loss)
    return torch.cat(losses), out
