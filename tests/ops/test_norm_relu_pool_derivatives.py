"""Derivatives of `norm_relu_pool`: both orders, along tangents, and where they end."""

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
from ddfast.testing import check_derivatives

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
