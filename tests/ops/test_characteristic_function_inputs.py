"""Error budgets, layouts, threads and errors of `characteristic_function`."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.losses import Frequencies
from ddfast.ops import characteristic_function as ops
from ddfast.reference import characteristic_function as reference
from ddfast.reference.frequencies import frequencies
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    levels,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUMBERS = (0, 0, 1.0, 0)


def draw(*shape: int, seed: int = 0, dtype=torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def run(x, t, grad, keep=True):
    """The function and both gradients through the operators, as one flat list."""
    phi, phase = ops.characteristic_function(x, t, *NUMBERS, keep)
    grad = grad.to(phi.dtype)
    return [phi, *ops.characteristic_function_bwd(grad, x, t, phase, *NUMBERS, True, True)]


def check(x, t, seed=9, tiny=4.0):
    """The budget. What is exact for float64 is as rounded as ours: there only `tiny` is left."""
    if torch.float64 in (x.dtype, t.dtype):
        tiny = 128.0
    grad = draw(x.shape[0], t.shape[1], 2, seed=seed, dtype=torch.float32).double()
    with unchanged(x, t):
        ours = run(x, t, grad)
    with ddfast.use_backend("reference"):
        eager = run(x, t, grad)
        exact = run(x.double(), t.double(), grad)
    assert_within_budget(ours, eager, exact, tiny=tiny)
    return ours


# --- the C++ kernel -----------------------------------------------------------------------------

# Around vectors, panels, packed blocks, chunks of depth and blocks of columns of every level.
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 3, 7),
    (3, 6, 63, 129),
    (1, 7, 64, 128),
    (2, 96, 65, 127),
    (1, 97, 255, 33),
    (1, 193, 257, 64),
    (1, 12, 520, 300),
    (1, 1025, 40, 20),
    (1, 30, 1030, 50),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget_at_every_level(dtype, shape):
    classes, n, k, d = shape
    x = draw(classes, n, d, seed=1, dtype=dtype, scale=d**-0.5)
    for t in (draw(1, k, d, seed=2, dtype=dtype), draw(classes, k, d, seed=2, dtype=dtype)):
        for level in levels():
            with at_level(level):
                check(x, t, tiny=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget_of_large_phases(dtype):
    """Products far beyond 2 pi: what is lost is what the product itself loses."""
    x, t = draw(1, 50, 8, dtype=dtype, scale=100), draw(1, 60, 8, seed=1, dtype=dtype, scale=30)
    for level in levels():
        with at_level(level):
            check(x, t)


@pytest.mark.parametrize("level", levels())
def test_rounding_does_not_pile_up(level):
    """A quarter of a million equal rows have the mean that one of them has."""
    row, t = torch.tensor([[[0.3, -0.2]]]), torch.tensor([[[1.1, 2.3], [-0.4, 0.9]]])
    with at_level(level):
        many, _ = ops.characteristic_function(row.expand(1, 250_000, 2), t, *NUMBERS, False)
        one, _ = ops.characteristic_function(row, t, *NUMBERS, False)
    # Of waves of size 1; a running sum would be off by a thousandth.
    torch.testing.assert_close(many, one, rtol=0, atol=2e-7)


def test_same_bits_for_any_number_of_threads():
    x = draw(2, 1100, 300, seed=1, dtype=torch.float32, scale=0.1)
    t = draw(2, 600, 300, seed=2, dtype=torch.float32)
    grad = draw(2, 600, 2, seed=3, dtype=torch.float32)
    drawn = (600, 5, 1.0, 0)

    def everything():
        phi, _ = ops.characteristic_function(x, None, *drawn, False)
        none = torch.empty(0)
        by_x, _ = ops.characteristic_function_bwd(grad, x, None, none, *drawn, True, False)
        return [*run(x, t, grad), *run(x, t[:1], grad, keep=False), phi, by_x]

    assert_same_bits_for_any_threads(everything)


def test_many_rows_are_weighed_in_slabs():
    """More rows x frequencies than the kernel holds weights for at once."""
    x = draw(1, 17_000, 3, seed=1, dtype=torch.float32)
    t = draw(1, 600, 3, seed=2, dtype=torch.float32)
    check(x, t)
    grad = draw(1, 600, 2, dtype=torch.float32)
    assert_same_bits(run(x, t, grad), run(x, t, grad, keep=False))
    drawn = frequencies(600, 3, 7, 1.0, 2, 1, torch.float64)
    _, given = run(x.double(), drawn, grad)[:2]
    numbers, nothing = (600, 7, 1.0, 2), torch.empty(0, dtype=torch.float64)
    found, _ = ops.characteristic_function_bwd(
        grad.double(), x.double(), None, nothing, *numbers, True, False
    )
    torch.testing.assert_close(found, given, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(types):
    x, t = draw(2, 5, 33, dtype=types[0]), draw(2, 6, 33, seed=1, dtype=types[1])
    ours = check(x, t)
    wide = torch.promote_types(torch.float32, torch.promote_types(*types))
    assert [r.dtype for r in ours] == [wide, *types]


# --- inputs -------------------------------------------------------------------------------------


@given(
    classes=st.integers(1, 3),
    # Not one alone: where a single value is near 0, rounding alone decides and no budget holds.
    n=st.integers(3, 20),
    k=st.integers(3, 70),
    d=st.integers(1, 140),
    shared=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
)
def test_any_shapes_and_dtypes_match_the_reference(classes, n, k, d, shared, dtypes):
    x = draw(classes, n, d, seed=1, dtype=dtypes[0], scale=d**-0.5)
    t = draw(1 if shared else classes, k, d, seed=2, dtype=dtypes[1])
    check(x, t, tiny=16.0)


VIEWS = {
    "transposed": lambda t: t.transpose(0, 2),
    "classes inside": lambda t: t.transpose(0, 1),
    "rows expanded": lambda t: t[:, :1].expand(8, 9, 10),
    "classes expanded": lambda t: t[:1].expand(8, 9, 10),
    "all expanded": lambda t: t[:1, :1, :1].expand(8, 9, 10),
    "sliced": lambda t: t[::2, 1:7:3, 2:],
    "columns skipped": lambda t: t[:, :, ::2],
    "one column": lambda t: t[:, :, 3:4],
    "flipped": lambda t: t.flip(2),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(view, dtype):
    x = VIEWS[view](draw(8, 9, 10, dtype=dtype))
    t = VIEWS[view](draw(8, 9, 10, seed=1, dtype=dtype))
    grad = draw(t.shape[1] * 2 * x.shape[0], dtype=torch.float32).view(2, x.shape[0], -1).mT
    grad = grad.permute(2, 1, 0)  # neither is the gradient contiguous
    with unchanged(x, t, grad):
        ours = run(x, t, grad)
    assert_same_bits(ours, run(x.contiguous(), t.contiguous(), grad.contiguous()))


def test_strided_rows_are_read_in_place(monkeypatch):
    """Only columns that do not lie side by side cost a copy."""
    seen = []
    original = ddfast.backend.compiled.characteristic_function
    monkeypatch.setattr(
        ddfast.backend.compiled,
        "characteristic_function",
        lambda *a: (seen.append((a[0][0], a[1][0])), original(*a)),
    )
    for view, copied in (("classes inside", False), ("rows expanded", False), ("transposed", True)):
        x, t = VIEWS[view](draw(8, 9, 10)), VIEWS[view](draw(8, 9, 10, seed=1))
        losses.characteristic_function(x, t)
        assert [a != b.data_ptr() for a, b in zip(seen[-1], (x, t), strict=True)] == [copied] * 2


def test_offsets_beyond_32_bits():
    """Rows that lie three gigabytes apart in memory that nothing else touches."""
    stride, width = 1_500_000_000, 40
    flat = torch.empty(2 * stride + width, dtype=torch.bfloat16)
    x = flat.as_strided((1, 3, width), (0, stride, 1))
    values, grad = draw(1, 3, width, dtype=torch.bfloat16), draw(1, 3, 2, dtype=torch.float32)
    x.copy_(values)
    assert_same_bits(run(x, x, grad), run(values, values, grad))


def test_nan_and_infinity_stay_in_their_row():
    x, t = draw(2, 3, 5, dtype=torch.float32), draw(4, 5, seed=1, dtype=torch.float32)
    x[0, 1, 2] = float("nan")
    t[1, 0] = float("inf")
    phi = losses.characteristic_function(x, t)
    assert phi[0].isnan().all() and phi[1, 1].isnan().all()
    assert phi[1, [0, 2, 3]].isfinite().all()


# --- errors -------------------------------------------------------------------------------------

two, three, of_two = torch.ones(3, 4), torch.ones(2, 3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], two, of_two), TypeError, "x: got list, expected a tensor"),
        ((two, two.int(), of_two), TypeError, "y: got torch.int32, expected a floating dtype"),
        ((two, two, of_two.cfloat()), TypeError, "t: got torch.complex64"),
        ((two, two, [1]), TypeError, "t: got list, expected a tensor"),
        ((two[0], two, of_two), ValueError, r"x: got shape \(4,\), expected \(n, d\) or"),
        ((two, three, of_two), ValueError, r"y: got shape \(2, 3, 4\), expected the classes of x"),
        ((three, three[:1], of_two), ValueError, r"y: got shape \(1, 3, 4\), expected the classes"),
        ((two[:0], two, of_two), ValueError, r"x: got shape \(0, 4\), expected a row or more"),
        ((two, two[:0], of_two), ValueError, r"y: got shape \(0, 4\), expected a row or more"),
        ((two, two, of_two[:0]), ValueError, r"t: got shape \(0, 4\), expected a frequency"),
        ((two, two, of_two[None]), ValueError, r"t: got shape \(1, 5, 4\), expected \(k, d\)$"),
        (
            (three, three, torch.ones(3, 5, 4)),
            ValueError,
            r"t: got shape \(3, 5, 4\), expected \(k, d\) or \(2, k, d\)",
        ),
        ((two, two, of_two[:, :3]), ValueError, "t: got 3 features, expected 4, as many as x"),
        ((two, two[:, :3], of_two), ValueError, "y: got 3 features, expected 4, as many as x"),
        ((two, two, of_two.to("meta")), ValueError, "t: on meta, expected cpu"),
        ((two, two.to("meta"), of_two), ValueError, "y: on meta, expected cpu"),
        ((two, two, of_two, -0.1), ValueError, "alpha: got -0.1, expected a finite number >= 0"),
        ((two, two, of_two, 1, float("nan")), ValueError, "beta: got nan, expected a finite"),
        ((two, None, of_two), ValueError, "y, phi_y: got both or neither, expected one"),
        (
            (two, two, of_two, 1, 1, torch.ones(5, 2)),
            ValueError,
            "y, phi_y: got both or neither, expected one",
        ),
        (
            (two, None, of_two, 1, 1, torch.ones(4, 2)),
            ValueError,
            r"phi_y: got shape \(4, 2\), expected \(5, 2\)",
        ),
        ((two, two, Frequencies(0, 1)), ValueError, "t.count: got 0, expected 1 to 4294967295"),
        ((two, two, Frequencies(1.5, 1)), TypeError, "t.count: got 1.5, expected an integer"),
        ((two, two, Frequencies(2, -1)), ValueError, "t.seed: got -1, expected 0 to"),
        ((two, two, Frequencies(2, 2**63)), ValueError, "t.seed: got 9223372036854775808"),
        (
            (three, three, Frequencies(2, 1, 1.0, 2**32 - 1)),
            ValueError,
            "t.stream: got 4294967295, expected 0 to 4294967294",
        ),
        (
            (two, two, Frequencies(2, 1, float("inf"))),
            ValueError,
            "t.scale: got inf, expected a finite number",
        ),
    ],
)
def test_bad_input_is_named(arguments, kind, message):
    for f in (
        losses.characteristic_function_distance,
        losses.characteristic_function_distance_and_gradient,
    ):
        with pytest.raises(kind, match=message):
            f(*arguments)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_gradient_of_a_gradient_is_refused(backend, compiled, given):
    """A bilevel use, with weights in between, whole steps compiled or not."""
    x, y, net = draw(3, 4), draw(5, 4, seed=1), draw(4, 4, seed=2).requires_grad_()
    t = draw(6, 4, seed=3) if given else Frequencies(6, 1)

    def outer(x, y, net):
        features = torch.tanh(x @ net), torch.tanh(y @ net)
        value = losses.characteristic_function_distance(*features, t)
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
        pytest.raises(Exception, match="a second derivative is not supported"),
    ):
        torch.autograd.grad(outer(x, y, net), net)


def test_transforms_and_forward_mode_are_refused():
    with pytest.raises(NotImplementedError, match="do not run under torch"):
        torch.func.grad(lambda x: losses.characteristic_function(x, of_two).sum())(two)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        dual = torch.autograd.forward_ad.make_dual(two, two)
        losses.characteristic_function(dual, of_two)


def test_the_reference_takes_frequencies_as_they_are():
    x, t = draw(2, 3, 4), draw(1, 5, 4, seed=1)
    phi, phase = reference.characteristic_function(x, t, keep=True)
    torch.testing.assert_close(phase, x @ t.mT)
    torch.testing.assert_close(phi, run(x, t, draw(2, 5, 2))[0])
