"""AdaBelief and LAMB against their published recurrences, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from ddfast.methods.optimisers import LAMB, AdaBelief


def gradients(steps: int) -> list[list[float]]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(steps, 3, generator=random, dtype=torch.float64).tolist()


def after(optimiser, start: list[float], steps: int, **settings) -> list[float]:
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    made = optimiser([x], **settings)
    for g in gradients(steps):
        x.grad = torch.tensor(g, dtype=torch.float64)
        made.step()
    return x.detach().tolist()


@pytest.mark.parametrize("eps", [1e-16, 1e-2])
def test_adabelief(eps) -> None:
    start, lr, b1, b2 = [1.0, -2.0, 0.5], 0.1, 0.8, 0.95
    expected = list(start)
    for i in range(3):
        m = s = 0.0
        for t, g in enumerate((row[i] for row in gradients(6)), 1):
            m = b1 * m + (1 - b1) * g
            s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
            unbiased = math.sqrt(s / (1 - b2**t)) + eps
            expected[i] -= lr * (m / (1 - b1**t)) / unbiased
    found = after(AdaBelief, start, 6, lr=lr, betas=(b1, b2), eps=eps)
    assert found == pytest.approx(expected, rel=1e-12)


def test_lamb() -> None:
    start, lr, b1, b2, eps = [1.0, -2.0, 0.5], 0.1, 0.8, 0.95, 1e-6
    x, m, s = list(start), [0.0] * 3, [0.0] * 3
    for t, row in enumerate(gradients(6), 1):
        u = []
        for i, g in enumerate(row):
            m[i] = b1 * m[i] + (1 - b1) * g
            s[i] = b2 * s[i] + (1 - b2) * g * g
            u.append(m[i] / (1 - b1**t) / (math.sqrt(s[i] / (1 - b2**t)) + eps))
        length = math.dist(x, [0] * 3) / math.dist(u, [0] * 3)
        x = [a - lr * length * b for a, b in zip(x, u, strict=True)]
    assert after(LAMB, start, 6, lr=lr, betas=(b1, b2), eps=eps) == pytest.approx(x, rel=1e-12)


def test_lamb_without_a_length_is_adam() -> None:
    """A tensor of zeros, or a gradient of zeros, has the ratio 1."""
    found = after(LAMB, [0.0] * 3, 1, lr=0.1)
    assert found == pytest.approx([-0.1 * math.copysign(1, g) for g in gradients(1)[0]], rel=1e-5)
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.zeros(3)
    LAMB([x], lr=0.1).step()
    assert torch.equal(x.detach(), torch.ones(3))


@pytest.mark.parametrize("optimiser", [AdaBelief, LAMB])
def test_state_goes_through_a_checkpoint(optimiser) -> None:
    whole = after(optimiser, [1.0, 2.0, 3.0], 5)
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    made = optimiser([x])
    for step, g in enumerate(gradients(5)):
        if step == 2:
            kept = made.state_dict()
            assert all(isinstance(v, torch.Tensor) for v in kept["state"][0].values())
            made = optimiser([x])
            made.load_state_dict(kept)
        x.grad = torch.tensor(g, dtype=torch.float64)
        made.step()
    assert x.detach().tolist() == whole
    idle = torch.ones(2, requires_grad=True)
    made = optimiser([idle])
    assert made.step(lambda: 3.0) == 3.0 and torch.equal(idle.detach(), torch.ones(2))
