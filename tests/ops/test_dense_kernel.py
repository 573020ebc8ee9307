"""Gates of `dense_kernel`: definition, derivatives, the C++ kernel, operators."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast.kernel_matrix import kernel_matrix
from ddfast.ops import dense_kernel as ops
from ddfast.reference import dense_kernel as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["nngp", "ntk"]


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def sets(dtype=torch.float64, n=4, m=5, d=3) -> tuple[Tensor, Tensor]:
    return draw(n, d, dtype=dtype), draw(m, d, seed=1, dtype=dtype, mean=0.2)


def cotangent(shape, dtype) -> Tensor:
    """Of no symmetry."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64)).view(shape).to(dtype)


def value_and_gradients(x: Tensor, y: Tensor | None, *network, **options) -> list[Tensor]:
    """The matrix, and the gradients of a weighted sum of it."""
    leaves = [t.detach().requires_grad_() for t in (x, y) if t is not None]
    value = kernel_matrix(*leaves, **dict(zip(("kind", "depth"), network, strict=False)), **options)
    return [
        value.detach(),
        *torch.autograd.grad(value, leaves, cotangent(value.shape, value.dtype)),
    ]


def budgets(x: Tensor, y: Tensor | None, *network, tiny: float = 8.0, **options) -> None:
    given = [t for t in (x, y) if t is not None]
    with unchanged(given):
        ours = value_and_gradients(x, y, *network, **options)
    wide = ours[0].dtype
    with ddfast.use_backend("reference"):
        eager, exact = (
            value_and_gradients(
                x.to(dtype), None if y is None else y.to(dtype), *network, **options
            )
            for dtype in (wide, torch.float64)
        )
    eager[1:] = [e.to(o.dtype) for e, o in zip(eager[1:], ours[1:], strict=True)]
    # In float64 the exact result is no more exact than ours.
    assert_within_budget(ours, eager, exact, tiny=8 * tiny if wide == torch.float64 else tiny)


# --- the definition -----------------------------------------------------------------------------


