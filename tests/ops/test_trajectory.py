"""Gates of `trajectory` and its distance: definition, derivatives, kernel, inputs, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import trajectory as ops
from ddfast.reference import trajectory as reference
from ddfast.reference.gradient_distance import accumulator
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    levels,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 31, 32, 33, 4095, 4096, 4097, 70_000]


def draw(size: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)


def arguments(size: int, dtype=torch.float64) -> list[Tensor]:
    theta, gradient, total, start, target = (draw(size, seed, dtype) for seed in range(5))
    wide = accumulator(dtype)
    return [theta, gradient, total.to(wide), start, target, torch.tensor(0.3, dtype=wide)]


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_formula(backend):
    theta, gradient, total, start, target, lr = arguments(5)
    with ddfast.use_backend(backend):
        moved, summed, squares = ops.trajectory(theta, gradient, total, start, target, lr)
        loss = losses.trajectory_distance(theta, start, target)
    expected = [t - 0.3 * g for t, g in zip(theta.tolist(), gradient.tolist(), strict=True)]
    assert moved.tolist() == pytest.approx(expected, rel=1e-15)
    assert torch.equal(summed, total + gradient)
    literal = [
        sum((a - b) ** 2 for a, b in zip(x.tolist(), target.tolist(), strict=True))
        for x in (moved, start, theta)
    ]
    assert squares.tolist() == pytest.approx(literal[:2], rel=1e-14)
    assert loss.item() == pytest.approx(literal[2] / literal[1], rel=1e-14)


def test_steps_telescope():
    """theta_T = theta_0 - lr * total, the identity that TESLA rests on."""
    _, _, total, start, target, lr = arguments(50)
    total, moved = torch.zeros_like(total), start
    for step in range(4):
        moved, total, _ = ops.trajectory(moved, draw(50, 10 + step), total, start, target, lr)
    torch.testing.assert_close(moved, start - lr * total, rtol=1e-14, atol=1e-14)


def test_no_progress_is_one_and_arrival_is_zero():
    start, target = draw(9), draw(9, 1)
    assert losses.trajectory_distance(start, start, target) == 1
    assert losses.trajectory_distance(target, start, target) == 0


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck_to_second_order(backend):
    step = [x.requires_grad_() for x in arguments(3)]
    with ddfast.use_backend(backend):
        for f, inputs in (
            (ops.trajectory, tuple(step)),
            (lambda *x: ops.trajectory(*x)[2] ** 2, tuple(step)),
            (losses.trajectory_distance, (step[0], step[3], step[4])),
        ):
            assert torch.autograd.gradcheck(f, inputs)
            assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("wanted", ["none", "student", "start", "target", "all"])
def test_any_subset_may_require_a_gradient(wanted):
    names = ("student", "start", "target")
    leaves = [
        draw(40, seed).requires_grad_(wanted in (name, "all")) for seed, name in enumerate(names)
    ]
    value = losses.trajectory_distance(*leaves)
    assert value.requires_grad == (wanted != "none")
    exact = [x.detach().clone().requires_grad_() for x in leaves]
    squares = reference.trajectory_distance(*exact)
    expected = torch.autograd.grad(squares[0] / squares[1], exact)
    if wanted != "none":
        with unchanged(*leaves):
            value.backward()
    for name, leaf, gradient in zip(names, leaves, expected, strict=True):
        if wanted in (name, "all"):
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-13, atol=0)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_through_a_step_of_the_student(compiled):
    """What trajectory matching needs: the gradient of the distance by what the step came from."""
    x, start, target = draw(6, 7).requires_grad_(), draw(6, 8).requires_grad_(), draw(6, 9)

    def outer(x: Tensor, theta: Tensor, distance) -> Tensor:
        inner = ((theta * x).tanh() ** 2).sum()
        (gradient,) = torch.autograd.grad(inner, theta, create_graph=True)
        return distance(theta - 0.1 * gradient, theta, target)

    def plain(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
        return (student - target).square().sum() / (start - target).square().sum()

    (expected,) = torch.autograd.grad(outer(x, start, plain), x)
    if compiled and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(outer, backend="aot_eager", fullgraph=True)
            (found,) = torch.autograd.grad(whole(x, start, losses.trajectory_distance), x)
    else:  # torch before 2.13 cannot trace autograd.grad
        (found,) = torch.autograd.grad(outer(x, start, losses.trajectory_distance), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_their_tensors_dtype(dtype):
    leaves = [draw(40, seed, dtype).requires_grad_() for seed in range(3)]
    value = losses.trajectory_distance(*leaves)
    assert value.dtype == torch.float32
    found = torch.autograd.grad(value, leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(losses.trajectory_distance(*wide), wide)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 2 * torch.finfo(dtype).eps


# --- the C++ kernel -----------------------------------------------------------------------------


def everything(*given: Tensor) -> list[Tensor]:
    return [*ops.trajectory(*given), ops.trajectory_distance(given[0], given[3], given[4])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_error_budget_at_every_level(dtype, size):
    given = arguments(size, dtype)
    with ddfast.use_backend("reference"):
        eager = everything(*given)
        exact = everything(*(x.double() for x in given))
    for level in levels():
        with at_level(level), unchanged(*given):
            assert_within_budget(everything(*given), eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_differences_of_weights_of_order_one(dtype):
    """An expert's epochs are 1e-3 apart: of values rounded once, the distance is exact to 1e-4."""
    start = draw(200_000)
    target = (start + 1e-2 * draw(200_000, 1)).to(dtype)
    student = (start + 5e-3 * draw(200_000, 2)).to(dtype)
    start = start.to(dtype)
    found = losses.trajectory_distance(student, start, target)
    exact = losses.trajectory_distance(student.double(), start.double(), target.double())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


