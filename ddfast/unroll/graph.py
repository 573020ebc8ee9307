"""All steps of a student in one graph of autograd: the definition, and MTT's own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ddfast.unroll.arguments import of_step
from ddfast.unroll.optimisers import Optimiser


def final_parameters(
    net: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    batches: Sequence[Tensor],
    optimiser: Optimiser,
    augment: Callable[[Tensor, int], Tensor] | None,
    soft: str,
    first: int,
) -> Tensor:
    """As :func:`ddfast.unroll.final_parameters`; the steps before `first` have no graph."""
    shapes = [(name, p.shape) for name, p in net.named_parameters()]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    state = optimiser.begin(start)
    outside = torch.is_grad_enabled()
    for number, rows in enumerate(batches):
        rate = of_step(lr, number)
        graph = outside and number >= first
        with torch.set_grad_enabled(graph):
            x = images[rows] if augment is None else augment(images[rows], number)
            y = labels[rows]
            if soft == "logits" and y.is_floating_point():
                y = y.softmax(1)
        with torch.enable_grad():
            theta = state[0] if graph else state[0].detach().requires_grad_()
            if not theta.requires_grad:
                theta = theta.requires_grad_()
            parts = theta.split([shape.numel() for _, shape in shapes])
            parameters = {
                name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)
            }
            logits = torch.func.functional_call(net, {**parameters, **buffers}, (x,))
            loss = mean_loss(logits, y)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=graph)
        with torch.set_grad_enabled(graph):
            state = optimiser.step(state, gradient, rate, number)
    return state[0]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hard labels, or of weights of the classes that need not sum to one."""
    if not labels.is_floating_point():
        return cross_entropy(logits, labels)
    return -(labels * log_softmax(logits, 1)).sum(1).mean()
