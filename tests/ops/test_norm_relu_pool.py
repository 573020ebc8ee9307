"""Gates of `norm_relu_pool`: definition, C++ kernel, operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ddfast
from ddfast import layers
from ddfast.ops import norm_relu_pool as ops
from ddfast.reference import norm_relu_pool as reference
from ddfast.testing import (
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    levels,
)

ACTIVATIONS, POOLS = reference.ACTIVATIONS, reference.POOLS
GROUPS = {"instance": 4, "group": 2, "layer": 1, "none": 0}
LAST = torch.channels_last
CASES = list(itertools.product(GROUPS, ACTIVATIONS, POOLS))


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def affine(groups: int, channels: int, seed: int = 1, dtype=torch.float64):
    if groups == 0:
        return None, None
    return draw(channels, seed=seed, dtype=dtype), draw(channels, seed=seed + 1, dtype=dtype)


def plain(x, weight, bias, groups, activation, pool, eps=1e-5) -> Tensor:
    """The same with torch's own functions."""
    if groups:
        x = F.group_norm(x, groups, weight, bias, eps)
    x = {
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, 0.01),
        "sigmoid": torch.sigmoid,
        "swish": F.silu,
    }[activation](x)
    return {"average": F.avg_pool2d, "max": F.max_pool2d, "none": lambda t, _: t}[pool](x, 2)


def everything(x, groups, activation, pool, seed: int = 5, dtype=None) -> list[Tensor]:
    """All four operators on tensors drawn for x, as one flat list."""
    dtype = dtype or x.dtype
    channels = x.shape[1]

    def like(t: Tensor, number: int) -> Tensor:
        drawn = draw(*t.shape, seed=seed + number).to(x.dtype).to(dtype)
        return drawn.contiguous(memory_format=reference.memory_format(t))

    x = x.to(dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in affine(groups, channels))
    moved = [None, None]
    if groups:
        moved = [draw(len(x), channels, seed=8), draw(channels, seed=9)]
    weight, bias, *moved = (None if t is None else t.to(dtype) for t in (weight, bias, *moved))
    settings = groups, activation, pool
    out, mean, rstd = ops.norm_relu_pool(x, weight, bias, groups, 1e-5, activation, pool)
    grad, grad_tangent, tangent = like(out, 0), like(out, 1), like(x, 2)
    point = (x, tangent, weight, bias, *moved, mean, rstd, *settings)
    return [
        *(out, mean, rstd),
        *ops.norm_relu_pool_bwd(grad, x, weight, bias, mean, rstd, *settings),
        ops.norm_relu_pool_tangent(*point),
        *ops.norm_relu_pool_tangent_bwd(grad, grad_tangent, *point),
        *ops.norm_relu_pool_tangent_bwd(grad, None, *point),
    ]


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("norm", "activation", "pool"), CASES)
def test_it_is_what_torch_computes_in_several_steps(backend, norm, activation, pool):
    groups = GROUPS[norm]
    x = draw(3, 4, 7, 6, mean=0.5).requires_grad_()
    parameters = [t if t is None else t.requires_grad_() for t in affine(groups, 4)]
    leaves = [x, *(t for t in parameters if t is not None)]
    expected = plain(x, *parameters, groups, activation, pool)
    with ddfast.use_backend(backend):
        found = layers.norm_relu_pool(x, *parameters, groups, 1e-5, activation, pool)
        cotangent = draw(*found.shape, seed=3)
        gradients = torch.autograd.grad(found, leaves, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-12)


def test_a_small_plane_worked_out_by_hand():
    x = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]], dtype=torch.float64)
    out, mean, rstd = ops.norm_relu_pool(x, None, None, 1, 0.0, "relu", "average")
    assert mean.item() == 4 and rstd.item() == pytest.approx(5**-0.5)
    assert out.item() == pytest.approx((1 + 3) / 5**0.5 / 4)
    assert layers.norm_relu_pool(x, pool="max").item() == 7
    assert layers.norm_relu_pool(-x, activation="leaky_relu").item() == pytest.approx(-0.04)


@pytest.mark.parametrize("last", [False, True])
def test_the_first_maximum_gets_the_gradient_and_zero_has_none(last):
    x = torch.tensor([[2.0, 2.0, 0.0, -1.0], [1.0, 2.0, 0.0, 0.0]]).expand(1, 20, 2, 4).clone()
    x = x.contiguous(memory_format=LAST if last else torch.contiguous_format).requires_grad_()
    out = layers.norm_relu_pool(x, pool="max")
    (gradient,) = torch.autograd.grad(out.sum(), x)
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).expand(1, 20, 2, 4)
    assert torch.equal(gradient, expected)


# --- the C++ kernel -----------------------------------------------------------------------------

