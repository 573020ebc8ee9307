"""Gates of `multi_formation` and its adjoint: definition, derivatives, C++ kernels, inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import ddfast
from ddfast.ops.multi_formation import multi_formation, multi_formation_adjoint
from ddfast.reference import multi_formation as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "auto"]
ORDERS = ["crop", "image"]
# Widths around vectors of every level, crops wholly beyond the image (4 and 7 of 9 x 7, 1 x 1).
SHAPES = [(2, 3, 32, 32), (3, 2, 9, 7), (1, 1, 1, 1), (1, 2, 28, 33), (2, 1, 5, 64), (1, 1, 41, 3)]
FACTORS = [1, 2, 3, 4, 7]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def larger(x, factor, seed=1):
    return draw(len(x) * factor**2, *x.shape[1:], seed=seed, dtype=x.dtype)


def official(x, factor, fill=0.5):
    """Padding, slices, torch's own interpolation, all images of a crop after each other."""
    sides = [-(-side // factor) for side in x.shape[2:]]
    below, right = (factor * c - side for c, side in zip(sides, x.shape[2:], strict=True))
    x = F.pad(x, (0, right, 0, below), value=fill)
    crops = [
        x[:, :, p * sides[0] : (p + 1) * sides[0], q * sides[1] : (q + 1) * sides[1]]
        for p in range(factor)
        for q in range(factor)
    ]
    size = (x.shape[2] - below, x.shape[3] - right)
    return F.interpolate(torch.cat(crops), size=size, mode="bilinear", align_corners=False)


def both(x, g, factor, order="crop", fill=0.5):
    return [multi_formation(x, factor, order, fill), multi_formation_adjoint(g, factor, order)]


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_published_decoding_and_its_gradient(backend, shape):
    for factor in FACTORS:
        x = draw(*shape).requires_grad_()
        g = larger(x, factor)
        expected = official(x, factor)
        (gradient,) = torch.autograd.grad(expected, x, g)
        with ddfast.use_backend(backend):
            found = both(x.detach(), g, factor)
        for ours, wanted in zip(found, (expected.detach(), gradient), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
            assert ours.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_picture_worked_out_by_hand(backend):
    """Crops (1, 2) and (3, padding) of one row; enlarged from two pixels to three."""
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    with ddfast.use_backend(backend):
        found = multi_formation(x, 2, "crop", 9.0)
        back = multi_formation_adjoint(torch.ones(4, 1, 1, 3), 2, "crop")
    assert found[:, 0, 0].tolist() == [[1.0, 1.5, 2.0], [3.0, 6.0, 9.0], [9.0] * 3, [9.0] * 3]
    assert back.tolist() == [[[[1.5, 1.5, 1.5]]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_orders(backend):
    x = draw(3, 2, 6, 5)
    g = larger(x, 2)
    with ddfast.use_backend(backend):
        crops, back = both(x, g, 2, "crop")
        images, _ = both(x, g, 2, "image")
        swapped = g.view(4, 3, 2, 6, 5).transpose(0, 1).reshape(12, 2, 6, 5)
        assert_same_bits(multi_formation_adjoint(swapped, 2, "image"), back)
    for n in range(3):
        for crop in range(4):
            assert_same_bits(images[4 * n + crop], crops[3 * crop + n])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_adjointness(backend, order):
    """<A x, g> = <x, A^T g>; the fill is all that is not linear."""
    for shape in SHAPES:
        for factor in FACTORS:
            x = draw(*shape)
            g = larger(x, factor)
            with ddfast.use_backend(backend):
                linear, transposed = both(x, g, factor, order, 0.0)
                whole = multi_formation(x, factor, order, 0.75)
                constant = multi_formation(torch.zeros_like(x), factor, order, 0.75)
            size = (linear.norm() * g.norm() + x.norm() * transposed.norm()).item()
            assert abs((linear * g).sum() - (x * transposed).sum()) <= 1e-15 * size
            torch.testing.assert_close(whole - linear, constant, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_factor_one_copies(backend):
    x = draw(2, 3, 4, 5, dtype=torch.float32)
    x[0, 0, 0, 0] = float("nan")
    with ddfast.use_backend(backend):
        for copied in both(x, x, 1):
            assert_same_bits(copied, x)
            assert copied.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_with_the_pixels_that_read_it(backend):
    x = draw(1, 1, 40, 40, dtype=torch.float32)
    x[0, 0, 7, 9], x[0, 0, 30, 3] = float("nan"), float("inf")
    with ddfast.use_backend(backend):
        found = multi_formation(x, 2, "crop", 0.5)
        back = multi_formation_adjoint(found, 2, "crop")
    # Two output rows and columns read a pixel from either side of it.
    assert found[0, 0, 13:17, 17:21].isnan().all() and found[0].isnan().sum() == 16
    assert found[2, 0, 19:23, 5:9].isinf().all() and found[2].isinf().sum() == 16
    assert found[1].isfinite().all() and found[3].isfinite().all()
    assert back[0, 0, 7, 9].isnan() and back.isnan().sum() <= 25
    assert back[0, 0, :5].isfinite().all() and back[0, 0, 10:29].isfinite().all()
    finite = back[0, 0, 20:, 10:]
    dense = both(x.nan_to_num(0, 0), found.nan_to_num(0, 0), 2)[1][0, 0, 20:, 10:]
    torch.testing.assert_close(finite, dense, rtol=1e-6, atol=1e-6)


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(backend, order):
    x = draw(2, 1, 5, 4).requires_grad_()
    g = larger(x.detach(), 3).requires_grad_()
    with ddfast.use_backend(backend):
        check_derivatives(lambda t: multi_formation(t, 3, order, 0.5), [x])
        check_derivatives(lambda t: multi_formation_adjoint(t, 3, order), [g])


def bilevel(decode, x, target, net):
    """A function of the gradient with respect to the images of a loss that is cubic in them."""
    loss = ((decode(x) - target) ** 3 * net).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return (gradient**2).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_gradient(compiled):
    x = draw(2, 1, 5, 4).requires_grad_()
    target, net = larger(x.detach(), 2), larger(x.detach(), 2, seed=5).requires_grad_()

    def outer(a, n):
        return bilevel(lambda t: multi_formation(t, 2, "crop", 0.5), a, target, n)

    exact = bilevel(lambda t: official(t, 2), x, target, net)
    expected = torch.autograd.grad(exact, (x, net))
    if compiled and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(outer, backend="aot_eager", fullgraph=True)
            found = torch.autograd.grad(whole(x, net), (x, net))
    else:  # torch before 2.13 cannot trace autograd.grad
        found = torch.autograd.grad(outer(x, net), (x, net))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- the C++ kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget_at_every_level(dtype):
    for shape in SHAPES:
        for factor in FACTORS:
            for order in ORDERS:
                x = draw(*shape, dtype=dtype)
                g = larger(x, factor)
                with ddfast.use_backend("reference"):
                    eager = both(x, g, factor, order)
                    exact = both(x.double(), g.double(), factor, order)
                for level in levels():
                    with at_level(level):
                        assert_within_budget(both(x, g, factor, order), eager, exact)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(level, dtype):
    """Crops and images shorter, as long and longer than a vector, poison around them."""
    with at_level(level):
        for width in range(1, 36):
            x = poisoned((1, 1, 3, width), dtype, "cpu")
            g = poisoned((4, 1, 3, width), dtype, "cpu")
            exact = [reference.multi_formation(x.double(), 2)]
            exact += [reference.multi_formation_adjoint(g.double(), 2)]
            eager = [t.to(dtype) for t in exact]
            assert_within_budget(both(x, g, 2), eager, exact)


@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 2, 40, 40))),
    factor=st.integers(2, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, factor, dtype):
    x = draw(*shape, dtype=dtype)
    g = larger(x, factor)
    with ddfast.use_backend("reference"):
        eager, exact = both(x, g, factor), both(x.double(), g.double(), factor)
    assert_within_budget(both(x, g, factor), eager, exact)


def test_same_bits_for_any_number_of_threads():
    x = draw(10, 3, 33, 40, dtype=torch.float32)
    g = larger(x, 3)
    assert_same_bits_for_any_threads(lambda: both(x, g, 3))
    x[0, 0, 0, 0] = float("inf")
    assert_same_bits_for_any_threads(lambda: both(x, g, 3, "image"))


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.multi_formation
    monkeypatch.setattr(
        ddfast.backend.compiled, "multi_formation", lambda *a: (calls.append(a), original(*a))
    )
    x = draw(2, 3, 8, 8)
    both(x, larger(x, 2), 2)
    assert len(calls) == 2
    with ddfast.use_backend("reference"):
        both(x, larger(x, 2), 2)
    assert len(calls) == 2


# --- the operators, their inputs ----------------------------------------------------------------


def test_opcheck_on_every_operator():
    x = draw(2, 3, 7, 5).requires_grad_()
    g = larger(x.detach(), 2).requires_grad_()
    for factor in (1, 2):
        torch.library.opcheck(multi_formation, (x, factor, "image", 0.5))
        torch.library.opcheck(multi_formation_adjoint, (g, factor, "crop"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    x = draw(2, 3, 9, 8).requires_grad_()

    def f(t):
        return (multi_formation(t * 2, 2, "crop", 0.5) ** 2).sum()

    expected = f(x)
    found = torch.compile(f, backend=compiler, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_one_graph_serves_any_number_of_images():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda t: multi_formation(t, 2, "image", 0.5), backend=counter, fullgraph=True, dynamic=True
    )
    for n in (4, 7, 17):
        x = draw(n, 2, 6, 5)
        torch.testing.assert_close(compiled(x), multi_formation(x, 2, "image", 0.5))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, dtype):
    base = draw(8, 6, 10, 9, dtype=dtype)
    with ddfast.use_backend(backend):
        for x in (
            base.transpose(2, 3),
            base.transpose(0, 1)[:4],
            base.to(memory_format=torch.channels_last),
            base[::2, 1:5:2, 3:, ::2],
            base[:4, :1, :1].expand(4, 6, 10, 9),
        ):
            with unchanged(base):
                ours = both(x, x, 2, "image")
            assert_same_bits(ours, both(x.contiguous(), x.contiguous(), 2, "image"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sets(backend):
    with ddfast.use_backend(backend):
        for shape in ((0, 3, 8, 8), (2, 0, 8, 8)):
            x = torch.empty(shape, requires_grad=True)
            found = multi_formation(x, 2, "crop", 0.5)
            assert found.shape == (4 * shape[0], *shape[1:])
            (gradient,) = torch.autograd.grad(found.sum(), x)
            assert gradient.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_named(backend):
    x = draw(3, 1, 4, 4)
    cases = [
        (lambda: multi_formation(x[0], 2, "crop", 0.5), r"x: got .*\(1, 4, 4\), expected"),
        (lambda: multi_formation(x.long(), 2, "crop", 0.5), r"x: got torch\.int64"),
        (lambda: multi_formation(x, 0, "crop", 0.5), r"factor: got 0, expected at least 1"),
        (lambda: multi_formation(x, 2, "rows", 0.5), r"order: got 'rows', expected 'crop' or"),
        (lambda: multi_formation(x, 2, "crop", float("nan")), r"fill: got nan, expected a finite"),
        (lambda: multi_formation_adjoint(x, 2, "crop"), r"grad: got 3 images, .* multiple of 4"),
        (lambda: multi_formation_adjoint(x, -1, "crop"), r"factor: got -1"),
    ]
    with ddfast.use_backend(backend):
        for call, message in cases:
            with pytest.raises(ValueError, match=message):
                call()
