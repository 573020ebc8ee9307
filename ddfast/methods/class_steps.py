"""An optimiser step after each class, on the images of all of them, worked out in one go.

As published code makes its steps where one tensor holds the images of all classes: the step of a
class moves its own images by gradient and momentum, and those of the other classes, whose gradient
is zero, by their momentum alone. With C classes, momentum m and the buffer b of class c (0 first):

    at its turn      x - lr (m + ... + m^c) b               the gradient g is taken here
    b at its turn    v = m^(c+1) b + g
    after all        x at its turn - lr (1 + ... + m^(C-1-c)) v,    b = m^(C-1-c) v

The images of a class do not depend on the other classes' gradients, so all can be matched at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddfast.methods.run import Run


def check_class_steps(run: Run) -> None:
    """Refuse steps per class where the classes share some of what is learned.

    Raises:
        ValueError: naming the parametrisation.
    """
    shared = sorted(set(run.tensors) - {run.rows})
    if shared:
        raise ValueError(
            "step: got 'per_class', for which every class must have images of its own; with "
            f"{run.config.parametrisation} they share {', '.join(shared)}, so use 'joint'"
        )


def at_their_turn(run: Run) -> Tensor:
    """The images of every class where they are when its turn comes, in the images' shape."""
    m = run.config.momentum
    before = _of_class(run, lambda c, classes: m * (1 - m**c) / (1 - m))
    return run.images.detach() - run.config.lr_img * before * _buffer(run)


def step_by_class(run: Run) -> None:
    """The steps of all classes. `images.grad` holds the gradients, each taken at its turn."""
    images, lr, m = run.images, run.config.lr_img, run.config.momentum
    assert images.grad is not None
    start = at_their_turn(run)
    velocity = _of_class(run, lambda c, classes: m ** (c + 1)) * _buffer(run) + images.grad
    still = _of_class(run, lambda c, classes: (1 - m ** (classes - c)) / (1 - m))
    with torch.no_grad():
        images.copy_(start - lr * still * velocity)
    if m:
        left = _of_class(run, lambda c, classes: m ** (classes - 1 - c))
        run.optimiser.state[images]["momentum_buffer"] = left * velocity


def _buffer(run: Run) -> Tensor:
    """The optimiser's momentum buffer, 0 before the first step."""
    found = run.optimiser.state[run.images].get("momentum_buffer")
    return torch.zeros_like(run.images) if found is None else found.detach()


def _of_class(run: Run, value: Callable[[int, int], float]) -> Tensor:
    """`value(c, classes)` for each image, by its class: (num_classes * ipc, 1, 1, 1)."""
    classes = run.sampler.num_classes
    values = torch.tensor([float(value(c, classes)) for c in range(classes)], dtype=torch.float64)
    return values.to(run.images).repeat_interleave(run.config.ipc).view(-1, 1, 1, 1)
