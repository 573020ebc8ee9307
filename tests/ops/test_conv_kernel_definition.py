"""The definition of `conv_kernel`: the published recursion, finite networks, what bands matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddfast
from ddfast.ops import conv_kernel as ops
from ddfast.reference import conv_kernel as reference
from ddfast.testing import check_derivatives

KINDS = ["ntk", "nngp"]
READOUTS = ["flatten", "gap"]
VARIANCES = (2.0, 0.01)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_loops(x: Tensor, y: Tensor, kind, pools, readout, weight_var, bias_var) -> float:
    """One entry, position pair by position pair, from the published recursion."""
    channels, height, width = x.shape

    def inner(a: Tensor, b: Tensor) -> dict:
        return {
            p: float(a[:, p[0], p[1]] @ b[:, p[2], p[3]]) / channels
            for p in itertools.product(range(height), range(width), range(height), range(width))
        }

    def convolve(k: dict) -> dict:
        shifts = list(itertools.product((-1, 0, 1), repeat=2))
        return {
            (h, w, i, j): sum(k.get((h + a, w + b, i + a, j + b), 0.0) for a, b in shifts) / 9
            for h, w, i, j in k
        }

    def pool(k: dict, height: int, width: int) -> dict:
        corners = list(itertools.product((0, 1), repeat=4))
        return {
            (h, w, i, j): sum(
                k[2 * h + a, 2 * w + b, 2 * i + c, 2 * j + d] for a, b, c, d in corners
            )
            / 16
            for h, w, i, j in itertools.product(range(height), range(width), repeat=2)
        }

    states = [inner(x, y), inner(x, x), inner(y, y)]
    theta = dict.fromkeys(states[0], 0.0)
    for pooled in pools:
        states = [{p: weight_var * v + bias_var for p, v in convolve(k).items()} for k in states]
        theta = {p: weight_var * v + states[0][p] for p, v in convolve(theta).items()}
        own = [{p: k[p] for p in k if p[:2] == p[2:]} for k in states]
        after = []
        for n, k in enumerate(states):
            of_x, of_y = own[1 if n < 2 else 2], own[2 if n != 1 else 1]
            result = {}
            for p, v in k.items():
                size = math.sqrt(of_x[p[0], p[1], p[0], p[1]] * of_y[p[2], p[3], p[2], p[3]])
                angle = math.acos(max(-1.0, min(1.0, v / size)))
                result[p] = size * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
                result[p] /= 2 * math.pi
                if n == 0:
                    theta[p] *= (math.pi - angle) / (2 * math.pi)
            after.append(result)
        states = after
        if pooled:
            height, width = height // 2, width // 2
            states, theta = [pool(k, height, width) for k in states], pool(theta, height, width)

    def read(k: dict) -> float:
        kept = [v for p, v in k.items() if readout == "gap" or p[:2] == p[2:]]
        return sum(kept) / len(kept)

    out = weight_var * read(states[0]) + bias_var
    return weight_var * read(theta) + out if kind == "ntk" else out


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("pools", [[True, False], [False, True], [False, False], [True, True]])
def test_the_published_recursion(pools, readout, backend):
    x, y = draw(2, 2, 5, 4), draw(2, 2, 5, 4, seed=1)
    for kind in KINDS:
        network = (kind, pools, readout, 1.7, 0.05)
        with ddfast.use_backend(backend):
            found = ops.conv_kernel(x, y, *network)
        expected = torch.tensor([[by_loops(a, b, *network) for b in y] for a in x]).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # acos near 1


def finite_network(images: Tensor, pools, readout, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of one random network with `width` channels, by their definitions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    channels, parameters = images.shape[1], []
    for _ in pools:
        parameters += [normal(width, channels, 3, 3), normal(width)]
        channels = width

    def features(z: Tensor) -> Tensor:
        for layer, pooled in enumerate(pools):
            weight, bias = parameters[2 * layer : 2 * layer + 2]
            factor = math.sqrt(VARIANCES[0] / (9 * weight.shape[1]))
            z = F.relu(F.conv2d(z, factor * weight, math.sqrt(VARIANCES[1]) * bias, padding=1))
            z = F.avg_pool2d(z, 2) if pooled else z
        return z.mean((2, 3)) if readout == "gap" else z.flatten(1)

    z = features(images)
    kernel = VARIANCES[0] * z @ z.mT / z.shape[1] + VARIANCES[1]
    last = normal(z.shape[1])
    outputs = math.sqrt(VARIANCES[0] / z.shape[1]) * z @ last
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
        for o in outputs
    ]
    jacobian = torch.stack(rows)
    return kernel.detach(), (kernel + jacobian @ jacobian.mT).detach()


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("pools", [[True, True], [False, True, False]])
def test_wide_random_networks_tend_to_it(pools, readout):
    images = draw(3, 2, 6, 6)
    width, count = 128, 24
    found = [finite_network(images, pools, readout, width, seed) for seed in range(count)]
    for kind, samples in zip(["nngp", "ntk"], zip(*found, strict=True), strict=True):
        stacked = torch.stack(samples)
        exact = ops.conv_kernel(images, None, kind, pools, readout, *VARIANCES)
        spread = stacked.std(0) / math.sqrt(count)
        # The mean of finite networks is off by about 1 / width.
        assert ((stacked.mean(0) - exact).abs() < 4 * spread + 2 / width * exact.abs()).all()
        assert (spread < 0.05 * exact.abs().max()).all()


def test_one_narrower_band_changes_the_result():
    """For a flattened readout offsets up to 1, 3, 7 before the pools are exactly what counts."""
    x, y = draw(1, 1, 16, 16), draw(1, 1, 16, 16, seed=1)
    pools, sizes = [True, True, True], [16, 8, 4]
    vx, vy = (reference.variances(t, pools, *VARIANCES) for t in (x, y))

    def banded(reaches: list[int]) -> Tensor:
        k = reference.products(x[:, None], y[None])
        for layer, (size, reach) in enumerate(zip(sizes, reaches, strict=True)):
            at = torch.arange(size)
            near = (at[:, None] - at).abs() <= reach
            k = VARIANCES[0] * reference.shifted_mean(k) + VARIANCES[1]
            v, w = vx[layer][:, None, :, :, None, None], vy[layer][None, :, None, None]
            k, _, _ = reference.relu(k, v, w)
            k = reference.pool(k * near[:, None, :, None] * near[:, None, :])
        return VARIANCES[0] * reference.own(k).mean((-2, -1)) + VARIANCES[1]

    full = reference.conv_kernel(x, y, "nngp", pools, "flatten", *VARIANCES)
    assert torch.equal(banded([7, 3, 1]), full)
    for narrower in ([6, 3, 1], [7, 2, 1], [7, 3, 0]):
        assert (banded(narrower) - full).abs() > 1e-6 * full


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_the_definition(kind):
    x, y = draw(1, 1, 4, 4).requires_grad_(), draw(2, 1, 4, 4, seed=1).requires_grad_()
    network = (kind, [True, False], "flatten", *VARIANCES)
    check_derivatives(lambda a, b: reference.conv_kernel(a, b, *network), [x, y])
