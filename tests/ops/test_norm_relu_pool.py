"""Gates of `norm_relu_pool` and its derivatives: definition, derivatives, kernel, operators."""

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
    check_derivatives,
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


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("norm", "activation", "pool"), CASES)
def test_gradcheck_to_second_order(backend, norm, activation, pool):
    groups = GROUPS[norm]
    x = draw(2, 4, 3, 2).contiguous(memory_format=LAST).requires_grad_()
    inputs = [x, *(t.requires_grad_() for t in affine(groups, 4) if t is not None)]

    def f(x, weight=None, bias=None):
        return layers.norm_relu_pool(x, weight, bias, groups, 1e-5, activation, pool)

    with ddfast.use_backend(backend):
        check_derivatives(f, inputs)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("norm", "activation", "pool"), CASES)
def test_tangents_against_forward_mode(backend, norm, activation, pool):
    """Both tangent operators against torch.func.jvp of the definition."""
    groups = GROUPS[norm]
    x, tangent = draw(2, 4, 5, 4), draw(2, 4, 5, 4, seed=3)
    point = [x, *(t for t in affine(groups, 4) if t is not None)]
    along = [tangent, *(t for t in affine(groups, 4, seed=6) if t is not None)]
    missing = [None] * (3 - len(point))

    def forward(x, weight=None, bias=None):
        return reference.norm_relu_pool(x, weight, bias, groups, 1e-5, activation, pool)

    def backward(grad, x, weight=None, bias=None):
        parameters = [t for t in (weight, bias) if t is not None]
        _, vjp = torch.func.vjp(lambda *p: forward(*p)[0], x, *parameters)
        return vjp(grad)

    (out, mean, rstd), (wanted, _, _) = torch.func.jvp(forward, tuple(point), tuple(along))
    rest = (*along[1:], *missing, mean, rstd, groups, activation, pool)
    arguments = (x, tangent, *point[1:], *missing, *rest)
    grad, grad_tangent = draw(*out.shape, seed=9), draw(*out.shape, seed=10)
    wanted_gradients, wanted_moved = torch.func.jvp(
        backward, (grad, *point), (grad_tangent, *along)
    )
    with ddfast.use_backend(backend):
        found = ops.norm_relu_pool_tangent(*arguments)
        first = ops.norm_relu_pool_bwd(grad, *point, *missing, mean, rstd, groups, activation, pool)
        moved = ops.norm_relu_pool_tangent_bwd(grad, grad_tangent, *arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for ours, exact in ((first, wanted_gradients), (moved, wanted_moved)):
        torch.testing.assert_close(ours[0], exact[0], rtol=1e-10, atol=1e-11)
        for rows, total in zip(ours[1:], exact[1:], strict=bool(groups)):
            torch.testing.assert_close(rows.sum(0), total, rtol=1e-10, atol=1e-11)


def test_tangents_of_an_image_of_its_own():
    """weight' and bias' may be rows, one an image: as if each image came alone."""
    x, tangent = draw(3, 4, 4, 4), draw(3, 4, 4, 4, seed=1)
    weight, bias = affine(4, 4)
    rows, more = draw(3, 4, seed=2), draw(3, 4, seed=3)
    out, mean, rstd = ops.norm_relu_pool(x, weight, bias, 4, 1e-5, "swish", "average")
    grad, settings = draw(*out.shape, seed=4), (4, "swish", "average")

    def both(i, weight_tangent, bias_tangent):
        statistics = mean[i], rstd[i]
        point = x[i], tangent[i], weight, bias, weight_tangent, bias_tangent, *statistics, *settings
        moved = ops.norm_relu_pool_tangent(*point)
        return [moved, *ops.norm_relu_pool_tangent_bwd(grad[i], None, *point)]

    together = both(slice(None), rows, more)
    for i in range(3):
        alone = both(slice(i, i + 1), rows[i], more[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-13, atol=1e-14)


def test_the_third_derivative_and_that_of_the_statistics_raise():
    x = draw(2, 3, 4, 4).requires_grad_()
    value = (layers.norm_relu_pool(x, groups=3, activation="swish") ** 2).sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(second.sum(), x)
    _, mean, rstd = ops.norm_relu_pool(x, None, None, 3, 1e-5, "relu", "average")
    assert not mean.requires_grad and not rstd.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_gradient(compiled):
    """How the images' gradient of a block grows when its kernel changes."""
    images, kernel = draw(2, 3, 6, 6).requires_grad_(), draw(4, 3, 3, 3, seed=1).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(4, 4))
    leaves = images, kernel, weight, bias

    def outer(block, images, kernel, weight, bias):
        out = block(F.conv2d(images, kernel, padding=1), weight, bias)
        first = torch.autograd.grad((out**2).sum(), (kernel, weight, bias), create_graph=True)
        return sum((g**2).sum() for g in first)

    def ours(*inputs):
        return outer(lambda x, w, b: layers.norm_relu_pool(x, w, b, 4, activation="swish"), *inputs)

    exact = outer(lambda x, w, b: plain(x, w, b, 4, "swish", "average"), *leaves)
    expected = torch.autograd.grad(exact, leaves)
    if compiled and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(ours, backend="aot_eager", fullgraph=True)
            found = torch.autograd.grad(whole(*leaves), leaves)
    else:  # torch before 2.13 cannot trace autograd.grad
        found = torch.autograd.grad(ours(*leaves), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- the C++ kernel -----------------------------------------------------------------------------

# Whole vectors of channels and some more; planes around blocks, segments and odd sizes.
SHAPES = [
    (2, 4, 5, 6),
    (2, 32, 8, 8),
    (2, 35, 7, 9),
    (1, 48, 16, 16),
    (3, 130, 2, 2),
    (1, 16, 33, 34),
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
