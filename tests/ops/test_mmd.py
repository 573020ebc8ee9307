"""Gates of `mmd`: derivatives, the C++ kernel, operators."""

from __future__ import annotations

import contextlib
import itertools

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


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_bandwidth_is_a_constant(backend):
    x, y = sets(classes=1)
    fixed = ops.mmd_bandwidth(x, y, "mean")[:, None] * torch.tensor([0.25, 0.5, 1, 2, 4])
    with ddfast.use_backend(backend):
        found = value_and_gradients(x, y, "gaussian")
        torch.testing.assert_close(found, value_and_gradients(x, y, "gaussian", fixed))
    with pytest.raises(NotImplementedError, match="bandwidth has no derivative"):
        ops.mmd_bandwidth(x.requires_grad_(), y, "mean").sum().backward()


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