# Whole vectors of channels and some more; planes around blocks, segments and odd sizes.
SHAPES = [
    (2, 4, 5, 6),
    (2, 32, 8, 8),
    (2, 35, 7, 9),
    (1, 48, 16, 16),
    (3, 130, 2, 2),
    (1, 16, 17, 18),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget_at_every_level(dtype, shape):
    for norm, activation, pool in CASES:
        groups = {"instance": shape[1], "none": 0, "layer": 1}.get(norm, shape[1] // 2)
        if shape[1] % (groups or 1):
            continue
        x = draw(*shape, mean=0.3, dtype=dtype)
        with ddfast.use_backend("reference"):
            eager = everything(x, groups, activation, pool)
            exact = everything(x, groups, activation, pool, dtype=torch.float64)
        for level, form in itertools.product(levels(), (torch.contiguous_format, LAST)):
            with at_level(level):
                ours = everything(x.contiguous(memory_format=form), groups, activation, pool)
            assert_within_budget(ours, eager, exact, tiny=8 if dtype == torch.float32 else 32)


@pytest.mark.parametrize("level", levels())
def test_a_large_mean_costs_no_digits_of_the_variance(level):
    """One-pass sums of squares would lose everything here."""
    x = draw(2, 16, 64, 64, mean=1000.0, dtype=torch.float32)
    exact = ops.norm_relu_pool(x.double(), None, None, 16, 1e-5, "relu", "average")
    with at_level(level):
        for form in (torch.contiguous_format, LAST):
            _, mean, rstd = ops.norm_relu_pool(
                x.contiguous(memory_format=form), None, None, 16, 1e-5, "relu", "average"
            )
            torch.testing.assert_close(mean.double(), exact[1], rtol=1e-7, atol=0)
            torch.testing.assert_close(rstd.double(), exact[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape", [(5, 70, 18, 18), (1, 256, 32, 32)])
def test_same_bits_for_any_number_of_threads(shape, form):
    x = draw(*shape, dtype=torch.float32).contiguous(memory_format=form)
    for groups in (shape[1], 2):
        assert_same_bits_for_any_threads(lambda g=groups: everything(x, g, "swish", "average"))


def test_large_results_that_bypass_the_caches():
    """From 4 MiB on results are written past the caches: the values must not depend on it."""
    x = draw(40, 64, 32, 32, dtype=torch.float32).contiguous(memory_format=LAST)
    whole = everything(x, 64, "relu", "average")
    settings = 64, "relu", "average"
    weight, bias = affine(64, 64, dtype=torch.float32)
    grad = draw(40, 64, 16, 16, seed=5, dtype=torch.float32).contiguous(memory_format=LAST)
    for i in (0, 39):
        part = ops.norm_relu_pool(x[i : i + 1], weight, bias, 64, 1e-5, *settings[1:])
        assert torch.equal(part[0], whole[0][i : i + 1])
        gradient, _, _ = ops.norm_relu_pool_bwd(
            grad[i : i + 1], x[i : i + 1], weight, bias, *part[1:], *settings
        )
        assert torch.equal(gradient, whole[3][i : i + 1])


# --- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
def test_opcheck_on_every_operator(form):
    x = draw(2, 4, 5, 4).contiguous(memory_format=form)
    weight, bias = (t.requires_grad_() for t in affine(4, 4))
    settings = 4, "swish", "average"
    out, mean, rstd = ops.norm_relu_pool(x, weight, bias, 4, 1e-5, *settings[1:])
    grad, tangent = draw(*out.shape, seed=3), draw(*x.shape, seed=4)
    moved = draw(2, 4, seed=5), draw(4, seed=6)
    mean, rstd = mean.detach(), rstd.detach()
    plain_weights = weight.detach(), bias.detach()
    point = x, tangent, *plain_weights, *moved, mean, rstd, *settings
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(ops.norm_relu_pool, (leaf, weight, bias, 4, 1e-5, *settings[1:]))
    torch.library.opcheck(ops.norm_relu_pool, (leaf, None, None, 0, 1e-5, *settings[1:]))
    torch.library.opcheck(
        ops.norm_relu_pool_bwd,
        (grad.requires_grad_(), leaf, weight, bias, mean, rstd, *settings),
    )
    torch.library.opcheck(ops.norm_relu_pool_tangent, point)
    torch.library.opcheck(ops.norm_relu_pool_tangent_bwd, (grad.detach(), None, *point))
    torch.library.opcheck(ops.norm_relu_pool_tangent_bwd, (grad.detach(), grad.detach(), *point))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    x = draw(2, 4, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = affine(4, 4)

    def f(x):
        return (layers.norm_relu_pool(x * 2, weight, bias, 4, pool="max") ** 2).sum()

    expected, found = f(x), torch.compile(f, backend=compiler, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.norm_relu_pool
    monkeypatch.setattr(
        ddfast.backend.compiled, "norm_relu_pool", lambda *a: (calls.append(a), original(*a))
    )
    x = draw(1, 2, 4, 4)
    layers.norm_relu_pool(x)
    assert len(calls) == 1
    with ddfast.use_backend("reference"):
        layers.norm_relu_pool(x)
    assert len(calls) == 1
