"""The parameters of a student after T steps, and their reverse, one recomputed step at a time.

With theta_{i+1} = theta_i - lr g_i, g_i the gradient of the mean cross-entropy of minibatch i at
theta_i, and v_T the gradient of any loss of theta_T, the exact gradient is

    images  += -lr d<g_i, v_{i+1}> / d images_i        labels and lr alike
    v_i      = v_{i+1} - lr H_i v_{i+1}                H_i the Hessian of minibatch i at theta_i

for i = T - 1 .. 0 (Deng and Russakovsky, NeurIPS 2022; Wang et al., 2018). "frozen" leaves out the
second line: theta_i counts as a constant in every g_i, as TESLA has it (Cui et al., ICML 2023).
Both take the tangent of one forward and backward pass per step (`ddfast.engine.Student`), in place
of the graphs of all steps, which "graph" keeps as MTT's code does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.engine import Student
from ddfast.ops.registry import refuse_transforms
from ddfast.unroll import graph
from ddfast.unroll.arguments import ADJOINTS, check_arguments, of_step
from ddfast.unroll.history import HISTORIES, Checkpoints, Kept
from ddfast.unroll.optimisers import SGD, Optimiser, State

_PLAIN = SGD()

Augment = Callable[[Tensor, int], Tensor]


def unroll(
    net: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Sequence[Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    adjoint: str = "exact",
    **options: Any,
) -> Tensor:
    """`loss_fn` of a student's parameters after len(batches) steps, with derivatives.

    The loss may depend on other tensors that require gradients; they get theirs.

    Args:
        loss_fn: takes the flat parameters (P,) and returns a 0-d tensor.
        net, start, images, labels, lr, batches, adjoint, options: as in :func:`final_parameters`.

    Returns:
        0-d.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: got {type(loss_fn).__name__}, expected a function of (P,)")
    loss = loss_fn(final_parameters(net, start, images, labels, lr, batches, adjoint, **options))
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: returned {shape}, expected a 0-d tensor")
    return loss


