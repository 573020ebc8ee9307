"""Gates of `characteristic_function` and its distance: definition, derivatives, operator."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.losses import Frequencies
from ddfast.ops import characteristic_function as ops
from ddfast.reference import characteristic_function as reference
from ddfast.testing import assert_same_bits, at_level, check_derivatives, levels, unchanged

DRAWN = Frequencies(count=7, seed=2**40 + 3, scale=0.7, stream=2)


def draw(*shape: int, seed: int = 0, dtype=torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def literal(x: Tensor, t: Tensor) -> list[complex]:
    """Frequency by frequency and row by row, in Python complex numbers."""
    rows = x.tolist()
    means = []
    for frequency in t.tolist():
        waves = [cmath.exp(1j * sum(map(float.__mul__, frequency, row))) for row in rows]
        means.append(sum(waves) / len(rows))
    return means


def literal_distance(x: Tensor, y: Tensor, t: Tensor, alpha: float, beta: float) -> float:
    """The published formula as it stands."""
    total = 0.0
    for a, b in zip(literal(x, t), literal(y, t), strict=True):
        phase = 2 * (abs(a) * abs(b) - a.real * b.real - a.imag * b.imag)
        total += math.sqrt(alpha * (abs(a) - abs(b)) ** 2 + beta * max(phase, 1e-12))
    return total / len(t)


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.3), (0.0, 1.0), (2.0, 0.0)])
def test_the_formula(backend, weights):
    x, y, t = draw(4, 5, seed=1), draw(9, 5, seed=2), draw(6, 5, seed=3)
    with ddfast.use_backend(backend):
        phi = losses.characteristic_function(x, t)
        value = losses.characteristic_function_distance(x, y, t, *weights)
    torch.testing.assert_close(
        torch.view_as_complex(phi), torch.tensor(literal(x, t), dtype=torch.complex128)
    )
    assert value.shape == ()
    assert value.item() == pytest.approx(literal_distance(x, y, t, *weights), rel=1e-10)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["shared", "by class", "drawn"])
def test_classes_are_computed_one_by_one(backend, kind):
    x, y = draw(3, 4, 70, seed=1), draw(3, 9, 70, seed=2)
    t = {"shared": draw(6, 70, seed=3), "by class": draw(3, 6, 70, seed=3), "drawn": DRAWN}[kind]
    with ddfast.use_backend(backend):
        phi = losses.characteristic_function(x, t)
        values = losses.characteristic_function_distance(x, y, t, 0.9, 0.3)
        for c in range(3):
            of_class = {
                "shared": t,
                "by class": t[c] if kind == "by class" else t,
                "drawn": Frequencies(7, DRAWN.seed, 0.7, 2 + c),
            }[kind]
            torch.testing.assert_close(losses.characteristic_function(x[c], of_class), phi[c])
            one = losses.characteristic_function_distance(x[c], y[c], of_class, 0.9, 0.3)
            torch.testing.assert_close(one, values[c])
    assert values.shape == (3,)
    assert len(set(values.tolist())) == 3


def test_equal_weights_compare_the_functions_themselves():
    """alpha = beta: sqrt(1/2) |phi_x - phi_y|, in every frequency (methods, 6.1)."""
    x, y, t = draw(5, 8, seed=1), draw(6, 8, seed=2), draw(40, 8, seed=3)
    a, b = (losses.characteristic_function(s, t) for s in (x, y))
    found = losses.characteristic_function_distance(x, y, t)
    torch.testing.assert_close(found, ((a - b).square().sum(-1) / 2).sqrt().mean())
    # In float32, too, where the published form of the phase term has lost most digits.
    near = (x + 1e-4 * draw(5, 8, seed=4)).float()
    wide = losses.characteristic_function_distance(near.double(), x.float().double(), t)
    a, b = (losses.characteristic_function(s.float(), t.float()) for s in (near, x))
    rounded = reference.distance(a, b, 0.5, 0.5).double()
    exact = reference.distance(a.double(), b.double(), 0.5, 0.5)
    torch.testing.assert_close(rounded, exact, rtol=1e-6, atol=0)
    assert float(wide) < 1e-3


def test_the_mean_comes_before_the_modulus():
    """Two rows whose waves cancel: |mean| = 0, where the mean of moduli would be 1."""
    x = torch.tensor([[0.0], [math.pi]], dtype=torch.float64)
    y = torch.tensor([[0.3]], dtype=torch.float64)
    t = torch.ones(1, 1, dtype=torch.float64)
    phi = losses.characteristic_function(x, t)
    assert phi.abs().max() < 1e-15
    value = losses.characteristic_function_distance(x, y, t, 1.0, 0.0)
    assert float(value) == pytest.approx(1.0)


def test_parts_of_a_data_set_add_up():
    y, t, x = draw(30, 8, seed=1), draw(20, 8, seed=2), draw(4, 8, seed=3)
    parts = [losses.characteristic_function(part, t) * len(part) / 30 for part in y.split(12)]
    whole = losses.characteristic_function(y, t)
    torch.testing.assert_close(sum(parts), whole)
    given = losses.characteristic_function_distance(x, None, t, phi_y=sum(parts))
    torch.testing.assert_close(given, losses.characteristic_function_distance(x, y, t))


# --- edge cases (methods, 11) ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.5, 0.2, 0.0])
def test_identical_sets(backend, dtype, beta):
    """The floor sqrt(beta 1e-12), and a gradient of exactly 0, not NaN."""
    x, t = draw(5, 8, dtype=dtype).requires_grad_(), draw(40, 8, dtype=dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with ddfast.use_backend(backend):
        value = losses.characteristic_function_distance(x, y, t, 0.5, beta)
        gradients = torch.autograd.grad(value, (x, y, t))
        by_hand = losses.characteristic_function_distance_and_gradient(x, y, t, 0.5, beta)
    assert value.item() == pytest.approx(math.sqrt(beta * 1e-12), rel=1e-6)
    for gradient in (*gradients, by_hand[1]):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_near_identical_sets(dtype):
    """Below the clamp only amplitudes pull; above it, phases too; nowhere is it NaN or huge."""
    base, t = draw(5, 8, dtype=torch.float64), draw(40, 8)
    step = draw(5, 8, seed=5)
    for distance in (1e-12, 1e-9, 1e-7, 1e-5, 1e-3):
        x = (base + distance * step).to(dtype).requires_grad_()
        value = losses.characteristic_function_distance(x, base.to(dtype), t.to(dtype))
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.isfinite().all() and float(gradient.norm()) < 1, distance
    wide = (base + 1e-3 * step).requires_grad_()
    exact = losses.characteristic_function_distance(wide, base, t)
    (expected,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_clamp_takes_the_gradient_of_the_phase():
    """One row: amplitudes are 1 whatever it is, so below the floor the gradient is 0."""
    t = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    for shift, moved in ((1e-7, False), (1e-4, True)):
        x = (y + shift).requires_grad_()
        value = losses.characteristic_function_distance(x, y, t, 0.3, 0.8)
        (gradient,) = torch.autograd.grad(value, x)
        phase = 2 - 2 * math.cos(shift)
        assert float(value) == pytest.approx(math.sqrt(0.8 * max(phase, 1e-12)), rel=1e-6)
        expected = 0.8 * math.sin(shift) / float(value) if moved else 0.0
        assert gradient.tolist()[0] == pytest.approx([expected, 0.0], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_features_and_zero_moduli(dtype):
    """A zero row stands at phase 0; where |phi| is 0 its derivative is taken as 0."""
    t = draw(20, 8, dtype=dtype)
    zeros = torch.zeros(1, 8, dtype=dtype, requires_grad=True)
    phi = losses.characteristic_function(zeros, t)
    assert torch.equal(phi, torch.tensor([1.0, 0.0], dtype=dtype).expand(20, 2))
    value = losses.characteristic_function_distance(zeros, draw(5, 8, dtype=dtype), t)
    (gradient,) = torch.autograd.grad(value, zeros)
    assert gradient.isfinite().all() and gradient.any()
    nothing = torch.zeros(20, 2, dtype=dtype, requires_grad=True)
    for other in (torch.zeros(20, 2, dtype=dtype), draw(20, 2, dtype=dtype)):
        for alpha, beta in ((0.5, 0.5), (1.0, 0.0)):
            found = reference.distance(nothing, other, alpha, beta)
            (gradient,) = torch.autograd.grad(found, nothing)
            closed = reference.distance_and_gradient(nothing.detach(), other, alpha, beta)
            assert gradient.isfinite().all() and closed[1].isfinite().all()
            if not other.any():
                assert not gradient.any() and not closed[1].any()


@pytest.mark.parametrize("level", levels())
def test_large_arguments(level):
    """Phases up to 1e5, and beyond, are as exact as float32 lets a product be: one row, d = 1."""
    x = torch.ones(1, 1)
    t = torch.cat(
        [
            draw(4000, 1, seed=1, dtype=torch.float32, scale=3e4).clamp(-1e5, 1e5),
            torch.tensor([[1e5], [-1e5], [1e5 + 1], [1e8], [-3e37], [0.0], [1e-30]]),
            (torch.arange(1, 3000, dtype=torch.float64) * math.pi / 2).float().view(-1, 1),
        ]
    )
    with at_level(level):
        phi = losses.characteristic_function(x, t).double()
        infinite = losses.characteristic_function(x, torch.tensor([[math.inf], [1.0]]))
    exact = torch.cat([t.double().cos(), t.double().sin()], 1)
    error = (phi - exact).abs()
    assert (error <= 2**-23).all()
    # In proportion to each value: also where it is nearly 0.
    assert (error <= 3 * 2**-24 * exact.abs() + 1e-11).all()
    assert infinite[0].isnan().all() and infinite[1].isfinite().all()


def test_one_frequency_one_row_one_feature_and_none():
    one = draw(1, 1)
    value = losses.characteristic_function_distance(one, one + 1, one)
    expected = literal_distance(one, one + 1, one, 0.5, 0.5)
    assert float(value) == pytest.approx(expected)
    without = losses.characteristic_function(torch.ones(2, 3, 0), torch.ones(4, 0))
    assert torch.equal(without, torch.tensor([1.0, 0.0]).expand(2, 4, 2))
    nobody = torch.ones(0, 3, 5, requires_grad=True)
    value = losses.characteristic_function_distance(nobody, nobody, torch.ones(4, 5))
    (gradient,) = torch.autograd.grad(value.sum(), nobody)
    assert value.shape == (0,) and gradient.shape == nobody.shape
    by_hand = losses.characteristic_function_distance_and_gradient(nobody, nobody, DRAWN)
    assert by_hand[0].shape == (0,) and by_hand[1].shape == nobody.shape


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("t", [(3, 5), (2, 3, 5), None])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.9)])
def test_gradcheck(backend, t, weights):
    x, y = draw(2, 3, 5, seed=1), draw(2, 4, 5, seed=2)
    frequencies = DRAWN if t is None else draw(*t, seed=3).requires_grad_()

    def distance(a, b, *given):
        of = given[0] if given else frequencies
        return losses.characteristic_function_distance(a, b, of, *weights)

    inputs = (x.requires_grad_(), y.requires_grad_()) + (() if t is None else (frequencies,))
    with ddfast.use_backend(backend):
        check_derivatives(distance, inputs, order=1)


@pytest.mark.uses_global_random_state
def test_the_definition_has_every_order():
    x, t = draw(2, 3, 4, seed=1).requires_grad_(), draw(1, 3, 4, seed=3).requires_grad_()
    y = draw(2, 5, 4, seed=2)

    def distance(a, b):
        phi, of_y = (reference.characteristic_function(s, b)[0] for s in (a, y))
        return reference.distance(phi, of_y, 0.4, 0.8)

    check_derivatives(distance, (x, t), order=2)


@pytest.mark.parametrize("wanted", ["none", "x", "y", "t", "x y", "x t", "y t", "x y t"])
@pytest.mark.parametrize("kind", ["shared", "by class"])
def test_any_subset_may_require_a_gradient(wanted, kind):
    names = wanted.split()
    shape = (6, 70) if kind == "shared" else (2, 6, 70)
    tensors = {"x": draw(2, 3, 70), "y": draw(2, 4, 70, seed=1), "t": draw(*shape, seed=2)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in names)
    with unchanged(*tensors.values()):
        value = losses.characteristic_function_distance(**tensors, alpha=0.9)
        assert value.requires_grad == (wanted != "none")
        if wanted != "none":
            value.sum().backward()
    exact = {n: v.detach().clone().requires_grad_() for n, v in tensors.items()}
    t = exact["t"].view(-1, 6, 70)
    phi_x, phi_y = (reference.characteristic_function(exact[n], t)[0] for n in "xy")
    reference.distance(phi_x, phi_y, 0.9, 0.5).sum().backward()
    for name, tensor in tensors.items():
        if name not in names:
            assert tensor.grad is None
            continue
        torch.testing.assert_close(tensor.grad, exact[name].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("t", ["shared", "by class", "drawn"])
def test_value_and_gradient_in_one_go(dtype, t):
    x, y = draw(3, 4, 70, dtype=dtype), draw(3, 9, 70, seed=1, dtype=dtype)
    frequencies = {"shared": draw(7, 70), "by class": draw(3, 7, 70), "drawn": DRAWN}[t]
    if t != "drawn":
        frequencies = frequencies.to(dtype)
    leaf = x.clone().requires_grad_()
    expected = losses.characteristic_function_distance(leaf, y, frequencies, 0.9, 0.3)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    with unchanged(x, y):
        value, by_x = losses.characteristic_function_distance_and_gradient(
            leaf, y, frequencies, 0.9, 0.3
        )
    assert not value.requires_grad and by_x.dtype == dtype
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_x, gradient, rtol=rtol, atol=1e-7)
    phi_y = losses.characteristic_function(y, frequencies)
    given = losses.characteristic_function_distance_and_gradient(
        x, None, frequencies, 0.9, 0.3, phi_y=phi_y
    )
    assert_same_bits([value, by_x], list(given))
    one = losses.characteristic_function_distance_and_gradient(
        x[0], y[0], frequencies[0] if t == "by class" else frequencies, 0.9, 0.3
    )
    assert_same_bits([value[0], by_x[0]], list(one))


@pytest.mark.parametrize("limit", [0, 300, 1000, 10**9])
@pytest.mark.parametrize("t", ["shared", "by class", "drawn"])
def test_what_is_kept_changes_no_bit(limit, t, monkeypatch):
    """Products that are kept, kept for a few classes at a time, or computed again."""
    x, y = draw(3, 5, 70, dtype=torch.float32), draw(3, 9, 70, seed=1, dtype=torch.float32)
    frequencies = {
        "shared": draw(7, 70, dtype=torch.float32),
        "by class": draw(3, 7, 70, dtype=torch.float32),
        "drawn": DRAWN,
    }[t]

    def everything():
        leaf = x.clone().requires_grad_()
        value = losses.characteristic_function_distance(leaf, y, frequencies)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        by_hand = losses.characteristic_function_distance_and_gradient(x, y, frequencies)
        return [value, gradient, *by_hand]

    expected = everything()
    monkeypatch.setattr("ddfast.losses.characteristic.KEPT_BYTES", limit)
    assert_same_bits(everything(), expected)


@pytest.mark.parametrize("t", ["given", "drawn"])
def test_the_second_derivative_is_refused(t):
    x, y = draw(3, 5).requires_grad_(), draw(4, 5, seed=1)
    frequencies = draw(6, 5, seed=2) if t == "given" else DRAWN
    value = losses.characteristic_function_distance(x, y, frequencies)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative is not supported"):
        (gradient**2).sum().backward()


# --- the operators ------------------------------------------------------------------------------


def test_opcheck_on_every_operator():
    x, t = draw(2, 3, 5).requires_grad_(), draw(1, 4, 5).requires_grad_()
    by_class = draw(2, 4, 5, dtype=torch.float32).requires_grad_()
    grad, phase = draw(2, 4, 2), draw(2, 3, 4)
    numbers = 4, 11, 0.5, 1
    for frequencies in (t, by_class, None):
        given = None if frequencies is None else frequencies.detach()
        for keep in (False, True):
            torch.library.opcheck(ops.characteristic_function, (x, frequencies, *numbers, keep))
        for kept in (phase, phase.new_empty(0)):
            torch.library.opcheck(
                ops.characteristic_function_bwd,
                (grad, x.detach(), given, kept, *numbers, True, given is not None),
            )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("t", ["given", "drawn"])
def test_torch_compile_without_graph_break(compiler, t):
    torch._dynamo.reset()
    x, y = draw(2, 3, 5).requires_grad_(), draw(2, 6, 5, seed=1)
    frequencies = draw(7, 5, seed=2) if t == "given" else DRAWN

    def f(a, b):
        return losses.characteristic_function_distance(a * 2, b, frequencies, 0.9, 0.2).sum()

    expected = f(x, y)
    found = torch.compile(f, backend=compiler, fullgraph=True)(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-10, atol=1e-14
    )


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.characteristic_function
    monkeypatch.setattr(
        ddfast.backend.compiled,
        "characteristic_function",
        lambda *a: (calls.append(a), original(*a)),
    )
    x, y, t = draw(3, 5), draw(4, 5), draw(6, 5)
    losses.characteristic_function_distance_and_gradient(x, y, t)
    assert len(calls) == 3
    with ddfast.use_backend("reference"):
        losses.characteristic_function_distance_and_gradient(x, y, t)
    assert len(calls) == 3