def literal(a: list, b: list, kind: str, depth: int, weight_var: float, bias_var: float) -> float:
    """One pair in Python floats."""

    def first(u, v):
        return weight_var * sum(p * q for p, q in zip(u, v, strict=True)) / len(u) + bias_var

    k, qa, qb = first(a, b), first(a, a), first(b, b)
    tangent = k
    for _ in range(depth):
        p = math.sqrt(qa * qb)
        angle = math.acos(max(-1.0, min(1.0, k / p)))
        s = p / (2 * math.pi) * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
        slope = (math.pi - angle) / (2 * math.pi)
        k = weight_var * s + bias_var
        tangent = k + weight_var * slope * tangent
        qa, qb = (weight_var * q / 2 + bias_var for q in (qa, qb))
    return tangent if kind == "ntk" else k


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_the_formula(backend, kind, depth):
    x, y = sets()
    for weight_var, bias_var in ((2.0, 0.01), (1.3, 0.0), (3.0, 1.5)):
        network = (kind, "fc", depth, True, "flatten", weight_var, bias_var)
        expected = [
            [literal(a, b, kind, depth, weight_var, bias_var) for b in y.tolist()]
            for a in x.tolist()
        ]
        with ddfast.use_backend(backend):
            found = kernel_matrix(x, y, *network)
        torch.testing.assert_close(found.tolist(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_with_itself(backend, kind):
    x, _ = sets(n=300)
    with ddfast.use_backend(backend):
        alone = kernel_matrix(x, kind=kind)
        torch.testing.assert_close(alone, kernel_matrix(x, x.clone(), kind), rtol=1e-12, atol=0)
    assert_same_bits(alone, alone.mT.contiguous())
    expected = [literal(a, a, kind, 3, 2.0, 0.01) for a in x.tolist()]
    # acos(1 - 1e-16) is 1e-8, which the definition above takes for an angle.
    torch.testing.assert_close(alone.diagonal().tolist(), expected, rtol=1e-7, atol=0)
    eigenvalues = torch.linalg.eigvalsh(alone)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]


@pytest.mark.parametrize("depth", [1, 3])
def test_networks_of_finite_width_come_near(depth):
    """Covariance of the outputs, and of the gradients by all weights, of wide random networks."""
    width, networks = 1024, 8
    x = draw(3, 5, dtype=torch.float32)
    sums = {kind: torch.zeros(3, 3) for kind in KINDS}
    generator = torch.Generator().manual_seed(7)
    for _ in range(networks):
        sizes = [5, *([width] * depth)]
        weights = [torch.randn(b, a, generator=generator) for a, b in itertools.pairwise(sizes)]
        biases = [torch.randn(w.shape[0], generator=generator) for w in weights]
        leaves = [t.requires_grad_() for t in weights + biases]
        h = x
        for w, b in zip(weights, biases, strict=True):
            h = torch.relu(h @ w.mT * (2 / w.shape[1]) ** 0.5 + 0.1 * b)
        head = torch.randn(width, generator=generator).requires_grad_()
        out = (h @ head) * (2 / width) ** 0.5
        sums["nngp"] += (2 / width * h @ h.mT + 0.01).detach() / networks
        rows = [torch.autograd.grad(o, [*leaves, head], retain_graph=True) for o in out]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        sums["ntk"] += (flat @ flat.mT + 0.01) / networks
    for kind, found in sums.items():
        expected = kernel_matrix(x, kind=kind, depth=depth)
        assert ((found - expected).abs().max() / expected.max()) < 0.05, kind


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_arc_cosine_functions(level, dtype):
    """One layer, all angles: kappa1 to 1.3e-7 (float) and 4e-16, kappa0 to what c allows."""
    angles = torch.cat([torch.linspace(0, math.pi, 4001), math.pi - torch.logspace(-7, -1, 100)])
    angles = torch.cat([angles, torch.logspace(-7, -1, 100)]).double()
    y = torch.stack([angles.cos(), angles.sin().abs()], 1).to(dtype)
    x = torch.tensor([[1.0, 0.0]], dtype=dtype)
    with at_level(level):
        found = {
            kind: kernel_matrix(x, y, kind, depth=1, weight_var=2.0, bias_var=0.0)[0].double()
            for kind in KINDS
        }
    a = torch.atan2(y[:, 1].double(), y[:, 0].double())
    p = y.double().norm(dim=1)
    kappa1 = p * (a.sin() + (math.pi - a) * a.cos()) / math.pi
    kappa0 = y[:, 0].double() * (1 - a / math.pi)
    eps = torch.finfo(dtype).eps
    error = (found["nngp"] - kappa1).abs()
    assert float(error.max()) <= (1.5e-7 if dtype == torch.float32 else 6e-16)
    error = (found["ntk"] - kappa1 - kappa0).abs()
    # An error of eps in c is one of eps / sin a in the angle, and of the root of eps at most.
    allowed = 3 * eps + torch.minimum(eps / (math.pi * a.sin()), torch.tensor(eps**0.5 / 2))
    assert bool((error <= allowed).all()), float((error / allowed).max())


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("wanted", ["x", "y", "both", "itself"])
def test_gradcheck(backend, kind, depth, wanted):
    x, y = sets(n=3, m=4)
    x.requires_grad_(wanted != "y")
    y.requires_grad_(wanted in ("y", "both"))
    inputs = (x,) if wanted == "itself" else (x, y)
    with ddfast.use_backend(backend):
        check_derivatives(lambda *s: kernel_matrix(*s, kind=kind, depth=depth), inputs, order=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [False, True])
def test_the_reference_has_every_order(kind, other):
    inputs = [t.requires_grad_() for t in sets(n=2, m=3, d=2)[: 1 + other]]
    check_derivatives(lambda *s: reference.dense_kernel(*s, kind=kind, depth=2), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("other", [False, True])
def test_the_closed_form_is_the_derivative_of_the_definition(kind, depth, other):
    x, y = (t.requires_grad_() for t in sets(n=6, m=7, d=4))
    y.data[2], x.data[1] = x.data[0], 0
    leaves = [x, y][: 1 + other]
    for weight_var, bias_var in ((2.0, 0.01), (1.3, 0.0)):
        network = (kind, depth, weight_var, bias_var)
        value = reference.dense_kernel(x, y if other else None, *network)
        grad = cotangent(value.shape, value.dtype)
        by_hand = reference.dense_kernel_bwd(grad, x, y if other else None, *network, True, other)
        torch.testing.assert_close(
            by_hand, list(torch.autograd.grad(value, leaves, grad)), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("wanted", ["none", "x", "y", "both"])
def test_any_subset_may_require_a_gradient(wanted):
    x, y = sets(n=300, m=20)
    expected = value_and_gradients(x, y)[1:]
    x.requires_grad_(wanted in ("x", "both"))
    y.requires_grad_(wanted in ("y", "both"))
    value = kernel_matrix(x, y)
    assert value.requires_grad == (wanted != "none")
    if wanted != "none":
        with unchanged(x, y):
            value.backward(cotangent(value.shape, value.dtype))
    for t, name, gradient in ((x, "x", expected[0]), (y, "y", expected[1])):
        if wanted not in (name, "both"):
            assert t.grad is None
        else:
            assert_same_bits(t.grad, gradient)


def test_backward_may_run_twice_and_without_what_was_kept():
    x, y = sets(torch.float32, n=70, m=20, d=40)
    leaf = x.clone().requires_grad_()
    value = kernel_matrix(leaf, y)
    first = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    assert_same_bits(first, torch.autograd.grad(value.sum(), leaf))
    again, gram = ops.dense_kernel(leaf, y, "ntk", 3, 2.0, 0.01, False)
    assert_same_bits(again, value)
    assert gram.numel() == 0
    assert_same_bits(first, torch.autograd.grad(again.sum(), leaf))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_gradient_is_refused(backend, compiled):
    x, y = sets()
    net = draw(3, 3, seed=2).requires_grad_()

    def outer(x, y, net):
        value = kernel_matrix(torch.tanh(x @ net), torch.tanh(y @ net)).sum()
        (gradient,) = torch.autograd.grad(value, net, create_graph=True)
        return (gradient**2).sum()

    if compiled:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            return  # torch before 2.13 cannot trace autograd.grad
        torch._dynamo.reset()
        outer = torch.compile(outer, backend="aot_eager", fullgraph=True)
    with (
        ddfast.use_backend(backend),
        torch._dynamo.config.patch(trace_autograd_ops=True)
        if compiled
        else contextlib.nullcontext(),
        pytest.raises(Exception, match="second derivative of dense_kernel is not implemented"),
    ):
        torch.autograd.grad(outer(x, y, net), net)


# --- the C++ kernel -----------------------------------------------------------------------------

# Around vectors, panels and blocks of rows; widths around vectors, panels and depths.
SHAPES = [(1, 1, 1), (1, 2, 15), (17, 16, 16), (64, 65, 33), (5, 257, 64), (300, 40, 129)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_error_budget_at_every_level(dtype, kind, depth):
    for n, m, d in SHAPES:
        x, y = sets(dtype, n, m, d)
        for level, other in itertools.product(levels(), (y, None)):
            with at_level(level):
                budgets(x, other, kind, depth)


@pytest.mark.parametrize("level", levels())
def test_the_double_path_is_exact(level):
    x, y = sets(torch.float64, 40, 270, 200)
    for kind, depth, other in itertools.product(KINDS, (1, 3, 8), (y, None)):
        with ddfast.use_backend("reference"):
            exact = value_and_gradients(x, other, kind, depth)
        with at_level(level):
            found = value_and_gradients(x, other, kind, depth)
        for a, b in zip(found, exact, strict=True):
            assert float((a - b).abs().max() / b.abs().max()) < 1e-13


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [3, 64, 130, 257])
def test_equal_rows_have_their_own_variance(level, dtype, d):
    """A copy of a row, in a block of its own, is as good as the row itself: to the last bit."""
    x, y = sets(dtype, 300, 310, d)
    y[5], y[300], y[301] = x[299], x[0], x[7]
    pairs = [(299, 5), (0, 300), (7, 301)]
    for kind in KINDS:
        with at_level(level):
            alone, across = kernel_matrix(x, kind=kind), kernel_matrix(x, y, kind)
            for i, j in pairs:
                assert_same_bits(across[i, j], alone[i, i])
            if d == 130:
                budgets(x, y, kind)


@pytest.mark.parametrize("shape", [(300, 280, 40), (520, 10, 70), (40, 900, 8)])
def test_same_bits_for_any_number_of_threads(shape):
    x, y = sets(torch.float32, *shape)
    for kind in KINDS:
        assert_same_bits_for_any_threads(lambda k=kind: value_and_gradients(x, y, k))
        assert_same_bits_for_any_threads(lambda k=kind: value_and_gradients(x, None, k))


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.dense_kernel
    monkeypatch.setattr(
        ddfast.backend.compiled,
        "dense_kernel",
        lambda *a: (calls.append([bool(t) for t in a[-2]]), original(*a))[1],
    )
    x, y = sets()
    kernel_matrix(x, y)
    assert calls == [[False, True, False, False, False]]
    value_and_gradients(x, y)
    assert calls[1:] == [[True, True, False, False, False], [True, False, True, True, True]]
    with ddfast.use_backend("reference"):
        value_and_gradients(x, y)
    assert len(calls) == 3


# --- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize(("need_x", "need_y"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_on_every_operator(need_x, need_y, keep):
    x, y = sets()
    network = ("ntk", 2, 2.0, 0.01)
    leaves = x.clone().requires_grad_(need_x), y.clone().requires_grad_(need_y)
    torch.library.opcheck(ops.dense_kernel, (*leaves, *network, keep))
    torch.library.opcheck(ops.dense_kernel, (leaves[0], None, *network, keep))
    gram = ops.dense_kernel(x, y, *network, True)[1]
    if need_x or need_y:
        arguments = (draw(4, 5), x, y, gram, *network, need_x, need_y)
        torch.library.opcheck(ops.dense_kernel_bwd, arguments)
    gram = ops.dense_kernel(x, None, *network, True)[1]
    if need_x:
        arguments = (draw(4, 4), x, None, gram, *network, True, False)
        torch.library.opcheck(ops.dense_kernel_bwd, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("other", [False, True])
def test_torch_compile_without_graph_break(compiler, other):
    torch._dynamo.reset()
    x, y = sets(torch.float32)
    x.requires_grad_()

    def f(a, b):
        return (kernel_matrix(a * 2, b if other else None) ** 2).sum()

    expected = f(x, y)
    found = torch.compile(f, backend=compiler, fullgraph=True)(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-6, atol=1e-7
    )
