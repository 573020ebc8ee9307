"""The two passes that an unrolled student needs: its gradient, and that gradient's tangent.

A student's parameters are one flat vector, as trajectories are. With g its gradient and v any
vector, d<g, v>/d images and d<g, v>/d parameters (the Hessian times v) are the tangents of the
ordinary gradients when the parameters move along v: one forward and backward pass with its tangent,
and no graph of a gradient (forward-over-reverse). ConvNets run on the fused operators; any other
network through autograd's double backward. Batches go through in pieces, so that memory does not
grow with them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ddfast.engine import fused
from ddfast.engine.gradients import ALGORITHMS, Plan, plan
from ddfast.engine.segments import check_labels


@dataclass(frozen=True)
class Tangent:
    """Derivatives of s = <gradient, direction>; see :meth:`Student.tangent`.

    Attributes:
        slope: 0-d, s itself, in the dtype of the parameters as all of them.
        by_images: in the shape and dtype of the images.
        by_parameters: (P,), in that dtype: the Hessian times the direction; None if not asked for.
        by_labels: (N, classes), in that dtype, of soft labels; None if not asked for.
    """

    slope: Tensor
    by_images: Tensor
    by_parameters: Tensor | None
    by_labels: Tensor | None


class _Copy(NamedTuple):
    """A private copy of the network, its parameters views of one vector."""

    net: nn.Module
    theta: Tensor
    plans: dict[tuple[int, ...], Plan]


class Student:
    """A network that is trained on a minibatch at a time, its parameters given from outside.

    The loss is the mean cross-entropy of the batch. The network itself, its running statistics
    included, is never changed.

    Args:
        net: any classifier, in the mode in which it is to be trained.
        memory: bytes for activations, as "8GiB" or a number (default 1 GiB). Results do not depend
            on it beyond rounding.
        path: "fused", "general" (autograd), or "auto", fused where it can be.
        algorithm: of the fused convolutions: "direct", "winograd" or "auto".

    Attributes:
        size: how many parameters there are, P, in the order of `net.parameters()`.

    Raises:
        ValueError: dropout in training mode; an unknown path or algorithm.
    """

    def __init__(
        self,
        net: nn.Module,
        memory: int | str | None = None,
        path: str = "auto",
        algorithm: str = "auto",
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"algorithm: got {algorithm!r}, expected one of {', '.join(ALGORITHMS)}"
            )
        self.memory, self.path, self.algorithm = memory, path, algorithm
        self.net = net
        self.names = [name for name, _ in net.named_parameters()]
        self.shapes = [p.shape for p in net.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.size = sum(self.sizes)
        self.whole = False  # whether the images of a batch depend on each other
        for name, module in net.named_modules():
            if not module.training:
                continue
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise ValueError(
                    f"net: dropout {name!r} is in training mode and would draw at random"
                )
            self.whole |= isinstance(module, nn.modules.batchnorm._BatchNorm)
        self._copy: _Copy | None = None

    @torch.no_grad()
    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and its gradient, outside autograd.

        Args:
            theta: (P,), floating, the parameters in the order of `net.parameters()`.
            images: (N, channels, H, W), in the dtype and on the device of theta.
            labels: (N,) int64, or (N, classes), weights of the classes that need not sum to one.

        Returns:
            0-d, and (P,), in the dtype of theta.

        Raises:
            ValueError: a label for which the network has no output.
        """
        work, steps = self._loaded(theta, images)
        total, loss = torch.zeros_like(theta), theta.new_zeros(())
        parts = self._parts(total)
        if steps.chain is None:
            for here in self._pieces(len(images), steps.first):
                with torch.enable_grad():
                    leaf = theta.detach().requires_grad_()
                    value = self._loss(work, leaf, images[here].detach(), labels[here], len(images))
                    (found,) = torch.autograd.grad(value, leaf)
                total += found
                loss += value.detach()
            return loss, total
        with torch.inference_mode():  # below autograd's dispatch, as in segment_gradients
            for here in self._pieces(len(images), steps.first):
                x, y = images[here], labels[here]
                gradients, trace = fused.forward_backward(
                    *(steps.chain, x, y, self._share(x, len(images)), [len(x)], self.names),
                    *(self.algorithm, False, _recomputes(x)),
                )
                for part, name in zip(parts, self.names, strict=True):
                    part += gradients[name][0]
                assert trace.logits is not None
                loss += _cross_entropy(trace.logits, y) / len(images)
        return loss, total

    @torch.no_grad()
    def tangent(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        by_parameters: bool = True,
        by_labels: bool = False,
    ) -> Tangent:
        """Derivatives of <gradient, direction>, outside autograd; the direction is a constant.

        Args:
            theta, images, labels: as in :meth:`gradient`.
            direction: (P,), in the dtype of theta.
            by_parameters: compute the Hessian times the direction, too.
            by_labels: compute the derivative by soft labels, too.
        """
        work, steps = self._loaded(theta, images)
        out = Tangent(
            theta.new_zeros(()),
            torch.empty_like(images),
            torch.zeros_like(theta) if by_parameters else None,
            torch.empty_like(labels) if by_labels else None,
        )
        if steps.chain is None:
            self._general_tangent(work, steps, out, theta, images, labels, direction)
            return out
        parts = [] if out.by_parameters is None else self._parts(out.by_parameters)
        along = {
            name: part.unsqueeze(0)
            for name, part in zip(self.names, self._parts(direction.detach()), strict=True)
        }
        with torch.inference_mode():
            for here in self._pieces(len(images), min(steps.second, steps.together)):
                x, y = images[here], labels[here]
                share = self._share(x, len(images))
                _, trace = fused.forward_backward(
                    steps.chain, x, y, share, [len(x)], (), self.algorithm, keep=True
                )
                found: dict[str, Tensor] | None = {} if by_parameters else None
                out.by_images[here] = fused.tangent(
                    steps.chain, trace, along, self.algorithm, found
                )
                for part, name in zip(parts, self.names, strict=False):
                    assert found is not None
                    part += found[name][0]
                moved, p = trace.logits_tangent, trace.probabilities
                assert moved is not None and p is not None and trace.by_logits is not None
                out.slope.add_((trace.by_logits * moved).sum())
                if out.by_labels is not None:
                    mean = (p * moved).sum(1, keepdim=True)
                    out.by_labels[here] = (mean - moved) * share.unsqueeze(1)
        return out

    def _general_tangent(
        self,
        work: _Copy,
        steps: Plan,
        out: Tangent,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
    ) -> None:
        """By double backward, piece by piece: the gradient is a sum over images."""
        for here in self._pieces(len(images), steps.second):
            x, y = images[here].detach().requires_grad_(), labels[here].detach()
            leaf = theta.detach().requires_grad_()
            leaves = [x]
            leaves += [leaf] if out.by_parameters is not None else []
            leaves += [y.requires_grad_()] if out.by_labels is not None else []
            with torch.enable_grad():
                loss = self._loss(work, leaf, x, y, len(images))
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
                slope = torch.dot(gradient, direction.detach())
            found = list(torch.autograd.grad(slope, leaves, materialize_grads=True))
            out.slope.add_(slope.detach())
            out.by_images[here] = found.pop(0)
            if out.by_parameters is not None:
                out.by_parameters.add_(found.pop(0))
            if out.by_labels is not None:
                out.by_labels[here] = found.pop(0)

    def _loss(self, work: _Copy, theta: Tensor, x: Tensor, y: Tensor, count: int) -> Tensor:
        """Cross-entropy of a piece, its sum over `count`."""
        weights = dict(zip(self.names, self._parts(theta), strict=True))
        buffers = {name: buffer.clone() for name, buffer in work.net.named_buffers()}
        logits = torch.func.functional_call(work.net, {**weights, **buffers}, (x,))
        return _cross_entropy(logits, y) / count

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes of the parameters."""
        pieces = flat.split(self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def _pieces(self, images: int, most: int) -> Iterator[slice]:
        """Of a batch, as even as can be."""
        count = 1 if self.whole else -(-images // most)
        for place in range(count):
            yield slice(images * place // count, images * (place + 1) // count)

    def _share(self, x: Tensor, count: int) -> Tensor:
        return x.new_full((len(x),), 1 / count)

    def _loaded(self, theta: Tensor, images: Tensor) -> tuple[_Copy, Plan]:
        """The network with these parameters, and how images of this shape go through it."""
        work = self._copy
        if work is None or (work.theta.dtype, work.theta.device) != (theta.dtype, theta.device):
            net = copy.deepcopy(self.net).to(theta.device, theta.dtype).requires_grad_(False)
            work = self._copy = _Copy(net, torch.empty_like(theta), {})
            for p, part in zip(net.parameters(), self._parts(work.theta), strict=True):
                p.data = part
        work.theta.copy_(theta)
        shape = tuple(images.shape[1:])
        if shape not in work.plans:
            work.plans[shape] = plan(work.net, images, self.memory, self.path)
        return work, work.plans[shape]


def _recomputes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[1] <= fused.first.MOST_CHANNELS


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over images."""
    if labels.is_floating_point():
        return -(labels * log_softmax(logits, 1)).sum()
    check_labels(labels, logits.shape[1])
    return cross_entropy(logits, labels, reduction="sum")
