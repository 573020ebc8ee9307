"""Gates of `krr` and its losses: definition, derivatives, precision, fall-backs, operators."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import krr as ops
from ddfast.reference import krr as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    check_derivatives,
    error,
    unchanged,
)

SIZES = [(1, 1, 1), (1, 5, 3), (5, 1, 1), (5, 7, 1), (9, 4, 3), (33, 50, 10)]
FLOAT_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def problem(n: int, m: int, columns: int, dtype=torch.float64) -> list[Tensor]:
    """k_ss, k_ts, y_s, y_t of a smooth kernel of random rows."""
    rows = draw(n + m, 4)
    kernel = torch.exp(-torch.cdist(rows, rows).square() / 8) + 0.01
    given = [kernel[:n, :n], kernel[n:, :n], draw(n, columns, seed=1), draw(m, columns, seed=2)]
    return [x.to(dtype).contiguous() for x in given]


def literal(k_ss, k_ts, y_s, y_t, reg=1e-6, loss="mse", scale=0.0, reduction="mean") -> Tensor:
    """The formulas one by one, every step by autograd."""
    n = len(k_ss)
    mean = sum(k_ss[i, i] for i in range(n)) / n
    inverse = torch.linalg.inv((k_ss + k_ss.mT) / 2 + reg * mean * torch.eye(n, dtype=k_ss.dtype))
    prediction = k_ts @ inverse @ y_s
    if loss == "cross_entropy":
        scores = math.exp(scale) * prediction if isinstance(scale, float) else 0
        scores = prediction * scale.exp() if isinstance(scale, Tensor) else scores
        best = y_t.argmax(1)
        chosen = torch.stack([scores[i, best[i]] for i in range(len(best))])
        return (torch.logsumexp(scores, 1) - chosen).mean()
    total = ((prediction - y_t) ** 2).sum() / 2
    return total / (len(y_t) if reduction == "class_sum" else y_t.numel())


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"reg": 1e-3},
        {"reg": 0.0},
        {"reg": 1e-3, "reduction": "class_sum"},
        {"reg": 5e-3, "loss": "cross_entropy"},
        {"reg": 5e-3, "loss": "cross_entropy", "scale": 1.5},
    ],
)
def test_value_and_gradients_of_the_formula(backend, sizes, options):
    if options["reg"] == 0 and sizes[0] > 9:
        pytest.skip("without a ridge this kernel of 33 rows has no digits left")
    leaves = [x.requires_grad_() for x in problem(*sizes)]
    plain = [x.detach().clone().requires_grad_() for x in leaves]
    with ddfast.use_backend(backend), unchanged(*leaves):
        value = losses.krr_loss(*leaves, **options)
        wanted = leaves[: 4 if options.get("loss") != "cross_entropy" else 3]
        found = torch.autograd.grad(value, wanted)
    expected = literal(*plain, **options)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)
    exact = torch.autograd.grad(expected, plain[: len(wanted)])
    for ours, theirs in zip(found, exact, strict=True):
        scale = max(1e-3, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * scale)


def test_one_support_row_by_hand():
    k_ss, k_ts = torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]])
    y_s, y_t = torch.tensor([[4.0]]), torch.tensor([[1.0], [0.0]])
    assert losses.krr_predict(k_ss, k_ts, y_s, reg=1.0).tolist() == [[1.0], [3.0]]
    assert losses.krr_loss(k_ss, k_ts, y_s, y_t, reg=1.0).item() == 9 / 4


def test_no_ridge_interpolates():
    k_ss, _, y_s, _ = problem(5, 1, 3)
    prediction = losses.krr_predict(k_ss, k_ss, y_s, reg=0.0)
    torch.testing.assert_close(prediction, y_s, rtol=1e-8, atol=1e-8)


def test_the_ridge_is_in_units_of_the_kernel():
    k_ss, k_ts, y_s, y_t = problem(5, 7, 2)
    value = losses.krr_loss(k_ss, k_ts, y_s, y_t, reg=0.1)
    torch.testing.assert_close(losses.krr_loss(100 * k_ss, 100 * k_ts, y_s, y_t, reg=0.1), value)


def test_only_the_symmetric_part_counts():
    k_ss, k_ts, y_s, y_t = problem(5, 7, 2)
    skew = draw(5, 5, seed=3)
    leaf = (k_ss + skew - skew.mT).requires_grad_()
    value = losses.krr_loss(leaf, k_ts, y_s, y_t, reg=0.1)
    torch.testing.assert_close(value, losses.krr_loss(k_ss, k_ts, y_s, y_t, reg=0.1))
    (gradient,) = torch.autograd.grad(value, leaf)
    assert torch.equal(gradient, gradient.mT)


def test_a_scale_that_is_learned():
    """As a tensor it is the same as a number, and has the gradient of the formula."""
    k_ss, k_ts, y_s, y_t = problem(5, 7, 3)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    options = {"reg": 0.1, "loss": "cross_entropy"}
    value = losses.krr_loss(k_ss, k_ts, y_s, y_t, scale=scale, **options)
    assert_same_bits(value, losses.krr_loss(k_ss, k_ts, y_s, y_t, scale=0.7, **options))
    other = scale.detach().clone().requires_grad_()
    expected = literal(k_ss, k_ts, y_s, y_t, scale=other, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(v, s)[0] for v, s in ((value, scale), (expected, other))),
        rtol=1e-11,
        atol=0,
    )


def test_labels_as_integers_and_as_argmax():
    k_ss, k_ts, y_s, y_t = problem(5, 7, 3)
    best = y_t.argmax(1)
    for labels in (best, best.int()):
        assert_same_bits(
            losses.krr_loss(k_ss, k_ts, y_s, labels, loss="cross_entropy"),
            losses.krr_loss(k_ss, k_ts, y_s, y_t, loss="cross_entropy"),
        )


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("sizes", [(1, 3, 2), (4, 3, 1), (3, 5, 2)])
def test_gradcheck(sizes):
    given = [x.requires_grad_() for x in problem(*sizes)]
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    check_derivatives(lambda *x: losses.krr_loss(*x, reg=0.1), given, order=1)
    check_derivatives(lambda *x: losses.krr_predict(*x, reg=0.1), given[:3], order=1)

    def platt(*x: Tensor) -> Tensor:
        return losses.krr_loss(*x[:3], given[3], reg=0.1, loss="cross_entropy", scale=x[3])

    check_derivatives(platt, [*given[:3], scale], order=1)


@pytest.mark.uses_global_random_state  # gradgradcheck does
def test_the_reference_has_second_derivatives():
    given = [x.requires_grad_() for x in problem(3, 4, 2)]
    check_derivatives(lambda *x: reference.predict(*x, 0.1), given[:3], order=2)
    check_derivatives(
        lambda *x: reference.label_solve(x[0], x[1], x[2], 0.1), [*given[:2], given[3]], order=1
    )


def test_a_second_derivative_raises():
    given = problem(4, 6, 3)
    for wanted in range(3):
        leaf = given[wanted].clone().requires_grad_()
        arguments = [*given[:wanted], leaf, *given[wanted + 1 :]]
        value = losses.krr_loss(*arguments, reg=0.1)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="krr_bwd: kernel ridge regression has first"):
            torch.autograd.grad(gradient.square().sum(), leaf)


@pytest.mark.uses_global_random_state  # gradcheck does
def test_the_coefficients_have_a_derivative_too():
    given = [x.requires_grad_() for x in problem(4, 3, 2)[:3]]
    for chosen in (slice(0, 2), slice(1, 2)):
        check_derivatives(lambda *x: ops.krr(*x, 0.1, torch.float64)[chosen], given, order=1)  # noqa: B023


@pytest.mark.parametrize("wanted", ["none", "k_ss", "k_ts", "y_s", "y_t", "all"])
def test_any_subset_may_require_a_gradient(wanted):
    names = ("k_ss", "k_ts", "y_s", "y_t")
    given = problem(5, 7, 3)
    exact = [x.clone().requires_grad_() for x in given]
    expected = torch.autograd.grad(losses.krr_loss(*exact, reg=0.1), exact)
    leaves = [
        x.requires_grad_(wanted in (name, "all")) for name, x in zip(names, given, strict=True)
    ]
    value = losses.krr_loss(*leaves, reg=0.1)
    assert value.requires_grad == (wanted != "none")
    if wanted != "none":
        value.backward()
    for name, leaf, gradient in zip(names, leaves, expected, strict=True):
        if wanted in (name, "all"):
            assert_same_bits(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def test_one_factorisation_serves_value_and_gradient(monkeypatch):
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: (calls.append(a), original(a))[1])
    losses.krr_loss(*[x.requires_grad_() for x in problem(5, 7, 3)]).backward()
    assert len(calls) == 1


# --- dtypes and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("solve", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_error_budget(dtype, solve, loss):
    """Against plain autograd of the same inputs in the dtype of the solve."""
    given = problem(40, 60, 5, dtype)

    def prediction_and_gradients(f, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given[:3]]
        prediction, value = f(*leaves)
        return [prediction, *torch.autograd.grad(value, leaves)]

    def ours(*x):
        value = losses.krr_loss(*x, given[3], reg=5e-3, loss=loss, solve_dtype=solve)
        return losses.krr_predict(*x, reg=5e-3, solve_dtype=solve), value

    def eager(*x):
        prediction = reference.predict(*x, 5e-3)
        if loss == "cross_entropy":
            return prediction, torch.nn.functional.cross_entropy(prediction, given[3].argmax(1))
        return prediction, (prediction - given[3].to(prediction.dtype)).square().mean() / 2

    found = prediction_and_gradients(ours, dtype)
    exact = prediction_and_gradients(eager, torch.float64)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {x.dtype for x in found[1:]} == {dtype}
    plain = [
        x.to(y.dtype) for x, y in zip(prediction_and_gradients(eager, solve), found, strict=True)
    ]
    # Eager in float64 is the yardstick itself, and so has no error to compare with: there, the
    # condition of the matrix, below 1 / 5e-3 rows, says how far two float64 results may lie apart.
    yardstick = dtype == solve == torch.float64
    assert_within_budget(found, plain, exact, tiny=8000 if yardstick else 4)


def test_a_float64_solve_saves_digits():
    given = problem(60, 40, 3)
    exact = losses.krr_loss(*given)
    half = [x.float() for x in given]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        in_float32 = losses.krr_loss(*half, solve_dtype=torch.float32)
        mixed = losses.krr_loss(given[0], given[1], *half[2:])
    assert mixed.dtype == torch.float64 and in_float32.dtype == torch.float32
    assert error(mixed, exact) < 1e-5 * error(in_float32, exact) + 1e-6 * exact


def test_same_bits_for_any_number_of_threads_and_layout():
    given = problem(33, 50, 3)
    assert_same_bits_for_any_threads(lambda: losses.krr_loss(*given, reg=0.1), threads=(1, 1))
    strided = [torch.stack([x, x], 2)[..., 0] for x in given]
    strided[0] = strided[0].mT
    found, expected = (losses.krr_loss(*x, reg=0.1) for x in (strided, given))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    expanded = torch.zeros(1, 3, dtype=torch.float64).expand(50, 3)
    losses.krr_loss(*given[:3], expanded)


# --- where Cholesky fails -------------------------------------------------------------------------


def test_an_indefinite_matrix_is_solved_by_lu():
    k_ss, k_ts, y_s, y_t = problem(5, 7, 2)
    k_ss = k_ss - 0.5 * torch.eye(5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (k_ss, k_ts, y_s)]
    with pytest.warns(RuntimeWarning, match=r"leading \d x \d part.*LU answers.*Near-duplicate"):
        value = losses.krr_loss(*leaves, y_t, reg=1e-3)
    found = torch.autograd.grad(value, leaves)
    plain = [x.detach().clone().requires_grad_() for x in leaves]
    expected = literal(*plain, y_t, reg=1e-3)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for ours, exact in zip(found, torch.autograd.grad(expected, plain), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_duplicated_support_without_a_ridge_is_the_pseudo_inverse(dtype):
    rows = draw(6, 9)
    rows[3:] = rows[:3]
    k_ss, k_ts = rows @ rows.mT, draw(7, 9, seed=1) @ rows.mT
    y_s, y_t = draw(6, 2, seed=2), draw(7, 2, seed=3)
    given = [x.to(dtype).requires_grad_() for x in (k_ss, k_ts, y_s)]
    with pytest.warns(RuntimeWarning, match="singular too, so the pseudo-inverse"):
        value = losses.krr_loss(*given, y_t.to(dtype), reg=0.0, solve_dtype=dtype)
    expected = (k_ts @ torch.linalg.pinv(k_ss) @ y_s - y_t).square().mean() / 2
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)
    for gradient in torch.autograd.grad(value, given):
        assert gradient.isfinite().all() and gradient.abs().max() < 100


def test_duplicated_support_with_a_ridge_needs_no_help():
    rows = draw(6, 9)
    rows[3:] = rows[:3]
    given = [rows @ rows.mT, draw(7, 9, seed=1) @ rows.mT, draw(6, 2, seed=2), draw(7, 2, seed=3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = losses.krr_loss(*given, reg=1e-6)
    torch.testing.assert_close(value, literal(*given, reg=1e-6), rtol=1e-6, atol=0)


def test_a_ridge_towards_zero_is_continuous():
    given = problem(6, 5, 2)
    limit = losses.krr_loss(*given, reg=0.0)
    steps = [abs(losses.krr_loss(*given, reg=reg) - limit) for reg in (1e-6, 1e-8, 1e-10)]
    assert steps[0] > steps[1] > steps[2]


def test_what_is_not_finite_is_not_a_number():
    k_ss, k_ts, y_s, y_t = problem(5, 7, 2)
    for bad in (torch.nan, torch.inf):
        broken = k_ss.clone()
        broken[2, 2] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert losses.krr_loss(broken.requires_grad_(), k_ts, y_s, y_t).isnan()


def test_a_kernel_of_zeros_predicts_zero():
    zero = torch.zeros(3, 3)
    with pytest.warns(RuntimeWarning, match="singular"):
        assert losses.krr_predict(zero, zero, torch.ones(3, 2)).eq(0).all()


# --- the operators ------------------------------------------------------------------------------


def test_opcheck_on_every_operator():
    k_ss, k_ts, y_s, y_t = (x.requires_grad_() for x in problem(5, 7, 2))
    torch.library.opcheck(ops.krr, (k_ss, k_ts, y_s, 0.1, torch.float64))
    torch.library.opcheck(ops.krr, (k_ss, k_ts.float(), y_s, 0.1, torch.float32))
    with torch.no_grad():
        results = ops.krr(k_ss, k_ts, y_s, 0.1, torch.float64)
        torch.library.opcheck(ops.krr_bwd, (None, y_s, k_ts, *results[1:], 0.1, [True] * 3))
        for needed in ([True] * 3, [True, False, False], [False, True, False]):
            torch.library.opcheck(ops.krr_bwd, (y_t, None, k_ts, *results[1:], 0.1, needed))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_torch_compile_without_graph_break(compiler, loss):
    torch._dynamo.reset()
    k_ss, k_ts, y_s, y_t = problem(5, 7, 2)
    leaf = k_ss.requires_grad_()

    def f(x: Tensor) -> Tensor:
        return losses.krr_loss(x * 2, k_ts, y_s, y_t, reg=0.1, loss=loss)

    expected = f(leaf)
    found = torch.compile(f, backend=compiler, fullgraph=True)(leaf)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, leaf)[0] for value in (found, expected)),
        rtol=1e-11,
        atol=1e-15,
    )