@torch.compiler.disable
def final_parameters(
    net: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Sequence[Tensor],
    adjoint: str = "exact",
    *,
    optimiser: Optimiser = _PLAIN,
    augment: Augment | None = None,
    soft: str = "probabilities",
    window: int | None = None,
    history: str = "device",
    half_image_gradient: bool = False,
    memory: int | str | None = None,
    path: str = "auto",
) -> Tensor:
    """Parameters of a student after len(batches) optimiser steps, differentiable to first order.

    Each step takes the gradient of the mean cross-entropy of `images[batches[i]]`. The network's
    own parameters play no part and stay as they are, and so do the running statistics of batch
    normalisation. Peak memory does not depend on the number of steps but for the history.

    Args:
        net: any classifier, in the mode in which it is to be trained; ddfast's ConvNet runs on
            fused operators.
        start: (P,), floating, the parameters before the first step, in the order of
            `net.parameters()`.
        images: (N, channels, H, W), in the dtype and on the device of start.
        labels: (N,) int64; or (N, classes), soft ones in the dtype of start, see `soft`.
        lr: the step size, a number, or floating and 0-d, or (T,), one for each step.
        batches: T int64 vectors of positions in `images`, each not empty; repetitions are fine.
        adjoint: "exact"; "frozen": every theta_i held constant in the gradient of its step, as
            TESLA does; "graph": exact by autograd, with the graphs of all steps in memory.
        optimiser: `SGD(momentum)` or `Adam(betas, eps)`.
        augment: called as augment(images of the batch, number of the step), differentiable in the
            images. It is called twice for each step and must return the same bits.
        soft: what soft labels are: "probabilities", weights of the classes that need not sum to
            one, or "logits", of which the softmax is taken.
        window: only the last so many steps have derivatives; the state before them, the
            optimiser's included, counts as a constant (Feng et al., ICLR 2024). None for all.
        history: where the parameters of every step wait: "device", "host", or "checkpoints", at
            every sqrt(T)-th step only, the others computed again.
        half_image_gradient: multiply the gradient of the images by one half, as the published code
            of TESLA does by mistake (its lr_img belong to that).
        memory: bytes for activations, as "8GiB" or a number (default 1 GiB). Results do not depend
            on it beyond rounding.
        path: "fused", "general" (autograd), or "auto", fused where it can be.

    Returns:
        (P,). Gradients reach start, images, soft labels and lr, those that require them. A second
        derivative raises NotImplementedError, but with "graph".

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    lr = check_arguments(net, start, images, labels, lr, batches, soft, window)
    for name, value, known in (
        ("adjoint", adjoint, ADJOINTS),
        ("history", history, HISTORIES),
    ):
        if value not in known:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
    refuse_transforms(start, images, labels, lr)
    steps = len(batches)
    first = 0 if window is None else steps - window
    if adjoint == "graph":
        if half_image_gradient:
            raise ValueError("half_image_gradient: True is not offered with adjoint 'graph'")
        return graph.final_parameters(
            net, start, images, labels, lr, batches, optimiser, augment, soft, first
        )
    plan = _Plan(
        student=Student(net, memory, path),
        batches=list(batches),
        optimiser=optimiser,
        augment=augment,
        logits=soft == "logits" and labels.is_floating_point(),
        first=first,
        history=history,
        exact=adjoint == "exact",
        image_factor=0.5 if half_image_gradient else 1.0,
    )
    result: Tensor = _FinalParameters.apply(start, images, labels, lr, plan)
    return result


@dataclass(frozen=True)
class _Plan:
    """All that is not differentiated."""

    student: Student
    batches: list[Tensor]
    optimiser: Optimiser
    augment: Augment | None
    logits: bool
    first: int
    history: str
    exact: bool
    image_factor: float

    def images_of(self, images: Tensor, number: int) -> Tensor:
        """The minibatch of a step as the student sees it."""
        x = images[self.batches[number]]
        return x if self.augment is None else self.augment(x, number)

    def labels_of(self, labels: Tensor, number: int) -> Tensor:
        y = labels[self.batches[number]]
        return y.softmax(1) if self.logits else y


class _FinalParameters(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, start: Tensor, images: Tensor, labels: Tensor, lr: Tensor, plan: _Plan
    ) -> Tensor:
        ctx.save_for_backward(start, images, labels, lr)
        ctx.plan = plan
        steps = len(plan.batches)
        differentiated = any(ctx.needs_input_grad[:4])
        ctx.history = (
            Checkpoints(steps - plan.first)
            if plan.history == "checkpoints"
            else Kept(plan.history == "host")
        )
        state = plan.optimiser.begin(start.clone())
        for number in range(steps):
            record, after = _step(plan, state, images, labels, lr, number, ctx.needs_input_grad[3])
            if differentiated and number >= plan.first:
                ctx.history.put(number, state, record)
            state = after
        return state[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        start, images, labels, lr = ctx.saved_tensors
        needed = ctx.needs_input_grad
        with torch.no_grad():
            found = _reverse(ctx.plan, ctx.history, gradients[0], images, labels, lr, needed)
        wanted = [part if need else None for part, need in zip(found, needed, strict=False)]
        if torch.is_grad_enabled():  # somebody wants a graph of this gradient
            wanted = _refusing(wanted, [gradients[0], start, images, labels, lr])
        return *wanted, None


def _step(
    plan: _Plan,
    state: State,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    number: int,
    learns_lr: bool,
) -> tuple[State, State]:
    """(what the reverse of the step needs, the state after it)."""
    x, y = plan.images_of(images, number), plan.labels_of(labels, number)
    _, gradient = plan.student.gradient(state[0], x, y)
    after = plan.optimiser.step(state, gradient, of_step(lr, number), number)
    return plan.optimiser.record(state, gradient, after, learns_lr), after


def _reverse(
    plan: _Plan,
    history: Kept | Checkpoints,
    by_theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of start, images, labels and lr."""
    by_images, by_lr = torch.zeros_like(images), torch.zeros_like(lr)
    by_labels = torch.zeros_like(labels) if needed[2] else None
    adjoint = plan.optimiser.adjoint(by_theta)

    def redo(state: State, number: int) -> tuple[State, State]:
        return _step(plan, state, images, labels, lr, number, needed[3])

    for number, record in history.reverse(images.device, redo):
        rate = of_step(lr, number)
        pulled = plan.optimiser.pull(adjoint, record, rate, number)
        adjoint = pulled.adjoint
        rows = plan.batches[number]
        with torch.enable_grad():  # of the augmentation, and of the softmax of logits
            x_leaf = images[rows].requires_grad_()
            x = x_leaf if plan.augment is None else plan.augment(x_leaf, number)
            y_leaf = labels[rows]
            if needed[2]:
                y_leaf.requires_grad_()
            y = y_leaf.softmax(1) if plan.logits else y_leaf
        found = plan.student.tangent(
            record[0], x.detach(), y.detach(), pulled.direction, plan.exact, needed[2]
        )
        if needed[1]:
            part = _through(x, x_leaf, found.by_images)
            by_images.index_add_(0, rows, part * (plan.image_factor * pulled.factor))
        if by_labels is not None:
            assert found.by_labels is not None
            part = _through(y, y_leaf, found.by_labels)
            by_labels.index_add_(0, rows, part * pulled.factor)
        step_lr = -found.slope if pulled.by_lr is None else pulled.by_lr
        if lr.dim():
            by_lr[number] += step_lr
        else:
            by_lr += step_lr
        if plan.exact:
            assert found.by_parameters is not None
            moved = adjoint[0] + pulled.factor * found.by_parameters
            adjoint = moved, *adjoint[1:]
    return adjoint[0], by_images, by_labels, by_lr


def _through(output: Tensor, leaf: Tensor, by_output: Tensor) -> Tensor:
    """From the gradient of `output` to that of the leaf it was made of."""
    if output is leaf:
        return by_output
    return torch.autograd.grad(output, leaf, by_output)[0]


def _refusing(results: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """The same results, whose derivative is an error instead of a silent zero."""
    there = [result for result in results if result is not None]
    made = iter(_NoSecondDerivative.apply(len(there), *there, *inputs))
    return [None if result is None else next(made) for result in results]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            "ddfast.unroll: the gradient of an unrolled student has no derivative with adjoint "
            "'exact' or 'frozen' (it would be a third derivative of the network's loss); use "
            "adjoint='graph', which keeps all steps"
        )
