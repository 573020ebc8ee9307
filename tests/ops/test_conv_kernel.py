"""Gates of `conv_kernel`: derivatives, the C++ kernel, operators."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast.ops import conv_kernel as ops
from ddfast.reference import conv_kernel as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
)

KINDS = ["ntk", "nngp"]
READOUTS = ["flatten", "gap"]
VARIANCES = (2.0, 0.01)


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradients(x: Tensor, y: Tensor | None, *network, seed: int = 9) -> list[Tensor]:
    """The matrix, and the gradients of a random combination of its entries."""
    leaves = [t.detach().requires_grad_() for t in (x, y) if t is not None]
    matrix = ops.conv_kernel(leaves[0], None if y is None else leaves[1], *network)
    weights = draw(*matrix.shape, seed=seed).to(matrix.dtype)
    return [matrix.detach(), *torch.autograd.grad(matrix, leaves, weights)]


def by_reference(*arguments) -> list[Tensor]:
    with ddfast.use_backend("reference"):
        return value_and_gradients(*arguments)


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind, readout, backend):
    x, y = draw(2, 2, 4, 5).requires_grad_(), draw(2, 2, 4, 5, seed=1).requires_grad_()
    network = (kind, [False, True, False], readout, *VARIANCES)
    with ddfast.use_backend(backend):
        check_derivatives(lambda a, b: ops.conv_kernel(a, b, *network), [x, y], order=1)
        check_derivatives(lambda a: ops.conv_kernel(a, None, *network), [x], order=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("budget", [1, 256 << 20])
def test_the_gradient_by_hand_is_that_of_autograd(kind, readout, budget, monkeypatch):
    monkeypatch.setattr(reference, "BUDGET", budget)  # one pair at a time, or all of them
    x, y = draw(3, 2, 5, 6), draw(2, 2, 5, 6, seed=1)
    network = (kind, [True, False, True], readout, *VARIANCES)
    for other in (y, None):
        leaves = [t.clone().requires_grad_() for t in (x, other) if t is not None]
        matrix = reference.conv_kernel(leaves[0], other if other is None else leaves[1], *network)
        weights = draw(*matrix.shape, seed=9)
        expected = [matrix.detach(), *torch.autograd.grad(matrix, leaves, weights)]
        for found in (by_reference(x, other, *network), value_and_gradients(x, other, *network)):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_gradient_is_refused(backend, compiled):
    x = draw(2, 1, 4, 4).requires_grad_()

    def outer(x):
        matrix = ops.conv_kernel(x, None, "ntk", [True], "flatten", *VARIANCES)
        (gradient,) = torch.autograd.grad(matrix.sum(), x, create_graph=True)
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
        pytest.raises(Exception, match="second derivative of conv_kernel is not implemented"),
    ):
        torch.autograd.grad(outer(x), x)


# --- the C++ kernel -----------------------------------------------------------------------------

# Height, width, pools: one, two, three pools, none, at either end, odd sizes, a row, many layers.
NETWORKS = [
    (4, 4, [True]),
    (8, 8, [True, True, True]),
    (16, 16, [True, True, True]),
    (14, 14, [True, True, True]),
    (28, 28, [True, True, True]),
    (7, 7, [True, True]),
    (7, 5, [True, False]),
    (6, 9, [False, True, True]),
    (5, 4, [False, False]),
    (1, 3, [False]),
    (1, 1, [False, False]),
    (3, 17, [True, False]),
    (8, 6, [False, False, True, False, False, True, False]),
    (3, 3, [False] * 6),
    (2, 2, [False, False, False, False, True]),
]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_the_compiled_kernel(network, readout):
    height, width, pools = network
    if height > 14 and readout == "gap":
        return  # takes the reference a minute
    few = height > 8
    for kind, channels in itertools.product(KINDS, [3] if few else [1, 2, 3]):
        if height > 16 and kind == "nngp":
            continue
        n, m = (1, 1) if height > 16 else (2, 3) if few else (3, 19)
        x, y = draw(n, channels, height, width), draw(m, channels, height, width, seed=1)
        settings = (kind, pools, readout, *VARIANCES)
        for other in (y, None):
            exact = by_reference(x, other, *settings)
            ours = value_and_gradients(x, other, *settings)
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))
            single = [t if t is None else t.float() for t in (x, other)]
            exact = by_reference(*(t if t is None else t.double() for t in single), *settings)
            ours = value_and_gradients(*single, *settings)
            # Tiny images are nearly parallel, where float32 loses digits, eager's too.
            for a, b, limit in zip(ours, exact, [1e-6, 4e-6, 4e-6], strict=False):
                assert a.dtype == torch.float32
                if height * width > 9:
                    assert float((a - b).abs().max()) <= limit * float(b.abs().max())
            assert_within_budget(ours, by_reference(*single, *settings), exact, tiny=16)
            if other is None:
                assert torch.equal(ours[0], ours[0].mT)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("readout", READOUTS)
def test_every_level(level, readout):
    x, y = draw(3, 3, 8, 7), draw(18, 3, 8, 7, seed=1)
    network = ("ntk", [True, False, True], readout, *VARIANCES)
    exact = by_reference(x, y, *network)
    with at_level(level):
        for a, b in zip(value_and_gradients(x, y, *network), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))
        single = value_and_gradients(x.float(), y.float(), *network)
        exact = by_reference(x.float().double(), y.float().double(), *network)
        for a, b in zip(single, exact, strict=True):
            assert float((a - b).abs().max()) <= 4e-6 * float(b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind, dtype):
    x, y = draw(11, 2, 8, 8, dtype=dtype), draw(37, 2, 8, 8, seed=1, dtype=dtype)
    network = (kind, [True, False, True], "flatten", *VARIANCES)
    assert_same_bits_for_any_threads(lambda: value_and_gradients(x, y, *network))
    assert_same_bits_for_any_threads(lambda: value_and_gradients(y, None, *network))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("readout", READOUTS)
def test_blocks_of_any_size_make_the_same_matrix(readout, dtype):
    x, y = draw(6, 3, 8, 8, dtype=dtype), draw(40, 3, 8, 8, seed=1, dtype=dtype)
    network = ("ntk", [True, True, True], readout, *VARIANCES)
    whole = ops.conv_kernel(x, y, *network)
    for rows, columns in ((1, 1), (2, 16), (5, 7), (6, 33)):
        found = [
            torch.cat([ops.conv_kernel(a, b, *network) for b in y.split(columns)], 1)
            for a in x.split(rows)
        ]
        assert_same_bits(torch.cat(found), whole)
    # Without y, entries above the diagonal are those of x with itself.
    own = ops.conv_kernel(y, None, *network)
    assert_same_bits(own.triu(), ops.conv_kernel(y, y, *network).triu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_positive_definite(kind, dtype):
    x = draw(24, 3, 8, 8, dtype=dtype)
    x[20:] = x[:4]
    for readout in READOUTS:
        matrix = ops.conv_kernel(x, None, kind, [True, True], readout, *VARIANCES)
        values = torch.linalg.eigvalsh(matrix.double())
        assert values[0] > -(1e-6 if dtype == torch.float32 else 1e-14) * values[-1]


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.conv_kernel
    monkeypatch.setattr(
        ddfast.backend.compiled, "conv_kernel", lambda *a: (calls.append(len(a[7])), original(*a))
    )
    x = draw(2, 1, 4, 4)
    network = ("ntk", [True], "flatten", *VARIANCES)
    value_and_gradients(x, None, *network)
    assert calls == [3, 5]
    by_reference(x, None, *network)
    assert calls == [3, 5]


# --- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
def test_opcheck_on_every_operator(need):
    x, y = draw(2, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    network = ("ntk", [True, False], "flatten", *VARIANCES)
    leaves = [t.clone().requires_grad_(n) for t, n in zip((x, y), need, strict=True)]
    torch.library.opcheck(ops.conv_kernel, (*leaves, *network))
    torch.library.opcheck(ops.conv_kernel, (leaves[0], None, *network))
    torch.library.opcheck(ops.conv_kernel_bwd, (draw(2, 3), x, y, *network, *need))
    torch.library.opcheck(ops.conv_kernel_bwd, (draw(2, 2), x, None, *network, *need))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    x, y = draw(2, 1, 4, 4, dtype=torch.float32), draw(3, 1, 4, 4, seed=1, dtype=torch.float32)
    x.requires_grad_()

    def f(a, b):
        network = ("ntk", [True, False], "gap", *VARIANCES)
        own = ops.conv_kernel(a * 2, None, *network)
        return ops.conv_kernel(a * 2, b, *network).sum() + own.sum()

    expected = f(x, y)
    found = torch.compile(f, backend=compiler, fullgraph=True)(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-5, atol=1e-6
    )
