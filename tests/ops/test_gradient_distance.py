"""Gates of `gradient_distance`: definition, derivatives, C++ kernels, dispatch, inputs, errors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import gradient_distance as ops
from ddfast.reference import gradient_distance as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
)

METRICS = reference.METRICS
SHAPES = [(3, 4, 5), (3,), (4, 7), (2, 3, 3, 3)]
CONVNET = [(16, 3, 3, 3), (16,), (16, 16, 3, 3), (16,), (10, 257), (10,)]


def draw(shapes, seed=0, dtype=torch.float64, classes=None, scale=1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if classes is None else (classes,)
    return [
        (torch.randn((*lead, *s), generator=generator, dtype=torch.float64) * scale).to(dtype)
        for s in shapes
    ]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


# --- the definition ---------------------------------------------------------------------------


def literal_row_cosine(syn, real, eps=1e-6):
    """The formula of the DC paper, row by row in Python floats."""
    total = 0.0
    for s, r in zip(syn, real, strict=True):
        if s.dim() < 2:
            continue
        for b, a in zip(
            s.reshape(len(s), -1).tolist(), r.reshape(len(r), -1).tolist(), strict=True
        ):
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            norms = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
            total += 1 - dot / (norms + eps)
    return total


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_row_cosine_is_the_papers_formula(backend):
    syn, real = draw(SHAPES), draw(SHAPES, 1)
    with ddfast.use_backend(backend):
        ours = losses.gradient_distance(syn, real)
    assert ours.item() == pytest.approx(literal_row_cosine(syn, real), rel=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_other_metrics_are_their_formulas(backend):
    syn, real = draw(SHAPES), draw(SHAPES, 1)
    a, b = torch.cat([t.flatten() for t in real]), torch.cat([t.flatten() for t in syn])
    expected = {
        "cosine": 1 - a @ b / (a.norm() * b.norm() + 1e-6),
        "mse": ((a - b) ** 2).sum(),
        "l1": (a - b).abs().sum(),
    }
    with ddfast.use_backend(backend):
        for metric, value in expected.items():
            ours = losses.gradient_distance(syn, real, metric)
            torch.testing.assert_close(ours, value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_batched_is_the_loop_over_classes(metric):
    syn, real = draw(CONVNET, classes=5), draw(CONVNET, 1, classes=5)
    batched = losses.gradient_distance(syn, real, metric, batched=True)
    one_by_one = [
        losses.gradient_distance([t[c] for t in syn], [t[c] for t in real], metric)
        for c in range(5)
    ]
    torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)


def test_one_dimensional_tensors_contribute_nothing_to_row_cosine_only():
    syn, real = draw([(4,)]), draw([(4,)], 1)
    assert losses.gradient_distance(syn, real).item() == 0
    assert losses.gradient_distance(syn, real, "mse").item() > 0
    leaf = leaves(syn)
    (gradient,) = torch.autograd.grad(losses.gradient_distance(leaf, real), leaf)
    assert torch.equal(gradient, torch.zeros(4, dtype=torch.float64))


# --- zero rows, epsilon, extreme norms --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows(dtype):
    row = torch.tensor([[3.0, -4.0]], dtype=dtype)
    zero = torch.zeros_like(row)
    for real, syn, gradient in [
        (zero, row, torch.zeros(1, 2)),
        (zero, zero, torch.zeros(1, 2)),
        # b = 0: the gradient is -a / eps, a spike that the definition has.
        (row, zero, -row.double() / 1e-6),
    ]:
        leaf = syn.clone().requires_grad_()
        value = losses.gradient_distance([leaf], [real])
        (found,) = torch.autograd.grad(value, leaf)
        assert value.item() == 1
        if dtype == torch.float16 and gradient.abs().max() > 65504:
            assert torch.equal(found.sign(), gradient.sign().half()) and found.isinf().all()
        else:
            torch.testing.assert_close(found.double(), gradient.double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm", [1e-2, 1e-3, 1e-4, 1e-5])
def test_epsilon_is_inside_the_denominator(norm):
    rows = draw([(6, 27)])[0]
    rows = rows / rows.norm(dim=1, keepdim=True) * norm
    value = losses.gradient_distance([rows], [rows]) / 6
    assert value.item() == pytest.approx(1e-6 / (norm**2 + 1e-6), rel=1e-9)


def test_rescaling_a_row_changes_nothing_without_epsilon():
    syn, real = draw([(6, 9)]), draw([(6, 9)], 1)
    scaled = [syn[0] * torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]]
    a = losses.gradient_distance(syn, real, eps=0.0)
    torch.testing.assert_close(losses.gradient_distance(scaled, real, eps=0.0), a)


def test_nan_is_not_swallowed():
    for metric in METRICS:
        syn, real = draw([(3, 40)], dtype=torch.float32), draw([(3, 40)], 1, dtype=torch.float32)
        syn[0][1, 7] = float("nan")
        assert losses.gradient_distance(syn, real, metric).isnan(), metric
        _, gradient = losses.gradient_distance_and_gradient(syn, real, metric)
        assert gradient[0][1, 7].isnan(), metric


# --- derivatives ------------------------------------------------------------------------------

SMALL = [(2, 2), (2,), (1, 2, 2)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("wanted", ["syn", "real", "both"])
@pytest.mark.parametrize("classes", [None, 2])
def test_gradcheck_to_second_order(backend, metric, wanted, classes):
    syn, real = draw(SMALL, 3, classes=classes), draw(SMALL, 4, classes=classes)
    for tensors, names in ((syn, ("syn", "both")), (real, ("real", "both"))):
        for t in tensors:
            t.requires_grad_(wanted in names)

    def f(*tensors):
        n = len(tensors) // 2
        return losses.gradient_distance(
            tensors[:n], tensors[n:], metric, batched=classes is not None
        )

    with ddfast.use_backend(backend):
        check_derivatives(f, (*syn, *real))


@pytest.mark.parametrize("metric", METRICS)
def test_definition_has_every_order(metric):
    def f(*tensors):
        return reference.gradient_distance(tensors[:2], tensors[2:], metric)

    tensors = leaves(draw([(2, 3), (2, 2)], 5)) + leaves(draw([(2, 3), (2, 2)], 6))
    check_derivatives(f, tensors)


@pytest.mark.parametrize("metric", METRICS)
def test_closed_forms_are_the_derivatives_of_the_definition(metric):
    """The reference's bwd and bwd_bwd against autograd of its forward."""
    syn, real = leaves(draw(SMALL, 7, classes=2)), leaves(draw(SMALL, 8, classes=2))
    u, w = draw(SMALL, 9, classes=2), draw(SMALL, 10, classes=2)
    grad = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)

    def gradient(outputs, inputs, cotangents=None, **options):
        return torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True, **options)

    value = reference.gradient_distance(syn, real, metric, batched=True)
    first = gradient(value, syn + real, grad, create_graph=True)
    by_syn, by_real = reference.gradient_distance_bwd(grad, syn, real, metric, 1e-6, True)
    torch.testing.assert_close([*by_syn, *by_real], list(first))

    phi = sum((x * y).sum() for x, y in zip(first, u + w, strict=True))
    second = gradient(phi, [grad, *syn, *real])
    ours = reference.gradient_distance_bwd_bwd(u, w, grad, syn, real, metric, 1e-6, True)
    torch.testing.assert_close([ours[0], *ours[1], *ours[2]], list(second))


