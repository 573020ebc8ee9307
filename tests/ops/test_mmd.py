"""Gates of `mmd`: definition, derivatives, the C++ kernel, operators."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import mmd as ops
from ddfast.reference import mmd as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    levels,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["gaussian", "laplace", "m3d_laplace", "linear", "polynomial", "energy"]
# Kernel and bandwidth.
CASES = [
    ("gaussian", None),
    ("gaussian", "median"),
    ("gaussian", 3.0),
    ("gaussian", [1.5, 7.0, 4.0]),
    ("laplace", None),
    ("laplace", "median"),
    ("laplace", [2.0, 1.0]),
    ("m3d_laplace", None),
    ("linear", None),
    ("polynomial", None),
    ("energy", None),
]


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def sets(dtype=torch.float64, classes=2, n=4, m=5, d=3) -> tuple[Tensor, Tensor]:
    return draw(classes, n, d, dtype=dtype), draw(classes, m, d, seed=1, dtype=dtype, mean=0.4)


def value_and_gradients(x: Tensor, y: Tensor, *arguments) -> list[Tensor]:
    """MMD^2 and the gradients of a weighted sum of it."""
    x, y = (t.detach().requires_grad_() for t in (x, y))
    value = losses.mmd(x, y, *arguments)
    weights = torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), (x, y))]


def budgets(x: Tensor, y: Tensor, *arguments, tiny: float = 8.0) -> None:
    with unchanged(x, y):
        ours = value_and_gradients(x, y, *arguments)
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, y.dtype))
    with ddfast.use_backend("reference"):
        eager = value_and_gradients(x.to(wide), y.to(wide), *arguments)
        exact = value_and_gradients(x.double(), y.double(), *arguments)
    # In float64 the exact result is no more exact than ours.
    tiny = 8 * tiny if wide == torch.float64 else tiny
    # The value is a difference of three means: it is judged by their size.
    size = float(scale_of(x.double(), y.double(), *arguments))
    error = float((ours[0].double() - exact[0]).abs().max())
    allowed = 2 * float((eager[0].double() - exact[0]).abs().max())
    assert error <= allowed + tiny * torch.finfo(wide).eps * size
    eager[1:] = [e.to(o.dtype) for e, o in zip(eager[1:], ours[1:], strict=True)]
    assert_within_budget(ours[1:], eager[1:], exact[1:], tiny=tiny)


def scale_of(x: Tensor, y: Tensor, kernel: str, bandwidth=None, unbiased=False) -> Tensor:
    """The largest of the means that MMD^2 is the difference of."""
    if kernel in ("gaussian", "laplace", "m3d_laplace"):
        return torch.tensor(5.0)
    z = torch.cat([x, y], -2)
    if kernel == "energy":
        return torch.cdist(z, z).mean((1, 2)).max()
    inner = z @ z.mT
    return (inner if kernel == "linear" else (inner + 1) ** 2).abs().mean((1, 2)).max()


# --- the definition -----------------------------------------------------------------------------


def literal(x: list, y: list, kernel: str, bandwidth, unbiased: bool) -> float:
    """One batch element in Python floats."""
    z = x + y
    apart = [sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for a in z for b in z]
    pairs = sorted(
        sum((p - q) ** 2 for p, q in zip(z[i], z[j], strict=True))
        for i in range(len(z))
        for j in range(i)
    )
    mean = sum(apart) / (len(z) ** 2 - len(z))
    if bandwidth is None:
        bandwidth = [mean / 4, mean / 2, mean, 2 * mean, 4 * mean]
        bandwidth = bandwidth if kernel == "gaussian" else [math.sqrt(mean)]
    elif bandwidth == "median":
        middle = pairs[(len(pairs) - 1) // 2]
        bandwidth = [middle if kernel == "gaussian" else math.sqrt(middle)]
    bandwidth = [bandwidth] if isinstance(bandwidth, float) else bandwidth

    def k(a, b):
        squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        inner = sum(p * q for p, q in zip(a, b, strict=True))
        return {
            "gaussian": lambda: sum(math.exp(-squared / h) for h in bandwidth),
            "laplace": lambda: sum(math.exp(-math.sqrt(squared) / h) for h in bandwidth),
            "m3d_laplace": lambda: sum(math.exp(-g * squared) for g in (0.1, 1, 5)),
            "linear": lambda: inner,
            "polynomial": lambda: (inner + 1) ** 2,
            "energy": lambda: -math.sqrt(squared),
        }[kernel]()

    def mean_of(a, b, same):
        values = [
            k(p, q)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and unbiased and i == j)
        ]
        return sum(values) / len(values)

    return mean_of(x, x, True) - 2 * mean_of(x, y, False) + mean_of(y, y, True)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("kernel", "bandwidth"), CASES)
def test_the_formula(backend, kernel, bandwidth, unbiased):
    x, y = sets()
    expected = [
        literal(a, b, kernel, bandwidth, unbiased)
        for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]
    with ddfast.use_backend(backend):
        found = losses.mmd(x, y, kernel, bandwidth, unbiased)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_the_polynomial_of_any_degree(backend, degree):
    x, y = sets(classes=1)
    k = [((a[0] @ b[0].T + 1) ** degree).mean() for a, b in ((x, x), (x, y), (y, y))]
    with ddfast.use_backend(backend):
        found = losses.mmd(x, y, "polynomial", degree=degree)
        linear = losses.mmd(x, y, "linear")
    torch.testing.assert_close(found[0], k[0] - 2 * k[1] + k[2], rtol=1e-12, atol=1e-13)
    if degree == 1:
        torch.testing.assert_close(found, linear, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_is_the_loss_of_dm(dtype):
    x, y = sets(dtype, classes=3, n=10, m=40, d=50)
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        losses.mmd(x, y, "linear"), losses.class_mean_distance(x, y), rtol=eps, atol=0
    )
    a, b = (t.clone().requires_grad_() for t in (x, x))
    losses.mmd(a, y, "linear").sum().backward()
    losses.class_mean_distance(b, y).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=4 * eps, atol=eps)


def test_energy_is_the_energy_distance():
    x, y = sets(classes=1, n=30, m=20)
    between = torch.cdist(x[0], y[0]).mean()
    within = [torch.pdist(t[0]).mean() for t in (x, y)]
    found = losses.mmd(x, y, "energy", unbiased=True)
    torch.testing.assert_close(found[0], 2 * between - sum(within), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_bandwidths_from_the_pooled_rows(backend):
    """Against all distances, and for the median an even and an odd number of pairs."""
    for n, m in ((2, 1), (300, 259), (3, 4)):
        x, y = sets(torch.float32, classes=2, n=n, m=m, d=20)
        with ddfast.use_backend(backend):
            mean, median = (ops.mmd_bandwidth(x + 100, y + 100, how) for how in ("mean", "median"))
        pairs = torch.stack([torch.pdist(z + 100) ** 2 for z in torch.cat([x, y], 1).double()])
        torch.testing.assert_close(mean.double(), pairs.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(median.double(), pairs.median(1).values, rtol=2e-5, atol=0)


def test_every_way_to_give_a_bandwidth():
    x, y = (t.view(2, 1, *t.shape[1:]) for t in sets())
    for kernel in ("gaussian", "laplace"):
        expected = losses.mmd(x, y, kernel, 2.0)
        assert expected.shape == (2, 1)
        for given in (
            2,
            [2.0],
            torch.tensor(2.0),
            torch.full((2, 1), 2.0),
            torch.full((2, 1, 1), 2.0),
        ):
            assert_same_bits(losses.mmd(x, y, kernel, given), expected)
        each = torch.tensor([[2.0], [3.0]]), losses.mmd(x, y, kernel, 3.0)
        assert_same_bits(losses.mmd(x, y, kernel, each[0])[1], each[1][1])
        # Doubling bandwidths are computed from one exponential, in any order and number.
        several = losses.mmd(x, y, kernel, [8.0, 2.0, 4.0])
        apart = sum(losses.mmd(x, y, kernel, h) for h in (2.0, 4.0, 8.0))
        torch.testing.assert_close(several, apart, rtol=1e-12, atol=1e-13)
    flat = losses.mmd(x[0, 0], y[0, 0], bandwidth=torch.tensor(2.0))
    assert_same_bits(flat, losses.mmd(x, y, bandwidth=2.0)[0, 0])
    assert flat.shape == ()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_bandwidth_is_a_constant(backend):
    x, y = sets(classes=1)
    fixed = ops.mmd_bandwidth(x, y, "mean")[:, None] * torch.tensor([0.25, 0.5, 1, 2, 4])
    with ddfast.use_backend(backend):
        found = value_and_gradients(x, y, "gaussian")
        torch.testing.assert_close(found, value_and_gradients(x, y, "gaussian", fixed))
    with pytest.raises(NotImplementedError, match="bandwidth has no derivative"):
        ops.mmd_bandwidth(x.requires_grad_(), y, "mean").sum().backward()


@pytest.mark.parametrize("kernel", KERNELS)
def test_not_negative_and_symmetric(kernel):
    for seed in range(5):
        x, y = draw(3, 20, 6, seed=seed), draw(3, 30, 6, seed=seed + 50)
        value = losses.mmd(x, y, kernel)
        torch.testing.assert_close(losses.mmd(y, x, kernel), value, rtol=1e-12, atol=1e-13)
        assert (value > -1e-13).all()


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wanted", ["x", "y", "both"])
def test_gradcheck(backend, unbiased, kernel, wanted):
    x, y = sets(n=3, m=4)
    x.requires_grad_(wanted != "y")
    y.requires_grad_(wanted != "x")
    bandwidth = [2.0, 3.0] if kernel in ("gaussian", "laplace") else None
    with ddfast.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda a, b: losses.mmd(a, b, kernel, bandwidth, unbiased), (x, y)
        )


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", reference.KERNELS)
def test_the_reference_has_every_order(unbiased, kernel):
    x, y = (t.requires_grad_() for t in sets(n=2, m=3, d=2))
    bandwidths = torch.tensor([[2.0, 0.0, 3.0]] * 2)

    def f(a, b):
        return reference.mmd(a, b, bandwidths, kernel, 3, unbiased)

    assert torch.autograd.gradcheck(f, (x, y))
    assert torch.autograd.gradgradcheck(f, (x, y))
    weights = draw(2, seed=3)
    by_hand = reference.mmd_bwd(weights, x, y, bandwidths, kernel, 3, unbiased, True, True)
    torch.testing.assert_close(by_hand, list(torch.autograd.grad(f(x, y), (x, y), weights)))


@pytest.mark.parametrize("wanted", ["none", "x", "y", "both"])
@pytest.mark.parametrize("kernel", ["gaussian", "polynomial", "linear"])
def test_any_subset_may_require_a_gradient(wanted, kernel):
    x, y = sets(n=300, m=20)
    expected = value_and_gradients(x, y, kernel)[1:]
    x.requires_grad_(wanted in ("x", "both"))
    y.requires_grad_(wanted in ("y", "both"))
    value = losses.mmd(x, y, kernel)
    assert value.requires_grad == (wanted != "none")
    if wanted != "none":
        with unchanged(x, y):
            (value * torch.tensor([1.0, 2.0])).sum().backward()
    for t, name, gradient in ((x, "x", expected[0]), (y, "y", expected[1])):
        if wanted not in (name, "both"):
            assert t.grad is None
        else:
            torch.testing.assert_close(t.grad, gradient, rtol=1e-12, atol=1e-15)


def test_backward_may_run_twice():
    x, y = sets()
    leaf = x.clone().requires_grad_()
    value = losses.mmd(leaf, y)
    first = torch.autograd.grad(value.sum() * 3, leaf, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(value.sum(), leaf)[0]
    torch.testing.assert_close(first, 3 * second, rtol=1e-13, atol=1e-15)
    assert_same_bits(first, kept)
    alone, gradient = losses.mmd_and_gradient(x, y)
    assert_same_bits(alone, value)
    torch.testing.assert_close(gradient, second, rtol=1e-13, atol=1e-15)
    assert not alone.requires_grad and not gradient.requires_grad and gradient.shape == x.shape


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_the_gradient_of_a_gradient_is_refused(backend, compiled, kernel):
    x, y = sets()
    net = draw(3, 3, seed=2).requires_grad_()

    def outer(x, y, net):
        value = losses.mmd(torch.tanh(x @ net), torch.tanh(y @ net), kernel).sum()
        (gradient,) = torch.autograd.grad(value, net, create_graph=True)
        return (gradient**2).sum()

    options = contextlib.nullcontext()
    if compiled:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            return  # torch before 2.13 cannot trace autograd.grad
        torch._dynamo.reset()
        outer = torch.compile(outer, backend="aot_eager", fullgraph=True)
        options = torch._dynamo.config.patch(trace_autograd_ops=True)
    with (
        ddfast.use_backend(backend),
        options,
        pytest.raises(Exception, match="second derivative of mmd is not implemented"),
    ):
        torch.autograd.grad(outer(x, y, net), net)


# --- the C++ kernel -----------------------------------------------------------------------------

# Around vectors, panels and blocks of rows; widths around vectors, panels and depths.
SHAPES = [
    (1, 1, 1),
    (1, 2, 15),
    (17, 16, 16),
    (64, 65, 33),
    (5, 257, 64),
    (300, 40, 129),
    (2, 3, 257),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_error_budget_at_every_level(dtype, kernel, unbiased):
    for n, m, d in SHAPES:
        if unbiased and 1 in (n, m):
            continue
        x, y = sets(dtype, 1, n, m, d)
        # m3d's rates are for distances about one.
        x, y = (t / d**0.5 if kernel == "m3d_laplace" else t for t in (x, y))
        for level in levels():
            with at_level(level):
                budgets(x, y, kernel, None, unbiased)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "energy"])
def test_rows_far_from_the_origin(level, kernel):
    """Distances do not change when all rows move; inner products of rows that do not move would."""
    x, y = sets(torch.float32, 1, 40, 50, 30)
    x, y = (t.mul(2**6).round() / 2**6 for t in (x, y))
    with at_level(level):
        moved = value_and_gradients(x + 1024, y + 1024, kernel)
        budgets(x + 1024, y + 1024, kernel)
        for a, b in zip(moved, value_and_gradients(x, y, kernel), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "energy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_that_nearly_meet(level, kernel, dtype):
    """Two clusters far apart, of rows whose differences are a millionth of their norms."""
    x, y = sets(dtype, 2, 9, 11, 70)
    x, y = x * 1e-4, y * 1e-4
    x[:, ::2] += 100
    y[:, ::3] += 100
    bandwidth = None if kernel == "energy" else [0.01, 0.02]
    with at_level(level):
        budgets(x, y, kernel, bandwidth)
        both = value_and_gradients(x, y, kernel, bandwidth)
        for a, b, gradient in ((x, y, both[1]), (y, x, both[2])):
            alone = losses.mmd_and_gradient(a, b, kernel, bandwidth)[1]
            weights = torch.tensor([1.0, 2.0], dtype=dtype)[:, None, None]
            rounding = 64 * torch.finfo(dtype).eps * float(gradient.abs().max())
            torch.testing.assert_close(weights * alone, gradient, rtol=0, atol=rounding)
        only_y = y.clone().requires_grad_()
        losses.mmd(x, only_y, kernel, bandwidth).sum().backward()
        torch.testing.assert_close(only_y.grad * weights, both[2], rtol=0, atol=rounding)


@pytest.mark.parametrize("shape", [(3, 300, 280, 40), (1, 520, 10, 70), (1, 1000, 900, 8)])
def test_same_bits_for_any_number_of_threads(shape):
    x, y = sets(torch.float32, *shape)
    for kernel in KERNELS:
        assert_same_bits_for_any_threads(lambda k=kernel: value_and_gradients(x, y, k))
    assert_same_bits_for_any_threads(lambda: losses.mmd(x, y, "gaussian", "median"))


def test_classes_do_not_depend_on_each_other():
    x, y = sets(torch.float32, 3, 70, 300, 20)
    together = losses.mmd_and_gradient(x, y)
    for c in range(3):
        alone = losses.mmd_and_gradient(x[c], y[c])
        assert_same_bits(alone, [t[c] for t in together])


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.mmd
    monkeypatch.setattr(
        ddfast.backend.compiled, "mmd", lambda *a: (calls.append(a[0]), original(*a))[1]
    )
    x, y = sets()
    losses.mmd(x, y)
    assert calls == [1, 0]
    value_and_gradients(x, y, "energy")
    assert calls == [1, 0, 0], "value and gradients come from one call"
    losses.mmd(x, y, "laplace", "median")
    assert calls == [1, 0, 0, 2, 0]
    with ddfast.use_backend("reference"):
        value_and_gradients(x, y, "gaussian")
    assert len(calls) == 5


# --- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize(("need_x", "need_y"), list(itertools.product([False, True], repeat=2)))
def test_opcheck_on_every_operator(need_x, need_y):
    x, y = sets()
    bandwidths = torch.full((2, 1), 2.0, dtype=torch.float64)
    common = (bandwidths, "gaussian", 2, True, need_x, need_y)
    torch.library.opcheck(ops.mmd_bandwidth, (x, y, "median"))
    torch.library.opcheck(
        ops.mmd, (x.clone().requires_grad_(need_x), y.clone().requires_grad_(need_y), *common)
    )
    if need_x or need_y:
        torch.library.opcheck(ops.mmd_bwd, (draw(2), x, y, *common))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bandwidth", [None, "median", [2.0, 3.0]])
def test_torch_compile_without_graph_break(compiler, bandwidth):
    torch._dynamo.reset()
    x, y = sets(torch.float32)
    x.requires_grad_()

    def f(a, b):
        return losses.mmd(a * 2, b, "gaussian", bandwidth).sum()

    expected = f(x, y)
    found = torch.compile(f, backend=compiler, fullgraph=True)(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-6, atol=1e-7
    )
