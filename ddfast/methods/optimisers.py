"""Optimisers of the synthetic set that torch does not have: AdaBelief (RFAD) and LAMB (FRePo).

Both keep exponential means of each gradient g_t, divided by what they lack of 1 at first:

    m_t = b1 m_{t-1} + (1 - b1) g_t,    m^ = m_t / (1 - b1^t),    s^ = s_t / (1 - b2^t)

AdaBelief (Zhuang et al., NeurIPS 2020, algorithm 2), of how far gradients are from their mean:

    s_t = b2 s_{t-1} + (1 - b2) (g_t - m_t)^2 + eps,    x <- x - lr m^ / (s^^(1/2) + eps)

LAMB (You et al., ICLR 2020, algorithm 2, without weight decay), of each tensor as a whole:

    s_t = b2 s_{t-1} + (1 - b2) g_t^2,    u = m^ / (s^^(1/2) + eps),    x <- x - lr |x| / |u| u

where |x| / |u| counts as 1 if either is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["LAMB", "AdaBelief"]


class _Means(torch.optim.Optimizer):
    """What the two share. Steps are counted in a tensor, as checkpoints keep tensors only."""

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float64)
                    state["mean"], state["square"] = torch.zeros_like(x), torch.zeros_like(x)
                state["step"] += 1
                first, second = group["betas"]
                state["mean"].lerp_(x.grad, 1 - first)
                self._widen(state["square"], x.grad, state["mean"], second, group["eps"])
                count = float(state["step"])
                root = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
                direction = (state["mean"] / (1 - first**count)).div_(root)
                x.sub_(self._length(x, direction) * direction, alpha=group["lr"])
        return loss

    @staticmethod
    def _widen(square: Tensor, gradient: Tensor, mean: Tensor, beta: float, eps: float) -> None:
        raise NotImplementedError

    @staticmethod
    def _length(x: Tensor, direction: Tensor) -> Tensor | float:
        return 1.0


class AdaBelief(_Means):
    """AdaBelief, see above.

    Args:
        parameters: tensors, or groups of them with an `lr` of their own, as torch's optimisers.
        betas: b1 and b2.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
    ) -> None:
        super().__init__(parameters, lr, betas, eps)

    @staticmethod
    def _widen(square: Tensor, gradient: Tensor, mean: Tensor, beta: float, eps: float) -> None:
        away = gradient - mean
        square.mul_(beta).addcmul_(away, away, value=1 - beta).add_(eps)


class LAMB(_Means):
    """LAMB, see above.

    Args:
        parameters: tensors, or groups of them with an `lr` of their own, as torch's optimisers.
        betas: b1 and b2.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(parameters, lr, betas, eps)

    @staticmethod
    def _widen(square: Tensor, gradient: Tensor, mean: Tensor, beta: float, eps: float) -> None:
        square.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)

    @staticmethod
    def _length(x: Tensor, direction: Tensor) -> Tensor:
        own, step = x.norm(), direction.norm()
        return torch.where((own > 0) & (step > 0), own / step, 1.0)
