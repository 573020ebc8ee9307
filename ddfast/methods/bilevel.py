"""What DD, LinBa and RaT-BPTT share: a student of the synthetic set is to do well on real data.

    min over the set of E [ loss of theta_T on real images ],  theta_T after T steps on the set

with the mean cross-entropy as loss. The gradient goes back through the steps by `ddfast.unroll`: as
long as these are many, that is an adjoint of one recomputed step at a time, at the memory of one.
Real images go through the final student in pieces. A method says where the student starts, on which
minibatches and how it is trained, and what is done with the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddfast import nets
from ddfast.engine import Student
from ddfast.memory import FIRST_ORDER
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import setting
from ddfast.methods.pretrained import flattened
from ddfast.methods.run import Decoded, Run, check_student, refuse_batchnorm
from ddfast.random import generator
from ddfast.unroll import SGD, Optimiser, final_parameters


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of bilevel methods."""

    beside: ClassVar[tuple[str, ...]] = ()

    adjoint: Literal["exact", "frozen", "graph"] = setting(
        "gradient: exact, frozen (second order left out), or graph (exact, all steps in memory)",
        "exact",
    )
    history: Literal["device", "host", "checkpoints"] = setting(
        "where each step's parameters wait: device, host, or checkpoints (only some are kept)",
        "device",
    )


@dataclass(frozen=True)
class Training:
    """How the student of an iteration is trained, and on what it is judged.

    Attributes:
        start: (P,), flat parameters.
        batches: positions of the decoded images, one vector a step.
        lr: of the student, 0-d or (T,), with a graph to the leaves it comes from.
        real: positions of the real images of the outer loss.
        optimiser: of the student.
        augment: of the images of a step, by its number; None for none.
        augment_real: of real images, by their place in `real`.
        labels: what the student's labels are, with a graph to leaves; None for the set's.
        window: only the last so many steps are differentiated.
    """

    start: Tensor
    batches: Sequence[Tensor]
    lr: Tensor
    real: Tensor
    optimiser: Optimiser = field(default_factory=SGD)
    augment: Callable[[Tensor, int], Tensor] | None = None
    augment_real: Callable[[Tensor, slice], Tensor] | None = None
    labels: Tensor | None = None
    window: int | None = None


def check(
    run: Run, method: str, batch: int, steps: int, optimiser: Optimiser, window: int | None = None
) -> None:
    """Refuse what cannot work before the first step.

    Args:
        batch: images of a step of the student.
        steps: of it at most.
        optimiser, window: as in `Training`.

    Raises:
        ValueError: batch normalisation; a student that takes more than the memory, with what would
            fit.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, method, "whose running statistics a student does not carry along")
    run.at_once(FIRST_ORDER)
    choices = {"adjoint": config.adjoint, "history": config.history, "window": window}
    check_student(run, batch, steps, optimiser=optimiser, **choices)


def leaves_beside(run: Run) -> dict[str, Tensor]:
    """What is learned beside the images, as leaves."""
    return {name: run.tensors[name].detach().requires_grad_() for name in run.config.beside}


def gradients(
    run: Run, made: Decoded, beside: Mapping[str, Tensor], training: Training
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the outer loss by all that is learned, and the loss, 0-d."""
    config = run.config
    assert isinstance(config, Config)
    x = made.images.detach().requires_grad_()
    theta = final_parameters(
        run.net,
        training.start,
        x,
        made.labels if training.labels is None else training.labels,
        training.lr,
        training.batches,
        config.adjoint,
        optimiser=training.optimiser,
        augment=training.augment,
        window=training.window,
        history=config.history,
        memory=run.memory,
    )
    loss, by_theta = real_loss(run, theta.detach(), training)
    by_images, *others = torch.autograd.grad(
        theta, [x, *beside.values()], by_theta, materialize_grads=True
    )
    found = run.no_gradients()
    run.chain(found, made, made.images, by_images)
    found |= dict(zip(beside, others, strict=True))
    run.processed += sum(map(len, training.batches)) + len(training.real)
    return found, loss


def update(
    run: Run,
    gradients: Mapping[str, Tensor],
    loss: Tensor,
    training: Training,
    step: Callable[[], object] | None = None,
) -> Tensor:
    """`Run.update`, whose message says how many steps of a student came to what is not finite.

    Args:
        loss: 0-d.

    Returns:
        The loss, once for each class, for a class has none of its own: (num_classes,).
    """
    losses = loss.detach().reshape(1).expand(run.dataset.num_classes).clone()
    run.update(gradients, losses, f", after {len(training.batches)} steps of the student", step)
    return losses


def real_loss(run: Run, theta: Tensor, training: Training) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the real images at theta, and its gradient, piece by piece."""
    student = Student(run.net, run.memory)
    loss, total = theta.new_zeros(()), torch.zeros_like(theta)
    most, count = run.at_once(FIRST_ORDER), len(training.real)
    for begin in range(0, count, most):
        here = slice(begin, min(begin + most, count))
        rows = training.real[here]
        x = run.real(rows)
        if training.augment_real is not None:
            x = training.augment_real(x, here)
        labels = run.dataset.train_labels[rows].to(run.device)
        value, part = student.gradient(theta, x, labels)
        loss += value * (len(rows) / count)
        total += part * (len(rows) / count)
    return loss, total


def fresh_start(run: Run, *number: int) -> Tensor:
    """Parameters of a network drawn anew for this iteration."""
    nets.initialise(run.net, run.generator("network", *number))
    return flattened(run.net)


def minibatches(
    run: Run, made: Decoded, steps: int, per_class: int, classes: int | None = None
) -> list[Tensor]:
    """For each step so many images of each class, or of so many classes, without repetition."""
    random = run.generator("minibatches")
    count, here = made.counts[0], run.dataset.num_classes
    batches = []
    for _ in range(steps):
        chosen = torch.arange(here)
        if classes is not None and classes < here:
            chosen = torch.randperm(here, generator=random)[:classes].sort().values
        rows = [
            c * count + torch.randperm(count, generator=random)[:per_class] for c in chosen.tolist()
        ]
        batches.append(torch.cat(rows).to(run.device))
    return batches


def passes(images: int, batch: int, epochs: int) -> int:
    """Iterations in which so many epochs take all real images, `batch` at a time."""
    return epochs * math.ceil(images / batch)


def in_turn(run: Run, batch: int) -> Tensor:
    """The next real images, in an order of their own for each epoch, whose last may be fewer.

    Returns:
        int64 positions of at most `batch` of all training images.
    """
    count = len(run.dataset.train_labels)
    epoch, turn = divmod(run.iteration, passes(count, batch, 1))
    # Of the epoch, not the iteration: all its batches are cut from one order.
    order = torch.randperm(count, generator=generator(run.config.seed, "real images", epoch))
    return order[turn * batch : (turn + 1) * batch]


def inverse_softplus(value: float) -> float:
    """x with log(1 + exp(x)) = value."""
    return value + math.log(-math.expm1(-value))


__all__ = [
    "Config",
    "Training",
    "check",
    "fresh_start",
    "gradients",
    "in_turn",
    "inverse_softplus",
    "leaves_beside",
    "minibatches",
    "passes",
    "update",
]