def test_rounding_does_not_pile_up():
    """Sixteen million equal differences: one float32 sum would be off by per cents."""
    x = torch.full((1 << 24,), 0.1)
    squares = ops.trajectory_distance(x, 2 * x, torch.zeros_like(x))
    one = x[0].double().item() ** 2 * len(x)
    assert squares.tolist() == pytest.approx([one, 4 * one], rel=3e-7)


def test_same_bits_for_any_number_of_threads():
    given = arguments(300_001, torch.float32)
    assert_same_bits_for_any_threads(lambda: everything(*given))


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.trajectory
    monkeypatch.setattr(
        ddfast.backend.compiled, "trajectory", lambda *a: (calls.append(a), original(*a))[1]
    )
    everything(*arguments(5))
    assert len(calls) == 2
    with ddfast.use_backend("reference"):
        everything(*arguments(5))
    assert len(calls) == 2


# --- the operators ------------------------------------------------------------------------------


def test_opcheck_on_every_operator():
    given = [x.requires_grad_() for x in arguments(5)]
    torch.library.opcheck(ops.trajectory, tuple(given))
    torch.library.opcheck(ops.trajectory_distance, (given[0], given[3], given[4]))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    student, start, target = draw(70).requires_grad_(), draw(70, 1), draw(70, 2)

    def f(x: Tensor) -> Tensor:
        return losses.trajectory_distance(x * 2, start, target)

    expected = f(student)
    found = torch.compile(f, backend=compiler, fullgraph=True)(student)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student) for value in (found, expected)), rtol=1e-12, atol=0
    )


# --- inputs -------------------------------------------------------------------------------------


def test_sequences_are_their_flat_concatenation():
    shapes = [(3, 2, 2), (3,), (4, 12)]
    sets = [
        [draw(torch.Size(shape).numel(), 10 * k + n).view(shape) for n, shape in enumerate(shapes)]
        for k in range(3)
    ]
    flat = [torch.cat([x.flatten() for x in parameters]) for parameters in sets]
    assert_same_bits(losses.trajectory_distance(*sets), losses.trajectory_distance(*flat))


def test_layouts_are_read_alike():
    wide = [draw(80, seed).view(40, 2) for seed in range(3)]
    strided = [x[:, 0] for x in wide]
    found = losses.trajectory_distance(*strided)
    assert_same_bits(found, losses.trajectory_distance(*(x.contiguous() for x in strided)))
    expanded = torch.ones(1, dtype=torch.float64).expand(40)
    value = losses.trajectory_distance(expanded, strided[1], strided[2])
    assert_same_bits(value, losses.trajectory_distance(torch.ones_like(strided[1]), *strided[1:]))


def test_empty_parameters_have_no_distance():
    nothing = torch.empty(0)
    assert ops.trajectory_distance(nothing, nothing, nothing).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("student", "start", "target", "kind", "message"),
    [
        (3, draw(2), draw(2), TypeError, "student|object is not iterable"),
        ([], [], [], ValueError, "student: is empty"),
        (["a"], draw(2), draw(2), TypeError, "student: got str"),
        (draw(2).long(), draw(2), draw(2), TypeError, "student: got torch.int64"),
        (draw(2), draw(3), draw(2), ValueError, r"start: got shapes \[\(3,\)\]"),
        (draw(2), draw(2), [draw(1), draw(1)], ValueError, "target: got shapes"),
        (draw(2), draw(2).float(), draw(2), TypeError, "start: got torch.float32"),
        (draw(2), draw(2, 1), draw(2, 1), ValueError, "start: equal to target"),
        (draw(2), draw(2).to("meta"), draw(2), ValueError, "start: on meta"),
    ],
)
def test_errors_name_the_argument(student, start, target, kind, message):
    with pytest.raises(kind, match=message):
        losses.trajectory_distance(student, start, target)


def test_transforms_are_refused():
    x = draw(6).view(2, 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.vmap(losses.trajectory_distance)(x, x + 1, x + 2)
