"""Inputs and errors of `norm_relu_pool`."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ddfast
from ddfast import layers
from ddfast.ops import norm_relu_pool as ops
from ddfast.reference import norm_relu_pool as reference
from ddfast.testing import assert_same_bits, assert_within_budget, unchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def with_gradients(x, weight, bias, groups, activation="relu", pool="average"):
    """Result, gradients and the gradient of a function of them."""
    leaves = [t for t in (x, weight, bias) if t is not None]
    out = layers.norm_relu_pool(x, weight, bias, groups, activation=activation, pool=pool)
    seeds = draw(*out.shape, seed=20).to(out.dtype)
    first = torch.autograd.grad(out, leaves, seeds, create_graph=True)
    along = [draw(*g.shape, seed=21 + i).to(g.dtype) for i, g in enumerate(first)]
    second = torch.autograd.grad(first, leaves, along, allow_unused=True)
    return [out, *first, *(torch.zeros(()) if g is None else g for g in second)]


@given(
    shape=st.tuples(*(st.integers(*ends) for ends in ((1, 3), (1, 40), (2, 9), (2, 9)))),
    norm=st.sampled_from(["instance", "layer", "none"]),
    activation=st.sampled_from(reference.ACTIVATIONS),
    pool=st.sampled_from(reference.POOLS),
    dtype=st.sampled_from(DTYPES),
    last=st.booleans(),
)
def test_any_shape_matches_the_reference(shape, norm, activation, pool, dtype, last):
    groups = {"instance": shape[1], "layer": 1, "none": 0}[norm]
    x = draw(*shape, dtype=dtype, mean=0.2)
    x = x.contiguous(memory_format=LAST if last else torch.contiguous_format)
    parameters = [None, None]
    if groups:
        parameters = [draw(shape[1], seed=i, dtype=dtype).requires_grad_() for i in (1, 2)]
    inputs = [x.requires_grad_(), *parameters]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    settings = groups, activation, pool
    with unchanged([t for t in inputs if t is not None]):
        ours = with_gradients(*inputs, *settings)
    with ddfast.use_backend("reference"):
        eager, exact = with_gradients(*inputs, *settings), with_gradients(*wide, *settings)
    assert_within_budget(ours, eager, exact, tiny=64)
    form = LAST if last and not x.is_contiguous() else torch.contiguous_format
    assert ours[0].is_contiguous(memory_format=form) and ours[0].dtype == dtype


VIEWS = {
    "transposed": lambda t: t.transpose(2, 3),
    "channels expanded": lambda t: t[:, :1].expand(6, 20, 8, 8),
    "all expanded": lambda t: t[:1, :1, :1, :1].expand(6, 20, 8, 8),
    "sliced": lambda t: t[::2, 1:19:3, 2:7, ::2],
    "a slice of channels": lambda t: t[:, :16],
    "images skipped": lambda t: t[::3],
    "channels last": lambda t: t.contiguous(memory_format=LAST),
    "a slice of channels last": lambda t: t.contiguous(memory_format=LAST)[:, 2:18],
}


@pytest.mark.parametrize("view", VIEWS)
def test_layouts(view):
    base = draw(6, 20, 8, 8, dtype=torch.float32)
    x = VIEWS[view](base)
    channels = x.shape[1]
    with unchanged(base):
        ours = with_gradients(x.detach().requires_grad_(), None, None, channels)
    dense = with_gradients(x.contiguous().requires_grad_(), None, None, channels)
    # Channels are worked on in the same way wherever they lie.
    assert_same_bits(ours, dense)


@pytest.mark.parametrize(
    "forms", list(itertools.product((torch.contiguous_format, LAST), repeat=4))
)
def test_mixed_memory_formats(forms):
    """Gradients and tangents come as they like, expanded ones included."""
    shapes = ((2, 20, 6, 6), (2, 20, 6, 6), (2, 20, 3, 3), (2, 20, 3, 3))
    x, tangent, grad, moved = (
        draw(*shape, seed=seed).contiguous(memory_format=form)
        for seed, (shape, form) in enumerate(zip(shapes, forms, strict=True))
    )
    _, mean, rstd = ops.norm_relu_pool(x, None, None, 20, 1e-5, "relu", "average")
    point = (tangent, None, None, None, None, mean, rstd, 20, "relu", "average")
    found = ops.norm_relu_pool_tangent_bwd(grad, moved, x, *point)
    expected = reference.norm_relu_pool_tangent_bwd(grad, moved, x, *point)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    flat = grad[:, :, :1, :1].expand(2, 20, 3, 3)
    ours = ops.norm_relu_pool_bwd(flat, x, None, None, mean, rstd, 20, "relu", "average")
    whole = ops.norm_relu_pool_bwd(
        flat.contiguous(), x, None, None, mean, rstd, 20, "relu", "average"
    )
    assert_same_bits(ours, whole)
    assert ours[0].is_contiguous(memory_format=forms[0])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_any_subset_may_require_a_gradient(wanted):
    tensors = [draw(2, 4, 6, 6), draw(4, seed=1), draw(4, seed=2)]
    everything = [t.clone().requires_grad_() for t in tensors]
    layers.norm_relu_pool(*everything, 4).square().sum().backward()
    some = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    value = layers.norm_relu_pool(*some, 4).square().sum()
    assert value.requires_grad == any(wanted)
    if any(wanted):
        with unchanged(some):
            value.backward()
    for one, other, want in zip(some, everything, wanted, strict=True):
        assert (one.grad is not None) == want
        if want:
            assert_same_bits(one.grad, other.grad)


@pytest.mark.parametrize("given_", ["weight", "bias"])
def test_weight_and_bias_do_without_each_other(given_):
    x, parameter = draw(2, 4, 6, 6).requires_grad_(), draw(4, seed=1).requires_grad_()
    both = {"weight": torch.ones(4).double(), "bias": torch.zeros(4).double()}
    expected = layers.norm_relu_pool(x, **(both | {given_: parameter}), groups=2)
    found = layers.norm_relu_pool(x, **{given_: parameter}, groups=2)
    assert_same_bits(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (x, parameter))
    assert_same_bits(torch.autograd.grad(found.square().sum(), (x, parameter)), wanted)


def test_parameters_of_another_dtype():
    x, weight = draw(2, 4, 6, 6, dtype=torch.float32).requires_grad_(), draw(4).requires_grad_()
    out = layers.norm_relu_pool(x, weight, None, 4)
    by_x, by_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert (out.dtype, by_x.dtype, by_weight.dtype) == (x.dtype, x.dtype, weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", [torch.contiguous_format, LAST])
def test_constant_planes_and_single_pixels(dtype, form):
    """Without variance the result is the bias, and no gradient is NaN or large."""
    bias = draw(20, seed=2, dtype=dtype).requires_grad_()
    for shape, pool in (((3, 20, 6, 5), "average"), ((3, 20, 1, 1), "none")):
        x = draw(3, 20, 1, 1, dtype=dtype).expand(shape).contiguous(memory_format=form)
        results = with_gradients(x.requires_grad_(), None, bias, 20, pool=pool)
        assert all(t.isfinite().all() for t in results)
        expected = bias.relu()[:, None, None].expand(results[0].shape)
        torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-4)
        if shape[2] == 1:
            assert results[1].abs().max() < 1e-3


def test_nothing_at_all():
    for shape in ((0, 4, 6, 6), (0, 4, 1, 1)):
        for groups in (0, 2, 4):
            x = draw(*shape).requires_grad_()
            out = layers.norm_relu_pool(x, groups=groups, pool="none")
            assert out.shape == shape
            (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            assert gradient.shape == shape
            torch.autograd.grad(gradient.sum(), x, allow_unused=True)


def test_nan_and_infinity_stay_in_their_channel():
    for form in (torch.contiguous_format, LAST):
        x = draw(1, 20, 4, 4, dtype=torch.float32)
        x[0, 3, 1, 1], x[0, 7, 0, 0] = float("nan"), float("inf")
        out = layers.norm_relu_pool(x.contiguous(memory_format=form), groups=20)
        assert out[0, [3, 7]].isnan().all()
        rest = [c for c in range(20) if c not in (3, 7)]
        assert out[0, rest].isfinite().all()
        plain = layers.norm_relu_pool(x.contiguous(memory_format=form), pool="max")
        assert plain[0, 3, 0, 0].isnan() and plain[0, 7, 0, 0] == float("inf")


# --- errors -------------------------------------------------------------------------------------

x4 = torch.ones(2, 4, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (([1.0],), {}, TypeError, "x: got list, expected a tensor"),
        ((x4.int(),), {}, TypeError, r"x: got torch\.int32, expected a floating dtype"),
        ((x4[0],), {}, ValueError, r"x: got shape \(4, 6, 6\), expected \(N, channels, H, W\)"),
        ((x4[:, :, :1],), {}, ValueError, r"expected a channel and 2x2 pixels or more"),
        ((x4[:, :, :0],), {"pool": "none"}, ValueError, r"expected a channel and 1x1 pixels"),
        ((x4[:, :0],), {}, ValueError, r"x: got shape \(2, 0, 6, 6\), expected a channel"),
        ((x4,), {"groups": 3}, ValueError, "groups: got 3, expected 0 or a divisor of 4 channels"),
        ((x4,), {"groups": -1}, ValueError, "groups: got -1"),
        ((x4,), {"groups": 0.5}, TypeError, "groups: got 0.5, expected an integer"),
        ((x4,), {"eps": -1.0}, ValueError, "eps: got -1.0, expected a finite number >= 0"),
        ((x4,), {"eps": float("nan")}, ValueError, "eps: got nan"),
        ((x4,), {"activation": "tanh"}, ValueError, "activation: got 'tanh', expected one of relu"),
        ((x4,), {"pool": "avg"}, ValueError, "pool: got 'avg', expected one of average, max, none"),
        ((x4, torch.ones(4)), {}, ValueError, "weight: given, expected None without normal"),
        ((x4, None, torch.ones(4)), {}, ValueError, "bias: given, expected None without normal"),
        (
            (x4, torch.ones(3)),
            {"groups": 4},
            ValueError,
            r"weight: got shape \(3,\), expected \(4,",
        ),
        ((x4, 1.0), {"groups": 4}, TypeError, "weight: got float, expected a tensor"),
        (
            (x4, None, torch.ones(4, device="meta")),
            {"groups": 4},
            ValueError,
            "bias: on meta, expected cpu, where x is",
        ),
    ],
)
def test_bad_input_is_named(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        layers.norm_relu_pool(*arguments, **options)
