"""Inputs and errors of `class_conv`, `class_input_grad` and `class_weight_grad`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ddfast
from ddfast.ops import class_weight_grad as ops
from ddfast.reference import class_weight_grad as reference
from ddfast.testing import assert_same_bits, assert_within_budget, poisoned, unchanged

HALVES = [torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def everything(x, weight, grad, counts, padding, algorithm="auto"):
    """The three products."""
    return [
        ops.class_conv(x, weight, counts, padding, algorithm),
        ops.class_input_grad(grad, weight, counts, x.shape[2:], padding, algorithm),
        ops.class_weight_grad(x, grad, counts, weight.shape[3:], padding, algorithm),
    ]


def check(x, weight, grad, counts, padding, algorithm="auto"):
    """Ours against the reference, in float64 and in the same dtype, without writing to inputs."""
    with unchanged(x, weight, grad):
        ours = everything(x, weight, grad, counts, padding, algorithm)
    with ddfast.use_backend("reference"):
        eager = everything(x, weight, grad, counts, padding)
        exact = everything(*(t.double() for t in (x, weight, grad)), counts, padding)
    tiny = 64 if x.dtype == torch.float64 else 40 if algorithm == "winograd" else 8
    assert_within_budget(ours, eager, exact, tiny=tiny)
    assert [a.stride() for a in ours] == [a.stride() for a in eager]


# --- inputs -------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.tuples(st.sampled_from([1, 2, 3, 5, 7]), st.sampled_from([1, 2, 3, 5, 7])),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    last=st.booleans(),
)
def test_any_shape_matches_the_reference(counts, channels, size, kernel, padding, dtype, last):
    planes = [n + 2 * padding - k + 1 for n, k in zip(size, kernel, strict=True)]
    assume(min(planes) > 0)
    x = poisoned((sum(counts), channels[0], *size), dtype, "cpu")
    weight = poisoned((len(counts), channels[1], channels[0], *kernel), dtype, "cpu")
    grad = poisoned((sum(counts), channels[1], *planes), dtype, "cpu")
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    check(x, weight, grad, counts, padding, "direct")


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    tiles=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    last=st.booleans(),
)
def test_any_shape_of_winograd(counts, channels, tiles, last):
    size = [4 * n for n in tiles]
    x = draw(sum(counts), channels[0], *size, seed=1)
    weight = draw(len(counts), channels[1], channels[0], 3, 3, seed=2)
    grad = draw(sum(counts), channels[1], *size, seed=3)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    check(x, weight, grad, counts, 1, "winograd")


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    widths=st.tuples(st.integers(1, 300), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_linear_layer(counts, widths, dtype):
    n = sum(counts)
    x, grad = (poisoned((n, width), dtype, "cpu") for width in widths)
    check(x, poisoned((len(counts), widths[1], widths[0]), dtype, "cpu"), grad, counts, 0)


VIEWS = {
    "transposed planes": lambda t: t.transpose(-1, -2),
    "images in the last dimension": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:, :, :1, :1].expand_as(t),
    "one image": lambda t: t[:1].expand_as(t),
    "sliced": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "cut": lambda t: torch.nn.functional.pad(t, (2, 3, 1, 1))[..., 1:-1, 2:-3],
    "flipped": lambda t: t.flip(2),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_layouts(view, algorithm):
    counts = [2, 1]
    x, grad = (VIEWS[view](draw(3, c, 8, 8, seed=c)) for c in (18, 20))
    weight = VIEWS["transposed planes"](draw(2, 20, 18, 3, 3))
    with unchanged(x, weight, grad):
        ours = everything(x, weight, grad, counts, 1, algorithm)
    dense = (t.contiguous() for t in (x, weight, grad))
    assert_same_bits(ours, everything(*dense, counts, 1, algorithm))


def test_memory_formats():
    counts, last = [1, 1], torch.channels_last
    x, weight, grad = draw(2, 3, 5, 6), draw(2, 4, 3, 3, 3), draw(2, 4, 5, 6)
    for backend in ("reference", "auto"):
        with ddfast.use_backend(backend):
            plain = everything(x, weight, grad, counts, 1)
            ours = everything(
                x.to(memory_format=last), weight, grad.to(memory_format=last), counts, 1
            )
        assert all(t.is_contiguous() for t in plain) and ours[2].is_contiguous()
        assert all(t.is_contiguous(memory_format=last) for t in ours[:2])
        dense = [t.contiguous() for t in ours]
        torch.testing.assert_close(plain, dense, rtol=1e-5, atol=1e-5)
    assert_same_bits(plain, dense)  # of the compiled kernels


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_summed_in_float32(dtype):
    counts = [3, 1]
    tensors = draw(4, 18, 8, 8, dtype=dtype), draw(2, 20, 18, 3, 3, dtype=dtype)
    grad = draw(4, 20, 8, 8, seed=1, dtype=dtype)
    ours = everything(*tensors, grad, counts, 1)
    with ddfast.use_backend("reference"):
        wide = everything(*(t.double() for t in (*tensors, grad)), counts, 1)
    for found, exact in zip(ours, wide, strict=True):
        assert found.dtype == dtype
        units = torch.finfo(dtype).eps * exact.abs().clamp_min(1)
        assert ((found.double() - exact).abs() <= 0.51 * units).all()


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_empty_classes_and_nothing_at_all(algorithm):
    for counts in ([], [0], [0, 0, 3, 0]):
        x, grad = draw(sum(counts), 17, 4, 4), draw(sum(counts), 20, 4, 4)
        weight = draw(len(counts), 20, 17, 3, 3)
        found = everything(x, weight, grad, counts, 1, algorithm)
        assert [f.shape for f in found] == [grad.shape, x.shape, weight.shape]
        for c, count in enumerate(counts):
            assert bool(found[2][c].abs().sum() > 0) == (count > 0)
    linear = everything(draw(0, 5), draw(2, 3, 5), draw(0, 3), [0, 0], 0)
    assert_same_bits(linear, [torch.zeros(0, 3), torch.zeros(0, 5), torch.zeros(2, 3, 5)])


def test_nothing_is_left_from_earlier_calls():
    """Scratch memory and outputs are reused: what lies there must not be read."""
    x, weight, grad = draw(2, 20, 8, 8), draw(1, 24, 20, 3, 3), draw(2, 24, 8, 8)
    for algorithm in ("direct", "winograd"):
        expected = everything(x, weight, grad, [2], 1, algorithm)
        everything(x * float("nan"), weight, grad * float("nan"), [2], 1, algorithm)
        assert_same_bits(everything(x, weight, grad, [2], 1, algorithm), expected)


def test_nan_stays_with_the_pixels_that_see_it():
    for channels in (3, 20):
        x, weight = draw(2, channels, 9, 9), draw(1, 18, channels, 3, 3)
        x[0, 1, 4, 4] = float("nan")
        out = ops.class_conv(x, weight, [2], 1, "direct")
        seen = torch.zeros(2, 18, 9, 9, dtype=torch.bool)
        seen[0, :, 3:6, 3:6] = True
        assert torch.equal(out.isnan(), seen)


def test_auto_takes_winograd_where_it_was_measured_to_win(monkeypatch):
    seen = []
    compiled = ddfast.backend.compiled
    original = compiled.class_conv
    monkeypatch.setattr(compiled, "class_conv", lambda *a: (seen.append(a[2]), original(*a)))

    def taken(inputs, outputs, side, counts, dtype=torch.float32, kernel=3):
        seen.clear()
        x, grad = (draw(sum(counts), c, side, side, dtype=dtype) for c in (inputs, outputs))
        weight = draw(len(counts), outputs, inputs, kernel, kernel, dtype=dtype)
        everything(x, weight, grad, counts, kernel // 2)
        return seen.copy()

    assert taken(32, 16, 8, [2, 0, 2]) == [True, True, True]
    assert taken(32, 16, 8, [1, 0, 2]) == [False, False, True]  # 6 tiles a class
    assert taken(32, 16, 4, [15]) == [False, False, True]
    assert taken(32, 16, 4, [16]) == [True, True, True]
    for plain in (
        taken(15, 32, 8, [9]),
        taken(32, 3, 8, [9]),
        taken(32, 32, 6, [9]),
        taken(32, 32, 8, [9], dtype=torch.float64),
        taken(16, 16, 8, [9], kernel=5),
    ):
        assert plain == [False] * 3


# --- errors -------------------------------------------------------------------------------------

x, weight, grad = draw(3, 2, 4, 4), draw(2, 5, 2, 3, 3), draw(3, 5, 4, 4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("operator", "arguments", "kind", "message"),
    [
        ("conv", (x.int(), weight, [1, 2], 1, "auto"), TypeError, "x: got torch.int32"),
        ("conv", (x, weight.double(), [1, 2], 1, "auto"), TypeError, "weight: got torch.float64"),
        ("conv", (x[0], weight, [1, 2], 1, "auto"), ValueError, r"x: got shape \(2, 4, 4\)"),
        ("conv", (x, weight[0], [1, 2], 1, "auto"), ValueError, r"weight: got shape \(5, 2, 3, 3"),
        ("conv", (x, weight[..., 0, 0], [1, 2], 1, "auto"), ValueError, "do not mix"),
        ("conv", (x, weight, [1, 1], 1, "auto"), ValueError, "counts: add up to 2, expected 3"),
        ("conv", (x, weight, [4, -1], 1, "auto"), ValueError, r"counts\[1\]: got -1"),
        ("conv", (x, weight, [3], 1, "auto"), ValueError, "counts: got 1 classes, expected 2"),
        ("conv", (x, weight, [1, 2], -1, "auto"), ValueError, "padding: got -1"),
        ("conv", (x[:, :1], weight, [1, 2], 1, "auto"), ValueError, "weight: takes 2 channels"),
        ("conv", (x[..., :2, :2], weight, [1, 2], 0, "auto"), ValueError, "kernel: .*not fit"),
        ("conv", (x, weight, [1, 2], 1, "fast"), ValueError, "algorithm: got 'fast', expected"),
        ("conv", (x, weight, [1, 2], 0, "winograd"), ValueError, "'winograd' with .*padding 0"),
        ("conv", (x[..., :3], weight, [1, 2], 1, "winograd"), ValueError, r"planes of \(4, 3\)"),
        (
            "input_grad",
            (grad, weight, [1, 2], [5, 4], 1, "auto"),
            ValueError,
            r"grad: got planes of \(4, 4\), expected \(5, 4\)",
        ),
        ("input_grad", (grad, weight, [1, 2], [4], 1, "auto"), ValueError, r"size: got \(4,\)"),
        ("input_grad", (x, weight, [1, 2], [4, 4], 1, "auto"), ValueError, "weight: gives 5"),
        ("weight_grad", (x, grad[:2], [1, 2], [3, 3], 1, "auto"), ValueError, "grad: got 2 images"),
        ("weight_grad", (x, grad, [1, 2], [3], 1, "auto"), ValueError, r"kernel: got \(3,\)"),
        (
            "weight_grad",
            (x, grad, [1, 2], [3, 3], 0, "auto"),
            ValueError,
            r"grad: got planes of \(4, 4\), expected \(2, 2\)",
        ),
        (
            "weight_grad",
            (x[:, :, 0, 0], grad[:, :, 0, 0], [1, 2], [], 1, "auto"),
            ValueError,
            "padding: got 1, expected 0 for a linear layer",
        ),
    ],
)
def test_bad_input_is_named(backend, operator, arguments, kind, message):
    with ddfast.use_backend(backend), pytest.raises(kind, match=message):
        getattr(ops, f"class_{operator}")(*arguments)


def test_the_reference_checks_devices():
    with pytest.raises(ValueError, match="weight: on meta, expected cpu as x"):
        reference.class_conv(x, weight.to("meta"), [1, 2], 1)
