"""Gates of `class_mean` and its distance: definition, derivatives, kernel, inputs, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import class_mean as ops
from ddfast.reference import class_mean as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    levels,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RAGGED = [2, 1, 3]
FORMS = list(itertools.product(["equal", "ragged"], repeat=2))


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def counts_of(form: str) -> list[int] | None:
    return RAGGED if form == "ragged" else None


def features(form: str, seed: int, width: int = 5, rows: int = 4, **options) -> Tensor:
    """Three classes, as (classes, rows, width) or as rows of classes of unequal size."""
    if form == "ragged":
        return draw(sum(RAGGED), width, seed=seed, **options)
    return draw(len(RAGGED), rows, width, seed=seed, **options)


# --- the definition -----------------------------------------------------------------------------


def literal_means(x: Tensor, counts: list[int] | None) -> list[list[float]]:
    """Class by class, column by column, in Python floats."""
    parts = list(x) if counts is None else list(x.split(counts))
    return [[sum(column) / len(column) for column in zip(*p.tolist(), strict=True)] for p in parts]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("forms", FORMS)
def test_the_formula(backend, forms):
    syn, real = features(forms[0], 0), features(forms[1], 1, rows=9)
    counts = [counts_of(form) for form in forms]
    a, b = (literal_means(x, n) for x, n in zip((syn, real), counts, strict=True))
    expected = [
        sum((s - r) ** 2 for s, r in zip(*rows, strict=True)) for rows in zip(a, b, strict=True)
    ]
    with ddfast.use_backend(backend):
        means = losses.class_mean(syn, counts[0])
        distance = losses.class_mean_distance(syn, real, *counts)
    assert means.flatten().tolist() == pytest.approx([m for row in a for m in row], rel=1e-14)
    assert distance.tolist() == pytest.approx(expected, rel=1e-14)


def test_equal_counts_are_the_three_dimensional_form():
    x = draw(4, 70, 33, dtype=torch.float32)
    assert_same_bits(losses.class_mean(x), losses.class_mean(x.view(280, 33), [70] * 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_without_rounding_are_exact(dtype):
    """Small integers and power-of-two counts: every order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (2048 + 64 + 1, 1100), generator=generator).to(dtype)
    counts = [2048, 64, 1]
    with ddfast.use_backend("reference"):
        expected = losses.class_mean(x, counts)
    assert_same_bits(losses.class_mean(x, counts), expected)


def test_infinity_and_nan_stay_in_their_column():
    x = draw(2, 200, 40, dtype=torch.float32)
    x[0, 3, 5], x[0, 150, 6], x[0, 1, 7], x[0, 199, 7] = (
        float("inf"),
        float("nan"),
        *[
            float("inf"),
            float("-inf"),
        ],
    )
    means = losses.class_mean(x)
    assert means[0, 5] == float("inf") and means[0, 6].isnan() and means[0, 7].isnan()
    assert means[0, :5].isfinite().all() and means[0, 8:].isfinite().all()
    distance = losses.class_mean_distance(x, torch.zeros(2, 1, 40))
    assert distance[0].isnan() and distance[1].isfinite()


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("forms", [("equal", "ragged"), ("ragged", "equal")])
@pytest.mark.parametrize("wanted", ["syn", "real", "both"])
def test_gradcheck_to_third_order(backend, forms, wanted):
    syn, real = features(forms[0], 2, 2, rows=2), features(forms[1], 3, 2, rows=2)
    syn.requires_grad_(wanted != "real")
    real.requires_grad_(wanted != "syn")
    leaves = [x for x in (syn, real) if x.requires_grad]
    weights = draw(3, seed=4).requires_grad_()

    def distance(s, r):
        return losses.class_mean_distance(s, r, *(counts_of(form) for form in forms))

    def first(s, r, w):
        return torch.autograd.grad(distance(s, r), leaves, w, create_graph=True)

    with ddfast.use_backend(backend):
        assert torch.autograd.gradcheck(distance, (syn, real))
        assert torch.autograd.gradgradcheck(distance, (syn, real))
        # First derivatives are functions of their own: their second ones are the third here.
        assert torch.autograd.gradgradcheck(first, (syn, real, weights), fast_mode=True)


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("form", ["equal", "ragged"])
def test_gradcheck_of_the_means_and_of_the_difference(form):
    x, counts = features(form, 5, 2).requires_grad_(), counts_of(form)
    y = features("equal", 6, 2, rows=2).requires_grad_()
    rows = counts or []

    def both_outputs(a, b):
        return ops.class_mean_distance(a, b, rows, [])

    for f, inputs in (
        (lambda a: losses.class_mean(a, counts), (x,)),
        (lambda a: losses.class_mean(a**3, counts), (x,)),
        (both_outputs, (x, y)),
        (lambda a, b: both_outputs(a, b)[1] ** 2, (x, y)),
        (lambda g: ops.class_mean_bwd(g**2, RAGGED, torch.float64), (y[:, 0],)),
    ):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_derivative_is_the_closed_form(dtype):
    syn, real = features("equal", 7, dtype=dtype), features("ragged", 8, dtype=torch.float64)
    syn.requires_grad_()
    real.requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    value = losses.class_mean_distance(syn, real, None, RAGGED)
    by_syn, by_real = torch.autograd.grad(value, (syn, real), weights)
    difference = syn.detach().double().mean(1) - reference.class_mean(real.detach(), RAGGED)
    each = 2 * weights[:, None] * difference
    torch.testing.assert_close(by_syn, (each / 4)[:, None].expand(3, 4, 5).to(dtype))
    rows = torch.cat([(-each[c] / n).expand(n, 5) for c, n in enumerate(RAGGED)])
    torch.testing.assert_close(by_real, rows)
    assert by_syn.dtype == dtype and by_real.dtype == torch.float64
    assert by_syn.stride(1) == 0, "the gradient of every row of a class is the same memory"


