"""The NTK of fully connected networks without ddfast: plain PyTorch, and neural-tangents.

What a user would write: one product, then the recursion on matrices, layer by layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddfast.benchmarks.plain_conv_kernel import BIAS_VAR, WEIGHT_VAR, import_stax


def matrix(x: Tensor, y: Tensor, depth: int) -> Tensor:
    """The NTK of every row of x with every row of y, differentiable."""
    scale = WEIGHT_VAR / x.shape[1]
    k = scale * x @ y.mT + BIAS_VAR
    qx, qy = (scale * (t * t).sum(1) + BIAS_VAR for t in (x, y))
    tangent = k
    for _ in range(depth):
        p = (qx[:, None] * qy[None, :]).sqrt()
        # Inside of 1 by a little, where the derivative of the arc cosine is finite.
        c = (k / p).clamp(-1 + 1e-6, 1 - 1e-6)
        angle = torch.acos(c)
        slope = (math.pi - angle) / (2 * math.pi)
        moment = p * (torch.sin(angle) + (math.pi - angle) * c) / (2 * math.pi)
        k = WEIGHT_VAR * moment + BIAS_VAR
        tangent = k + WEIGHT_VAR * slope * tangent
        qx, qy = (WEIGHT_VAR * q / 2 + BIAS_VAR for q in (qx, qy))
    return tangent


def neural_tangents(
    x: Tensor, y: Tensor, depth: int
) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """The matrix, and that with its gradient by y; None where it cannot be imported."""
    stax = import_stax()
    if stax is None:
        return None
    import jax
    import jax.numpy as jnp

    layers = []
    for layer in range(depth + 1):
        layers.append(stax.Dense(1, W_std=WEIGHT_VAR**0.5, b_std=BIAS_VAR**0.5))
        if layer < depth:
            layers.append(stax.Relu())
    kernel = jax.jit(lambda a, b: stax.serial(*layers)[2](a, b, "ntk"))
    both = jax.jit(jax.grad(lambda b, a: (lambda k: (k.sum(), k))(kernel(a, b)), has_aux=True))
    a, b = (jnp.asarray(t.detach().numpy()) for t in (x, y))

    def forward() -> Tensor:
        return torch.from_dlpack(kernel(a, b).block_until_ready()).clone()

    def gradient() -> tuple[Tensor, Tensor]:
        by_b, value = both(b, a)
        by_b.block_until_ready()
        return torch.from_dlpack(value).clone(), torch.from_dlpack(by_b).clone()

    # jax works in threads of its own: all of the process's time is what it takes.
    forward.clock = gradient.clock = time.process_time  # type: ignore[attr-defined]
    return forward, gradient
