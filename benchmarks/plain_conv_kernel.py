"""The convolutional NTK as one would write it in PyTorch, or ask of neural-tangents: for timing.

All pairs of positions of a few pairs of images at a time, each layer a handful of whole-tensor
operations, gradients by autograd. What it needs of the images' own covariances is computed once.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_VAR, BIAS_VAR = 2.0, 0.01

#: Bytes of one tensor over all pairs of positions.
CHUNK = 4 << 20


def convolved(k: Tensor) -> Tensor:
    """The mean over the nine shifts of both positions of (..., H, W, H, W)."""
    height, width = k.shape[-2:]
    k = F.pad(k, (0, 0, 1, 1, 0, 0, 1, 1))
    k = k[..., :-2, :, :-2, :] + k[..., 1 : 1 + height, :, 1 : 1 + height, :] + k[..., 2:, :, 2:, :]
    k = F.pad(k, (1, 1, 0, 0, 1, 1, 0, 0))
    k = k[..., :-2, :, :-2] + k[..., 1 : 1 + width, :, 1 : 1 + width] + k[..., 2:, :, 2:]
    return k * (1 / 9)


def pooled(k: Tensor) -> Tensor:
    height, width = (s // 2 for s in k.shape[-2:])
    k = k[..., : 2 * height, : 2 * width, : 2 * height, : 2 * width]
    return k.reshape(*k.shape[:-4], height, 2, width, 2, height, 2, width, 2).mean((-7, -5, -3, -1))


def diagonal(k: Tensor) -> Tensor:
    return k.diagonal(0, -4, -2).diagonal(0, -3, -2)


def rectified(k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    size = (v * w).sqrt()
    # A little less than 1 keeps the slope of the angle finite where images meet themselves.
    c = (k / size).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(c)
    both = (math.pi - angle) * (1 / (2 * math.pi))
    return size * ((1 - c * c).sqrt() * (1 / (2 * math.pi)) + both * c), both


def variances(x: Tensor, pools: Sequence[bool]) -> list[Tensor]:
    k = torch.einsum("nchw,ncij->nhwij", x, x) / x.shape[1]
    found = []
    for pool in pools:
        k = WEIGHT_VAR * convolved(k) + BIAS_VAR
        v = diagonal(k)
        found.append(v)
        k, _ = rectified(k, v[:, :, :, None, None], v[:, None, None])
        k = pooled(k) if pool else k
    return found


def of_chunk(
    x: Tensor,
    y: Tensor,
    vx: Sequence[Tensor],
    vy: Sequence[Tensor],
    pools: Sequence[bool],
    readout: str,
) -> Tensor:
    k = torch.einsum("nchw,mcij->nmhwij", x, y) / x.shape[1]
    t = None
    for v, w, pool in zip(vx, vy, pools, strict=True):
        k = WEIGHT_VAR * convolved(k) + BIAS_VAR
        t = k if t is None else WEIGHT_VAR * convolved(t) + k
        k, both = rectified(k, v[:, None, :, :, None, None], w[None, :, None, None])
        t = t * both
        k, t = (pooled(k), pooled(t)) if pool else (k, t)
    assert t is not None
    k, t = (
        s.mean((-4, -3, -2, -1)) if readout == "gap" else diagonal(s).mean((-2, -1)) for s in (k, t)
    )
    return WEIGHT_VAR * (t + k) + BIAS_VAR


def matrix(x: Tensor, y: Tensor, pools: Sequence[bool], readout: str) -> Tensor:
    """The NTK of (n, C, H, W) and (m, C, H, W), (n, m)."""
    positions = x.shape[2] * x.shape[3]
    pairs = max(CHUNK // (positions * positions * x.element_size()), 1)
    vx, vy = variances(x, pools), variances(y, pools)
    rows = []
    for i in range(len(x)):
        a = [v[i : i + 1] for v in vx]
        parts = [
            of_chunk(
                x[i : i + 1], y[j : j + pairs], a, [v[j : j + pairs] for v in vy], pools, readout
            )
            for j in range(0, len(y), pairs)
        ]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def matrix_and_gradient(
    x: Tensor, y: Tensor, pools: Sequence[bool], readout: str
) -> tuple[Tensor, Tensor]:
    """The NTK, and the gradient of the sum of its entries by y.

    Chunk by chunk, so that the graph of one chunk at a time is in memory.
    """
    positions = x.shape[2] * x.shape[3]
    pairs = max(CHUNK // (positions * positions * x.element_size()), 1)
    with torch.no_grad():
        vx = variances(x, pools)
    rows = torch.empty(len(x), len(y))
    total = torch.zeros_like(y)
    for j in range(0, len(y), pairs):
        leaf = y[j : j + pairs].detach().requires_grad_()
        vy = variances(leaf, pools)
        constants = [v.detach().requires_grad_() for v in vy]
        sums = [torch.zeros_like(v) for v in constants]
        for i in range(len(x)):
            a = [v[i : i + 1] for v in vx]
            part = of_chunk(x[i : i + 1], leaf, a, constants, pools, readout)
            by_leaf, *by_v = torch.autograd.grad(part.sum(), [leaf, *constants])
            rows[i, j : j + pairs] = part.detach()
            total[j : j + pairs] += by_leaf
            sums = [s + g for s, g in zip(sums, by_v, strict=True)]
        total[j : j + pairs] += torch.autograd.grad(vy, leaf, sums)[0]
    return rows, total


def import_stax() -> Any:
    """neural-tangents' `stax`, or None where it cannot be imported.

    Its package does not import on recent versions of jax; `stax`, all that is needed, does.
    """
    try:
        if "neural_tangents" not in sys.modules:
            found = importlib.util.find_spec("neural_tangents")
            assert found is not None
            package = types.ModuleType("neural_tangents")
            package.__path__ = list(found.submodule_search_locations or [])
            sys.modules["neural_tangents"] = package
        from neural_tangents import stax
    except Exception:
        return None
    return stax


def neural_tangents(
    x: Tensor, y: Tensor, pools: Sequence[bool], readout: str
) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """The same two by neural-tangents on one CPU thread, or None where it cannot be imported."""
    stax = import_stax()
    if stax is None:
        return None
    import jax
    import jax.numpy as jnp

    layers = []
    for pool in pools:
        layers.append(
            stax.Conv(1, (3, 3), padding="SAME", W_std=WEIGHT_VAR**0.5, b_std=BIAS_VAR**0.5)
        )
        layers.append(stax.Relu())
        if pool:
            layers.append(stax.AvgPool((2, 2), (2, 2)))
    layers.append(stax.GlobalAvgPool() if readout == "gap" else stax.Flatten())
    layers.append(stax.Dense(1, W_std=WEIGHT_VAR**0.5, b_std=BIAS_VAR**0.5))
    kernel = jax.jit(lambda a, b: stax.serial(*layers)[2](a, b, "ntk"))
    both = jax.jit(jax.grad(lambda b, a: (lambda k: (k.sum(), k))(kernel(a, b)), has_aux=True))
    a, b = (jnp.asarray(t.detach().permute(0, 2, 3, 1).numpy()) for t in (x, y))

    def forward() -> Tensor:
        return torch.from_dlpack(kernel(a, b).block_until_ready()).clone()

    def gradient() -> tuple[Tensor, Tensor]:
        by_b, value = both(b, a)
        by_b.block_until_ready()
        found = torch.from_dlpack(by_b).clone().permute(0, 3, 1, 2)
        return torch.from_dlpack(value).clone(), found

    # jax works in threads of its own: all of the process's time is what it takes.
    forward.clock = gradient.clock = time.process_time  # type: ignore[attr-defined]
    return forward, gradient