def bilevel(f, syn, real):
    """A function of a gradient, as in the double backward of a learned matching loss."""
    value = f(syn, real)
    gradient = torch.autograd.grad(value, syn, create_graph=True)
    return sum((g**2).sum() for g in gradient)


@pytest.mark.parametrize("metric", ["row_cosine", "cosine", "mse"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_gradient(metric, compiled):
    syn, real = leaves(draw([(3, 5), (2, 4)])), draw([(3, 5), (2, 4)], 1)

    def ours(s, r):
        return losses.gradient_distance(s, r, metric)

    def exact(s, r):
        return reference.gradient_distance(s, r, metric)[0]

    def outer(s, r):
        return bilevel(ours, s, r)

    options = contextlib.nullcontext()
    if compiled:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            pytest.skip("torch before 2.13 cannot trace autograd.grad")
        torch._dynamo.reset()
        options = torch._dynamo.config.patch(trace_autograd_ops=True)
        outer = torch.compile(outer, backend="aot_eager", fullgraph=True)
    with options:
        found = torch.autograd.grad(outer(syn, real), syn)
    expected = torch.autograd.grad(bilevel(exact, syn, real), syn)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_third_derivative_is_refused():
    syn, real = leaves(draw([(3, 5)])), draw([(3, 5)], 1)
    second = torch.autograd.grad(
        bilevel(losses.gradient_distance, syn, real), syn, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"third derivative.*ddfast\.reference"):
        torch.autograd.grad(second[0].sum(), syn)


def test_backward_twice_and_accumulation():
    """The gradient computed with the loss is handed over once; later passes recompute it."""
    syn, real = leaves(draw(SHAPES)), draw(SHAPES, 1)
    value = losses.gradient_distance(syn, real, "mse")
    expected = [2 * (s.detach() - r) for s, r in zip(syn, real, strict=True)]
    for count in (1, 2, 3):
        value.backward(retain_graph=True)
        for s, e in zip(syn, expected, strict=True):
            torch.testing.assert_close(s.grad, count * e, rtol=1e-14, atol=0)
    (value * 3).backward()
    torch.testing.assert_close(syn[0].grad, 6 * expected[0], rtol=1e-14, atol=0)


def test_incoming_gradient_scales_each_class():
    syn, real = leaves(draw(SHAPES, classes=3)), draw(SHAPES, 1, classes=3)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for metric in METRICS:
        value = losses.gradient_distance(syn, real, metric, batched=True)
        found = torch.autograd.grad(value @ weights, syn)
        by_syn, _ = reference.gradient_distance_bwd(weights, syn, real, metric, 1e-6, True)
        torch.testing.assert_close(list(found), by_syn, rtol=1e-12, atol=1e-14)


def test_value_and_gradient_in_one_call():
    syn, real = draw(SHAPES), draw(SHAPES, 1)
    value, gradient = losses.gradient_distance_and_gradient(syn, real)
    leaf = leaves(syn)
    expected = losses.gradient_distance(leaf, real)
    assert_same_bits([value, *gradient], [expected, *torch.autograd.grad(expected, leaf)])
    assert not value.requires_grad and not any(g.requires_grad for g in gradient)


# --- the C++ kernels --------------------------------------------------------------------------


def value_and_derivatives(syn, real, metric, batched):
    """Distance, first and second derivative through the operators, as one flat list."""
    grad = torch.ones(syn[0].shape[0] if batched else 1, dtype=reference.accumulator(syn[0].dtype))
    value, gradient = ops.gradient_distance(syn, real, metric, 1e-6, batched, True)
    both = ops.gradient_distance_bwd(grad, syn, real, metric, 1e-6, batched, True, True)
    second = ops.gradient_distance_bwd_bwd(real, syn, grad, syn, real, metric, 1e-6, batched)
    return [value, *gradient, *both, *second]


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("classes", [None, 3])
def test_error_budget_at_every_level(level, dtype, metric, classes):
    """Row lengths around the vector widths, a chunk boundary, and 27, which divides nothing."""
    shapes = [(4, 27), (3, 31), (3, 32), (3, 33), (5,), (1, 20_001), (2, 3, 65)]
    syn = draw(shapes, 11, dtype, classes, scale=0.1)
    real = draw(shapes, 12, dtype, classes, scale=0.1)
    batched = classes is not None
    with at_level(level):
        ours = value_and_derivatives(syn, real, metric, batched)
    with ddfast.use_backend("reference"):
        eager = value_and_derivatives(syn, real, metric, batched)
        wide = [[t.double() for t in tensors] for tensors in (syn, real)]
        exact = value_and_derivatives(*wide, metric, batched)
    # float64 has no wider type to be judged by: there both sides' rounding counts.
    assert_within_budget(ours, eager, exact, tiny=32 if dtype == torch.float64 else 4)


def test_reference_differs_from_compiled_code():
    """Guards the tests above: forcing the reference really changes who answers."""
    syn, real = draw([(4, 1000)], dtype=torch.float32), draw([(4, 1000)], 1, dtype=torch.float32)
    results = [losses.gradient_distance(syn, real)]
    with ddfast.use_backend("reference"):
        results.append(losses.gradient_distance(syn, real))
    assert abs(results[0].item() - results[1].item()) < 1e-5
    calls = []
    original = ddfast.backend.compiled.gradient_distance

    class Spy:
        def __getattr__(self, name):
            return getattr(original_module, name)

        def gradient_distance(self, *arguments):
            calls.append(arguments)
            return original(*arguments)

    original_module, spy = ddfast.backend.compiled, Spy()
    ddfast.backend.cpu_kernels.cache_clear()
    ddfast.backend.compiled = spy
    try:
        losses.gradient_distance(syn, real)
        with ddfast.use_backend("reference"):
            losses.gradient_distance(syn, real)
    finally:
        ddfast.backend.compiled = original_module
        ddfast.backend.cpu_kernels.cache_clear()
    assert len(calls) == 1


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_for_any_number_of_threads(metric):
    shapes = [(64, 300), (7, 20_000), (3,), (1, 100_000)]
    syn = draw(shapes, 1, torch.float32, 2)
    real = draw(shapes, 2, torch.float32, 2)
    assert_same_bits_for_any_threads(lambda: value_and_derivatives(syn, real, metric, True))


# --- the operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["row_cosine", "cosine", "mse"])
def test_opcheck_on_every_link(metric):
    syn, real = leaves(draw(SMALL, classes=2)), leaves(draw(SMALL, 1, classes=2))
    grad = torch.ones(2, dtype=torch.float64, requires_grad=True)
    common = (syn, real, metric, 1e-6, True)
    torch.library.opcheck(ops.gradient_distance, (*common, False))
    torch.library.opcheck(ops.gradient_distance_bwd, (grad, *common, True, True))
    torch.library.opcheck(ops.gradient_distance_bwd, (grad, *common, False, True))
    # The end of the chain raises by design, so its derivative is not checked.
    utilities = ("test_schema", "test_faketensor")
    detached = [t.detach() for t in syn], [t.detach() for t in real]
    torch.library.opcheck(
        ops.gradient_distance_bwd_bwd,
        (*detached, grad.detach(), *detached, metric, 1e-6, True),
        test_utils=utilities,
    )
    torch.library.opcheck(
        ops.gradient_distance, (*detached, metric, 1e-6, True, True), test_utils=utilities
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    syn, real = leaves(draw(SHAPES, classes=2)), draw(SHAPES, 1, classes=2)

    def f(s, r):
        return losses.gradient_distance([t * 2 for t in s], r, batched=True).sum()

    expected = f(syn, real)
    found = torch.compile(f, backend=compiler, fullgraph=True)(syn, real)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, [syn[0], syn[2], syn[3]]),
        torch.autograd.grad(expected, [syn[0], syn[2], syn[3]]),
        rtol=1e-12,
        atol=1e-14,
    )
