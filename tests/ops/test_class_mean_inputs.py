"""Inputs and errors of `class_mean` and `class_mean_distance`."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import class_mean as ops
from ddfast.reference import class_mean as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
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


def everything(syn, real, syn_counts, real_counts):
    """Means, distance and difference through the operators, as one flat list."""
    means = ops.class_mean(syn, syn_counts)
    return [means, *ops.class_mean_distance(syn, real, syn_counts, real_counts)]


# --- inputs -------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 130]))


@given(
    classes=st.integers(1, 5),
    width=st.integers(1, 70),
    ragged=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    data=st.data(),
)
def test_any_shapes_and_dtypes_match_the_reference(classes, width, ragged, dtypes, data):
    tensors, counts = [], []
    for i, (uneven, dtype) in enumerate(zip(ragged, dtypes, strict=True)):
        if uneven:
            counts.append(data.draw(st.lists(sizes, min_size=classes, max_size=classes)))
            shape = (sum(counts[-1]), width)
        else:
            counts.append(None)
            shape = (classes, data.draw(sizes), width)
        # Means of opposite sign: where they cancel, rounding alone decides and no budget holds.
        tensors.append(draw(*shape, seed=i, dtype=dtype, mean=2 - 4 * i).requires_grad_())
    wide = [x.detach().double().requires_grad_() for x in tensors]

    def run(inputs):
        value = losses.class_mean_distance(*inputs, *counts)
        return [value, *torch.autograd.grad(value.sum(), inputs)]

    with unchanged(tensors):
        ours = run(tensors)
    with ddfast.use_backend("reference"):
        eager, exact = run(tensors), run(wide)
    assert_within_budget(ours, eager, exact, tiny=16)
    assert [g.dtype for g in ours[1:]] == list(dtypes)


VIEWS = {
    "transposed": lambda t: t.transpose(0, 2),
    "classes inside": lambda t: t.transpose(0, 1),
    "rows expanded": lambda t: t[:, :1].expand(8, 9, 10),
    "all expanded": lambda t: t[:1, :1, :1].expand(8, 9, 10),
    "sliced": lambda t: t[::2, 1:7:3, 2:],
    "columns skipped": lambda t: t[:, :, ::2],
    "one column": lambda t: t[:, :, 3:4],
    "flipped": lambda t: t.flip(2),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(view, dtype):
    base = draw(8, 9, 10, dtype=dtype)
    x = VIEWS[view](base)
    flat = x.transpose(0, 1).flatten(0, 1) if view == "sliced" else x[:, 0]
    rows = [1] * (len(flat) - 1) + [1]
    with unchanged(base):
        ours = everything(x, x + 1, [], [])
        two = everything(flat, flat + 1, rows, rows)
    assert_same_bits(ours, everything(x.contiguous(), (x + 1).contiguous(), [], []))
    assert_same_bits(two, everything(flat.contiguous(), (flat + 1).contiguous(), rows, rows))


def test_strided_rows_are_read_in_place(monkeypatch):
    """Only columns that do not lie side by side cost a copy."""
    seen = []
    original = ddfast.backend.compiled.class_mean
    monkeypatch.setattr(
        ddfast.backend.compiled, "class_mean", lambda *a: (seen.append(a[0][0]), original(*a))
    )
    base = draw(8, 9, 10)
    for view, copied in (("classes inside", False), ("rows expanded", False), ("transposed", True)):
        x = VIEWS[view](base)
        losses.class_mean(x)
        assert (seen[-1] != x.data_ptr()) == copied, view


def test_offsets_beyond_32_bits():
    """Rows that lie three gigabytes apart in memory that nothing else touches."""
    stride, width = 1_500_000_000, 40
    flat = torch.empty(2 * stride + width, dtype=torch.bfloat16)
    x = flat.as_strided((1, 3, width), (0, stride, 1))
    values = draw(1, 3, width, dtype=torch.bfloat16)
    x.copy_(values)
    assert_same_bits(losses.class_mean(x), losses.class_mean(values))
    classes = x.transpose(0, 1)
    assert_same_bits(losses.class_mean(classes), values[0].float())


def test_a_thousand_classes():
    counts = [1 + i % 7 for i in range(1000)]
    x = draw(sum(counts), 3).requires_grad_()
    means = losses.class_mean(x, counts)
    torch.testing.assert_close(means, reference.class_mean(x, counts), rtol=1e-14, atol=1e-15)
    (gradient,) = torch.autograd.grad(means.sum(), x)
    expected = torch.cat([torch.full((n, 3), 1 / n, dtype=torch.float64) for n in counts])
    torch.testing.assert_close(gradient, expected)


def test_one_row_one_class_and_nothing_at_all():
    one = draw(1, 7)
    assert_same_bits(losses.class_mean(one, [1]), one)
    assert_same_bits(
        losses.class_mean_distance(one, one.view(1, 1, 7), [1]), torch.zeros(1).double()
    )
    for counts, shape in (([2, 1], (3, 0)), (None, (2, 3, 0)), ([], (0, 4)), (None, (0, 3, 4))):
        x = draw(*shape).requires_grad_()
        value = losses.class_mean_distance(x, x, counts, counts)
        assert torch.equal(value, torch.zeros(0 if 4 in shape else 2, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert gradient.shape == x.shape and losses.class_mean(x, counts).shape[1] == shape[-1]


def test_a_set_against_itself_is_not_written():
    x = features("ragged", 0).requires_grad_()
    with unchanged(x):
        value = losses.class_mean_distance(x, x, RAGGED, RAGGED)
        value.sum().backward()
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_numpy_counts_and_tuples():
    numpy = pytest.importorskip("numpy")
    x = features("ragged", 0)
    for counts in (tuple(RAGGED), numpy.array(RAGGED)):
        assert_same_bits(losses.class_mean(x, counts), losses.class_mean(x, RAGGED))


# --- errors -------------------------------------------------------------------------------------

two, three = torch.ones(3, 2), torch.ones(2, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], three), TypeError, "syn: got list, expected a tensor"),
        ((three, three.int()), TypeError, "real: got torch.int32, expected a floating dtype"),
        ((three, three.to(torch.complex64)), TypeError, "real: got torch.complex64"),
        ((torch.ones(3), three), ValueError, r"syn: got shape \(3,\), expected \(classes, n, d\)"),
        ((three, torch.ones(1, 1, 1, 1)), ValueError, r"real: got shape \(1, 1, 1, 1\)"),
        ((two, three), ValueError, "syn_counts: got None, expected the rows of each class"),
        ((three, three, [3, 3]), ValueError, "syn_counts: given, expected None"),
        ((two, three, [1, 1]), ValueError, "syn_counts: add up to 2, expected 3, the rows of syn"),
        (
            (three, two, None, [3, 0]),
            ValueError,
            r"real_counts\[1\]: got 0, expected a row or more",
        ),
        ((three, two, None, [4, -1]), ValueError, r"real_counts\[1\]: got -1"),
        ((two, three, [1.5, 1.5]), TypeError, r"syn_counts: got \[1.5, 1.5\], expected a sequence"),
        ((two, three, 3), TypeError, "syn_counts: got 3, expected a sequence of integers"),
        ((torch.ones(2, 0, 2), three), ValueError, r"syn: got shape \(2, 0, 2\), expected a row"),
        ((three, two, None, [3]), ValueError, "real: got 1 classes, expected 2, those of syn"),
        ((three, torch.ones(2, 3, 4)), ValueError, "real: got 4 features per row, expected 2"),
        ((three, torch.ones(2, 3, 2, device="meta")), ValueError, "real: on meta, expected cpu"),
    ],
)
def test_bad_input_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        losses.class_mean_distance(*arguments)


def test_bad_input_of_the_mean_is_named():
    with pytest.raises(ValueError, match="counts: add up to 2, expected 3, the rows of x"):
        losses.class_mean(two, [2])
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        losses.class_mean(torch.ones(2, 2, 2, dtype=torch.int64))
