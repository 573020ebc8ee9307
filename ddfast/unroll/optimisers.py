"""The optimisers of a student, forward and in reverse, on one flat parameter vector.

A state is a tuple of vectors, the parameters first. `pull` is the derivative of one step: from the
adjoint of the state after it to the direction along which the gradient of that step counts, and to
the adjoint of the state before it, all but the part that goes through the gradient itself. All
tensors are of the student's floating dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Pulled(NamedTuple):
    """What `pull` returns.

    Attributes:
        direction: (P,). With s = <gradient, direction>, the loss depends on the images of the step
            by factor * ds/d images, and factor * ds/d theta is added to the adjoint of theta.
        factor: 0-d.
        adjoint: of the state before the step, without that.
        by_lr: 0-d, the derivative by the step's learning rate; None if it is -s.
    """

    direction: Tensor
    factor: Tensor
    adjoint: State
    by_lr: Tensor | None


@dataclass(frozen=True)
class SGD:
    """theta <- theta - lr b, b <- momentum b + gradient; as `torch.optim.SGD`.

    The adjoint with momentum is that of Deng and Russakovsky (NeurIPS 2022).

    Attributes:
        momentum: 0 for none.

    Raises:
        ValueError: a momentum outside [0, 1).
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum!r}, expected a number in [0, 1)")

    def begin(self, theta: Tensor) -> State:
        """The state before the first step.

        Args:
            theta: (P,), floating: the parameters.

        Returns:
            (P,) tensors: the parameters, and with momentum b = 0.
        """
        return (theta, torch.zeros_like(theta)) if self.momentum else (theta,)

    def step(self, state: State, gradient: Tensor, lr: Tensor, number: int) -> State:
        """The state after a step.

        Args:
            state: before it.
            gradient: (P,), floating, of the loss by the parameters.
            lr: 0-d, floating.
            number: of the step, from 0.
        """
        if not self.momentum:
            return (state[0] - lr * gradient,)
        b = self.momentum * state[1] + gradient
        return state[0] - lr * b, b

    def record(self, before: State, gradient: Tensor, after: State, learns_lr: bool) -> State:
        """What `pull` needs: theta, and with momentum b if the learning rate has a derivative.

        Args:
            before, after: the states around a step.
            gradient: (P,), floating, of that step.
            learns_lr: whether the learning rate has a derivative.
        """
        return (before[0], after[1]) if self.momentum and learns_lr else (before[0],)

    def vectors(self, learns_lr: bool) -> int:
        """How many (P,) a record is; `learns_lr` as there."""
        return 2 if self.momentum and learns_lr else 1

    def adjoint(self, by_theta: Tensor) -> State:
        """The adjoint of the state after the last step.

        Args:
            by_theta: (P,), floating: the derivative of the loss by the parameters there.
        """
        return self.begin(by_theta)

    def pull(self, adjoint: State, record: State, lr: Tensor, number: int) -> Pulled:
        """The derivative of a step.

        Args:
            adjoint: of the state after it.
            record: of it.
            lr: 0-d, floating, its learning rate.
            number: of the step, from 0.
        """
        a = adjoint[0]
        if not self.momentum:
            return Pulled(a, -lr, (a,), None)
        c = adjoint[1] - lr * a
        by_lr = -torch.dot(a, record[1]) if len(record) > 1 else None
        return Pulled(c, torch.ones_like(lr), (a, self.momentum * c), by_lr)


@dataclass(frozen=True)
class Adam:
    """As `torch.optim.Adam` (Kingma and Ba, ICLR 2015) without weight decay.

    Its state begins at zero at the first step.

    Attributes:
        betas: of the running means of the gradient and of its square.
        eps: added to the root of the latter.

    Raises:
        ValueError: betas outside [0, 1), eps not above 0.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas!r}, expected two numbers in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"eps: got {self.eps!r}, expected a number above 0")

    def begin(self, theta: Tensor) -> State:
        """The parameters and the two means, which are 0; as :meth:`SGD.begin`."""
        return theta, torch.zeros_like(theta), torch.zeros_like(theta)

    def step(self, state: State, gradient: Tensor, lr: Tensor, number: int) -> State:
        """The state after a step; as :meth:`SGD.step`."""
        theta, m, s = state
        m, s = self._moments(m, s, gradient)
        return theta - lr * self._move(m, s, number)[0], m, s

    def record(self, before: State, gradient: Tensor, after: State, learns_lr: bool) -> State:
        """theta, m and s before the step, and its gradient; as :meth:`SGD.record`."""
        return (*before, gradient)

    def vectors(self, learns_lr: bool) -> int:
        """How many (P,) a record is, whatever `learns_lr`."""
        return 4

    def adjoint(self, by_theta: Tensor) -> State:
        """The adjoint of the state after the last step; as :meth:`SGD.adjoint`."""
        return self.begin(by_theta)

    def pull(self, adjoint: State, record: State, lr: Tensor, number: int) -> Pulled:
        """The derivative of a step; as :meth:`SGD.pull`."""
        (a, a_m, a_s), (_, m, s, gradient) = adjoint, record
        first, second = self.betas
        m, s = self._moments(m, s, gradient)
        move, u = self._move(m, s, number)
        c1, c2 = 1 - first ** (number + 1), 1 - second ** (number + 1)
        a_m = a_m - lr * a / (c1 * u)
        # d u / d s is infinite at s = 0, where m is 0 as well and every derivative through u is 0.
        root = torch.where(s > 0, 2 * (s * c2).sqrt(), torch.inf)
        a_s = a_s + lr * a * move / (u * root)
        direction = (1 - first) * a_m + 2 * (1 - second) * gradient * a_s
        before = a, first * a_m, second * a_s
        return Pulled(direction, torch.ones_like(lr), before, -torch.dot(a, move))

    def _moments(self, m: Tensor, s: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.betas
        return (
            first * m + (1 - first) * gradient,
            second * s + (1 - second) * gradient * gradient,
        )

    def _move(self, m: Tensor, s: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """What lr multiplies, and its denominator."""
        first, second = self.betas
        # At s = 0, where the gradient has always been 0, the derivative is 0 and not 0 * inf.
        root = torch.where(s > 0, s, 1).sqrt() * (s > 0)
        u = root / math.sqrt(1 - second ** (number + 1)) + self.eps
        return m / (1 - first ** (number + 1)) / u, u


Optimiser = SGD | Adam
"""What a student may be trained with."""