@pytest.mark.parametrize("wanted", ["none", "syn", "real", "both"])
def test_any_subset_may_require_a_gradient(wanted):
    syn, real = features("ragged", 0), features("ragged", 1)
    syn.requires_grad_(wanted in ("syn", "both"))
    real.requires_grad_(wanted in ("real", "both"))
    value = losses.class_mean_distance(syn, real, RAGGED, RAGGED)
    assert value.requires_grad == (wanted != "none")
    if wanted != "none":
        with unchanged(syn, real):
            value.sum().backward()
    for x, other, name in ((syn, real, "syn"), (real, syn, "real")):
        if wanted not in (name, "both"):
            assert x.grad is None
            continue
        means = reference.class_mean(x.detach() - other.detach(), RAGGED)
        expected = torch.cat([(2 * means[c] / n).expand(n, 5) for c, n in enumerate(RAGGED)])
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("form", ["equal", "ragged"])
def test_second_derivative_of_mixed_dtypes(form):
    """Half the chain in float32, half in float64: every gradient has its own tensor's dtype."""
    counts, results = counts_of(form), []
    for dtype in (torch.float32, torch.float64):
        syn = features(form, 2, dtype=torch.float32).to(dtype).requires_grad_()
        real = features("ragged", 3).requires_grad_()
        value = losses.class_mean_distance(syn**2, real**2, counts, RAGGED)
        first = torch.autograd.grad(value.sum(), (syn, real), create_graph=True)
        second = torch.autograd.grad(sum((g**3).sum() for g in first), (syn, real))
        assert [g.dtype for g in (*first, *second)] == [dtype, torch.float64] * 2
        results.append([g.double() for g in (*first, *second)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def bilevel(f, syn, real, net):
    """How the images' gradient grows when the network changes: a function of a gradient."""
    value = f(torch.tanh(syn @ net), torch.tanh(real @ net))
    (gradient,) = torch.autograd.grad(value, syn, create_graph=True)
    return (gradient**2).sum()


@pytest.mark.parametrize("form", ["equal", "ragged"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_gradient(form, compiled):
    syn, real = features(form, 9).requires_grad_(), features("ragged", 10)
    net = draw(5, 6, seed=11).requires_grad_()
    counts = counts_of(form)

    def exact(s, r):
        return reference.class_mean_distance(s, r, counts or (), RAGGED)[0].sum()

    def ours(s, r):
        return losses.class_mean_distance(s, r, counts, RAGGED).sum()

    def outer(s, r, n):
        return bilevel(ours, s, r, n)

    expected = torch.autograd.grad(bilevel(exact, syn, real, net), (syn, net))
    if compiled and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(outer, backend="aot_eager", fullgraph=True)
            found = torch.autograd.grad(whole(syn, real, net), (syn, net))
    else:  # torch before 2.13 cannot trace autograd.grad
        found = torch.autograd.grad(outer(syn, real, net), (syn, net))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- the C++ kernel -----------------------------------------------------------------------------

COUNTS = [1, 2, 7, 8, 9, 63, 64, 65, 129, 200]
WIDTHS = [1, 16, 33, 1023, 1025]


def everything(syn, real, syn_counts, real_counts):
    """Means, distance and difference through the operators, as one flat list."""
    means = ops.class_mean(syn, syn_counts)
    return [means, *ops.class_mean_distance(syn, real, syn_counts, real_counts)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_error_budget_at_every_level(dtype, mean):
    """Row counts around groups, blocks and pairs of blocks; widths around vectors and tiles."""
    all_syn = draw(sum(COUNTS), max(WIDTHS), seed=1, dtype=dtype, mean=mean)
    all_real = draw(sum(COUNTS), max(WIDTHS), seed=2, dtype=dtype, mean=-mean)
    counts = COUNTS, COUNTS[::-1]
    for width in WIDTHS:
        syn, real = all_syn[:, -width:], all_real[:, :width].contiguous()
        with ddfast.use_backend("reference"):
            eager = everything(syn, real, *counts)
            exact = everything(syn.double(), real.double(), *counts)
        for level in levels():
            with at_level(level):
                assert_within_budget(everything(syn, real, *counts), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget_with_many_rows(dtype):
    """Sums of one sign over 10 000 rows."""
    x = draw(1, 10_000, 40, seed=3, dtype=dtype, mean=3.0)
    with ddfast.use_backend("reference"):
        eager, exact = losses.class_mean(x), losses.class_mean(x.double())
    for level in levels():
        with at_level(level):
            assert_within_budget(losses.class_mean(x), eager, exact, factor=1.0)


@pytest.mark.parametrize("level", levels())
def test_rounding_does_not_pile_up(level):
    """A million equal rows: a running sum of their blocks would be off by a thousand units."""
    row = torch.tensor([[[0.1, 0.7, -1.3]]])
    with at_level(level):
        means = losses.class_mean(row.expand(1, 1_000_000, 3))
    torch.testing.assert_close(means, row[0], rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(types):
    syn, real = features("equal", 0, 40, dtype=types[0]), features("ragged", 1, 40, dtype=types[1])
    both = torch.promote_types(*types)
    wide = torch.float64 if both == torch.float64 else torch.float32
    with unchanged(syn, real):
        ours = ops.class_mean_distance(syn, real, [], RAGGED)
    assert all(result.dtype == wide for result in ours)
    exact = reference.class_mean_distance(syn.double(), real.double(), (), RAGGED)
    eager = reference.class_mean_distance(syn.to(wide), real.to(wide), (), RAGGED)
    assert_within_budget(ours, eager, exact)


def test_same_bits_for_any_number_of_threads():
    syn = draw(700, 2500, seed=1, dtype=torch.float32)
    real = draw(2, 300, 2500, seed=2, dtype=torch.float32)
    assert_same_bits_for_any_threads(lambda: everything(syn, real, [1, 699], []))


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.class_mean
    monkeypatch.setattr(
        ddfast.backend.compiled, "class_mean", lambda *a: (calls.append(a), original(*a))
    )
    syn, real = features("equal", 0), features("equal", 1)
    losses.class_mean(syn)
    losses.class_mean_distance(syn, real)
    assert len(calls) == 2
    with ddfast.use_backend("reference"):
        losses.class_mean(syn)
        losses.class_mean_distance(syn, real)
    assert len(calls) == 2


# --- the operators ------------------------------------------------------------------------------


def test_opcheck_on_every_operator():
    x, y = features("ragged", 0).requires_grad_(), features("equal", 1).requires_grad_()
    grad = draw(3, 5).requires_grad_()
    torch.library.opcheck(ops.class_mean, (x, RAGGED))
    torch.library.opcheck(ops.class_mean, (y, []))
    torch.library.opcheck(ops.class_mean_bwd, (grad, RAGGED, torch.float32))
    torch.library.opcheck(ops.class_mean_distance, (x, y, RAGGED, []))
    torch.library.opcheck(ops.class_mean_distance, (y, x, [], RAGGED))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    syn, real = features("equal", 0).requires_grad_(), features("ragged", 1)

    def f(s, r):
        return losses.class_mean_distance(s * 2, r, None, RAGGED).sum()

    expected = f(syn, real)
    found = torch.compile(f, backend=compiler, fullgraph=True)(syn, real)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, syn), torch.autograd.grad(expected, syn), rtol=1e-12, atol=1e-14
    )


def test_one_graph_serves_any_number_of_rows():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, r: losses.class_mean_distance(s, r), backend=counter, fullgraph=True, dynamic=True
    )
    for rows in (4, 7, 256):
        syn, real = draw(3, rows, 5).requires_grad_(), draw(3, 2 * rows, 5, seed=1)
        expected = losses.class_mean_distance(syn, real)
        found = compiled(syn, real)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), syn), torch.autograd.grad(expected.sum(), syn)
        )
    assert counter.frame_count == 1
