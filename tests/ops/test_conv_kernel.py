"""Gates of `conv_kernel`: definition, derivatives, the C++ kernel, operators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
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


# --- the definition -----------------------------------------------------------------------------


def by_loops(x: Tensor, y: Tensor, kind, pools, readout, weight_var, bias_var) -> float:
    """One entry, position pair by position pair, from the published recursion."""
    channels, height, width = x.shape

    def inner(a: Tensor, b: Tensor) -> dict:
        return {
            p: float(a[:, p[0], p[1]] @ b[:, p[2], p[3]]) / channels
            for p in itertools.product(range(height), range(width), range(height), range(width))
        }

    def convolve(k: dict) -> dict:
        shifts = list(itertools.product((-1, 0, 1), repeat=2))
        return {
            (h, w, i, j): sum(k.get((h + a, w + b, i + a, j + b), 0.0) for a, b in shifts) / 9
            for h, w, i, j in k
        }

    def pool(k: dict, height: int, width: int) -> dict:
        corners = list(itertools.product((0, 1), repeat=4))
        return {
            (h, w, i, j): sum(
                k[2 * h + a, 2 * w + b, 2 * i + c, 2 * j + d] for a, b, c, d in corners
            )
            / 16
            for h, w, i, j in itertools.product(range(height), range(width), repeat=2)
        }

    states = [inner(x, y), inner(x, x), inner(y, y)]
    theta = dict.fromkeys(states[0], 0.0)
    for pooled in pools:
        states = [{p: weight_var * v + bias_var for p, v in convolve(k).items()} for k in states]
        theta = {p: weight_var * v + states[0][p] for p, v in convolve(theta).items()}
        own = [{p: k[p] for p in k if p[:2] == p[2:]} for k in states]
        after = []
        for n, k in enumerate(states):
            of_x, of_y = own[1 if n < 2 else 2], own[2 if n != 1 else 1]
            result = {}
            for p, v in k.items():
                size = math.sqrt(of_x[p[0], p[1], p[0], p[1]] * of_y[p[2], p[3], p[2], p[3]])
                angle = math.acos(max(-1.0, min(1.0, v / size)))
                result[p] = size * (math.sin(angle) + (math.pi - angle) * math.cos(angle))
                result[p] /= 2 * math.pi
                if n == 0:
                    theta[p] *= (math.pi - angle) / (2 * math.pi)
            after.append(result)
        states = after
        if pooled:
            height, width = height // 2, width // 2
            states, theta = [pool(k, height, width) for k in states], pool(theta, height, width)

    def read(k: dict) -> float:
        kept = [v for p, v in k.items() if readout == "gap" or p[:2] == p[2:]]
        return sum(kept) / len(kept)

    out = weight_var * read(states[0]) + bias_var
    return weight_var * read(theta) + out if kind == "ntk" else out


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("pools", [[True, False], [False, True], [False, False], [True, True]])
def test_the_published_recursion(pools, readout, backend):
    x, y = draw(2, 2, 5, 4), draw(2, 2, 5, 4, seed=1)
    for kind in KINDS:
        network = (kind, pools, readout, 1.7, 0.05)
        with ddfast.use_backend(backend):
            found = ops.conv_kernel(x, y, *network)
        expected = torch.tensor([[by_loops(a, b, *network) for b in y] for a in x]).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # acos near 1


def finite_network(images: Tensor, pools, readout, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of one random network with `width` channels, by their definitions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    channels, parameters = images.shape[1], []
    for _ in pools:
        parameters += [normal(width, channels, 3, 3), normal(width)]
        channels = width

    def features(z: Tensor) -> Tensor:
        for layer, pooled in enumerate(pools):
            weight, bias = parameters[2 * layer : 2 * layer + 2]
            factor = math.sqrt(VARIANCES[0] / (9 * weight.shape[1]))
            z = F.relu(F.conv2d(z, factor * weight, math.sqrt(VARIANCES[1]) * bias, padding=1))
            z = F.avg_pool2d(z, 2) if pooled else z
        return z.mean((2, 3)) if readout == "gap" else z.flatten(1)

    z = features(images)
    kernel = VARIANCES[0] * z @ z.mT / z.shape[1] + VARIANCES[1]
    last = normal(z.shape[1])
    outputs = math.sqrt(VARIANCES[0] / z.shape[1]) * z @ last
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
        for o in outputs
    ]
    jacobian = torch.stack(rows)
    return kernel.detach(), (kernel + jacobian @ jacobian.mT).detach()


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("pools", [[True, True], [False, True, False]])
def test_wide_random_networks_tend_to_it(pools, readout):
    images = draw(3, 2, 6, 6)
    width, count = 128, 24
    found = [finite_network(images, pools, readout, width, seed) for seed in range(count)]
    for kind, samples in zip(["nngp", "ntk"], zip(*found, strict=True), strict=True):
        stacked = torch.stack(samples)
        exact = ops.conv_kernel(images, None, kind, pools, readout, *VARIANCES)
        spread = stacked.std(0) / math.sqrt(count)
        # The mean of finite networks is off by about 1 / width.
        assert ((stacked.mean(0) - exact).abs() < 4 * spread + 2 / width * exact.abs()).all()
        assert (spread < 0.05 * exact.abs().max()).all()


def test_one_narrower_band_changes_the_result():
    """For a flattened readout offsets up to 1, 3, 7 before the pools are exactly what counts."""
    x, y = draw(1, 1, 16, 16), draw(1, 1, 16, 16, seed=1)
    pools, sizes = [True, True, True], [16, 8, 4]
    vx, vy = (reference.variances(t, pools, *VARIANCES) for t in (x, y))

    def banded(reaches: list[int]) -> Tensor:
        k = reference.products(x[:, None], y[None])
        for layer, (size, reach) in enumerate(zip(sizes, reaches, strict=True)):
            at = torch.arange(size)
            near = (at[:, None] - at).abs() <= reach
            k = VARIANCES[0] * reference.shifted_mean(k) + VARIANCES[1]
            v, w = vx[layer][:, None, :, :, None, None], vy[layer][None, :, None, None]
            k, _, _ = reference.relu(k, v, w)
            k = reference.pool(k * near[:, None, :, None] * near[:, None, :])
        return VARIANCES[0] * reference.own(k).mean((-2, -1)) + VARIANCES[1]

    full = reference.conv_kernel(x, y, "nngp", pools, "flatten", *VARIANCES)
    assert torch.equal(banded([7, 3, 1]), full)
    for narrower in ([6, 3, 1], [7, 2, 1], [7, 3, 0]):
        assert (banded(narrower) - full).abs() > 1e-6 * full


# --- derivatives of the definition --------------------------------------------------------------


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


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_the_definition(kind):
    x, y = draw(1, 1, 4, 4).requires_grad_(), draw(2, 1, 4, 4, seed=1).requires_grad_()
    network = (kind, [True, False], "flatten", *VARIANCES)
    check_derivatives(lambda a, b: reference.conv_kernel(a, b, *network), [x, y])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_gradient_is_refused(backend, compiled):
    x = draw(2, 1, 4, 4).requires_grad_()

    def outer(x):
        matrix = ops.conv_kernel(x, None, "ntk", [True], "flatten", *VARIANCES)
        (gradient,) = torch.autograd.grad(matrix.sum(), x, create_graph=True)
        return (gradient**2).sum()

    if compiled:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            return  # torch before 2.13 cannot trace autograd.grad
        torch._dynamo.reset()
        outer = torch.compile(outer, backend="aot_eager", fullgraph=True)
    with (
        ddfast.use_backend(backend),
        torch._dynamo.config.patch(trace_autograd_ops=True),
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
