"""`mmd` and its bandwidths against the formulas written out, and the properties they have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import mmd as ops
from ddfast.testing import (
    assert_same_bits,
)

KERNELS = ["gaussian", "laplace", "m3d_laplace", "linear", "polynomial", "energy"]
# Kernel and bandwidth.
CASES = [
    ("gaussian", None),
    ("gaussian", "median"),
    ("gaussian", 3.0),
    ("gaussian", [1.5, 7.0, 4.0]),
    ("laplace", None),
    ("laplace", "median"),
    ("laplace", [2.0, 1.0]),
    ("m3d_laplace", None),
    ("linear", None),
    ("polynomial", None),
    ("energy", None),
]


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def sets(dtype=torch.float64, classes=2, n=4, m=5, d=3) -> tuple[Tensor, Tensor]:
    return draw(classes, n, d, dtype=dtype), draw(classes, m, d, seed=1, dtype=dtype, mean=0.4)


def literal(x: list, y: list, kernel: str, bandwidth, unbiased: bool) -> float:
    """One batch element in Python floats."""
    z = x + y
    apart = [sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for a in z for b in z]
    pairs = sorted(
        sum((p - q) ** 2 for p, q in zip(z[i], z[j], strict=True))
        for i in range(len(z))
        for j in range(i)
    )
    mean = sum(apart) / (len(z) ** 2 - len(z))
    if bandwidth is None:
        bandwidth = [mean / 4, mean / 2, mean, 2 * mean, 4 * mean]
        bandwidth = bandwidth if kernel == "gaussian" else [math.sqrt(mean)]
    elif bandwidth == "median":
        middle = pairs[(len(pairs) - 1) // 2]
        bandwidth = [middle if kernel == "gaussian" else math.sqrt(middle)]
    bandwidth = [bandwidth] if isinstance(bandwidth, float) else bandwidth

    def k(a, b):
        squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        inner = sum(p * q for p, q in zip(a, b, strict=True))
        return {
            "gaussian": lambda: sum(math.exp(-squared / h) for h in bandwidth),
            "laplace": lambda: sum(math.exp(-math.sqrt(squared) / h) for h in bandwidth),
            "m3d_laplace": lambda: sum(math.exp(-g * squared) for g in (0.1, 1, 5)),
            "linear": lambda: inner,
            "polynomial": lambda: (inner + 1) ** 2,
            "energy": lambda: -math.sqrt(squared),
        }[kernel]()

    def mean_of(a, b, same):
        values = [
            k(p, q)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and unbiased and i == j)
        ]
        return sum(values) / len(values)

    return mean_of(x, x, True) - 2 * mean_of(x, y, False) + mean_of(y, y, True)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("kernel", "bandwidth"), CASES)
def test_the_formula(backend, kernel, bandwidth, unbiased):
    x, y = sets()
    expected = [
        literal(a, b, kernel, bandwidth, unbiased)
        for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]
    with ddfast.use_backend(backend):
        found = losses.mmd(x, y, kernel, bandwidth, unbiased)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_the_polynomial_of_any_degree(backend, degree):
    x, y = sets(classes=1)
    k = [((a[0] @ b[0].T + 1) ** degree).mean() for a, b in ((x, x), (x, y), (y, y))]
    with ddfast.use_backend(backend):
        found = losses.mmd(x, y, "polynomial", degree=degree)
        linear = losses.mmd(x, y, "linear")
    torch.testing.assert_close(found[0], k[0] - 2 * k[1] + k[2], rtol=1e-12, atol=1e-13)
    if degree == 1:
        torch.testing.assert_close(found, linear, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_is_the_loss_of_dm(dtype):
    x, y = sets(dtype, classes=3, n=10, m=40, d=50)
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        losses.mmd(x, y, "linear"), losses.class_mean_distance(x, y), rtol=eps, atol=0
    )
    a, b = (t.clone().requires_grad_() for t in (x, x))
    losses.mmd(a, y, "linear").sum().backward()
    losses.class_mean_distance(b, y).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=4 * eps, atol=eps)


def test_energy_is_the_energy_distance():
    x, y = sets(classes=1, n=30, m=20)
    between = torch.cdist(x[0], y[0]).mean()
    within = [torch.pdist(t[0]).mean() for t in (x, y)]
    found = losses.mmd(x, y, "energy", unbiased=True)
    torch.testing.assert_close(found[0], 2 * between - sum(within), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_bandwidths_from_the_pooled_rows(backend):
    """Against all distances, and for the median an even and an odd number of pairs."""
    for n, m in ((2, 1), (300, 259), (3, 4)):
        x, y = sets(torch.float32, classes=2, n=n, m=m, d=20)
        with ddfast.use_backend(backend):
            mean, median = (ops.mmd_bandwidth(x + 100, y + 100, how) for how in ("mean", "median"))
        pairs = torch.stack([torch.pdist(z + 100) ** 2 for z in torch.cat([x, y], 1).double()])
        torch.testing.assert_close(mean.double(), pairs.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(median.double(), pairs.median(1).values, rtol=2e-5, atol=0)


def test_every_way_to_give_a_bandwidth():
    x, y = (t.view(2, 1, *t.shape[1:]) for t in sets())
    for kernel in ("gaussian", "laplace"):
        expected = losses.mmd(x, y, kernel, 2.0)
        assert expected.shape == (2, 1)
        for given in (
            2,
            [2.0],
            torch.tensor(2.0),
            torch.full((2, 1), 2.0),
            torch.full((2, 1, 1), 2.0),
        ):
            assert_same_bits(losses.mmd(x, y, kernel, given), expected)
        each = torch.tensor([[2.0], [3.0]]), losses.mmd(x, y, kernel, 3.0)
        assert_same_bits(losses.mmd(x, y, kernel, each[0])[1], each[1][1])
        # Doubling bandwidths are computed from one exponential, in any order and number.
        several = losses.mmd(x, y, kernel, [8.0, 2.0, 4.0])
        apart = sum(losses.mmd(x, y, kernel, h) for h in (2.0, 4.0, 8.0))
        torch.testing.assert_close(several, apart, rtol=1e-12, atol=1e-13)
    flat = losses.mmd(x[0, 0], y[0, 0], bandwidth=torch.tensor(2.0))
    assert_same_bits(flat, losses.mmd(x, y, bandwidth=2.0)[0, 0])
    assert flat.shape == ()


@pytest.mark.parametrize("kernel", KERNELS)
def test_not_negative_and_symmetric(kernel):
    for seed in range(5):
        x, y = draw(3, 20, 6, seed=seed), draw(3, 30, 6, seed=seed + 50)
        value = losses.mmd(x, y, kernel)
        torch.testing.assert_close(losses.mmd(y, x, kernel), value, rtol=1e-12, atol=1e-13)
        assert (value > -1e-13).all()
