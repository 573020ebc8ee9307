"""What `augment` takes: shapes, dtypes, layouts, empty batches, and the errors for the rest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddfast
from ddfast.ops.augment import augment, augment_adjoint
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "auto"]
COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE = range(6)
#: One row of each operation, for images of 9 x 7 or more.
ROWS = [
    (COLOR, 0.3, 1.4, 0.8),
    (CROP, 1, -1, 0),
    (CUTOUT, 0, 0, 0.5),
    (FLIP, 1, 0, 0),
    (SCALE, 1.2, 1 / 1.2, 0),
    (ROTATE, math.radians(15), 0, 0),
]


def images(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def record(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def both(x, rows, align_corners=False):
    """The operator, its linear part and its adjoint."""
    return [
        augment(x, rows, align_corners, True),
        augment(x, rows, align_corners, False),
        augment_adjoint(x, rows, align_corners),
    ]


parameter_rows = st.one_of(
    st.tuples(st.just(COLOR), *[st.floats(-2, 2)] * 3),
    st.tuples(st.just(CROP), *[st.integers(-45, 45)] * 2, st.just(0)),
    st.tuples(st.just(CUTOUT), *[st.integers(0, 40)] * 2, st.floats(0, 2)),
    st.tuples(st.just(FLIP), st.integers(0, 1), st.just(0), st.just(0)),
    st.tuples(st.just(SCALE), *[st.floats(0.3, 4)] * 2, st.just(0)),
    st.tuples(st.just(ROTATE), st.floats(-4, 4), st.just(0), st.just(0)),
)


@given(
    shape=st.tuples(st.integers(0, 7), st.integers(0, 4), st.integers(1, 40), st.integers(1, 40)),
    rows=st.lists(parameter_rows, min_size=7, max_size=7),
    siamese=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    align_corners=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_dtype_matches_the_reference(
    shape, rows, siamese, dtype, align_corners, seed
):
    x = images(shape, seed, dtype)
    rows = record(*rows)[: 1 if siamese else shape[0]]
    with unchanged(x, rows):
        ours = both(x, rows, align_corners)
    with ddfast.use_backend("reference"):
        eager = both(x, rows, align_corners)
        exact = both(x.double(), rows, align_corners)
    assert_within_budget(ours, eager, exact, tiny=32)
    assert all(t.dtype == dtype and t.shape == x.shape and t.is_contiguous() for t in ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty_batches(backend, shape):
    x = torch.zeros(shape, requires_grad=True)
    for row in ROWS:
        for rows in (record(row), record(row).expand(shape[0], 4)):
            with ddfast.use_backend(backend):
                y = augment(x, rows, False, True)
                (gradient,) = torch.autograd.grad(y.sum(), x)
            assert y.shape == gradient.shape == shape and y is not x


def test_layouts():
    base = images((6, 6, 10, 10), dtype=torch.float32)
    views = {
        "transposed": base.transpose(2, 3),
        "batch and channels swapped": base.transpose(0, 1),
        "expanded": base[:1].expand(6, 6, 10, 10),
        "sliced": base[::2, 1:4, 1::3, 2:9],
        "channels_last": base.contiguous(memory_format=torch.channels_last),
    }
    for x in views.values():
        for row in ROWS:
            strided = record(row, row).T.contiguous().T[:1]
            with unchanged(base):
                ours = both(x, strided)
            assert_same_bits(ours, both(x.contiguous(), record(row)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "row",
    [
        (6, 0, 0, 0),
        (-1, 0, 0, 0),
        (0.5, 0, 0, 0),
        (float("nan"), 0, 0, 0),
        (COLOR, float("inf"), 1, 1),
        (COLOR, 0, float("nan"), 1),
        (CROP, 0.5, 0, 0),
        (CUTOUT, 0, 1.5, 0.5),
        (CUTOUT, 0, 0, -0.5),
        (FLIP, 2, 0, 0),
        (SCALE, 0, 1, 0),
        (SCALE, 1, -1, 0),
        (SCALE, 1, 1e10, 0),
        (ROTATE, float("-inf"), 0, 0),
    ],
)
def test_rows_out_of_range_are_named(backend, row):
    x = torch.zeros(3, 1, 4, 4)
    rows = record(ROWS[0], ROWS[1], row)
    for f in (lambda: augment(x, rows, False, True), lambda: augment_adjoint(x, rows, False)):
        with ddfast.use_backend(backend), pytest.raises(ValueError, match=r"record\[2\]: got \["):
            f()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "rows", "message"),
    [
        (torch.zeros(3, 4, 4), record(ROWS[0]), "x: got .* expected floating point images"),
        (torch.zeros(1, 3, 4, 4).int(), record(ROWS[0]), r"x: got torch\.int32"),
        (torch.zeros(1).expand(1, 1, 50_000, 50_000), record(ROWS[0]), "x: got images of 50000 x"),
        (torch.zeros(3, 1, 4, 4), record(ROWS[0], ROWS[0]), "got 2 rows, expected 1 or 3"),
        (torch.zeros(3, 1, 4, 4), record(ROWS[0])[:0], "got 0 rows"),
        (torch.zeros(3, 1, 4, 4), record(ROWS[0]).float(), "expected float64"),
        (torch.zeros(3, 1, 4, 4), record(ROWS[0])[0], "expected float64"),
        (torch.zeros(3, 1, 4, 4), record(ROWS[0])[:, :3], "expected float64"),
    ],
)
def test_wrong_tensors_are_named(backend, x, rows, message):
    for f in (lambda: augment(x, rows, False, True), lambda: augment_adjoint(x, rows, False)):
        with ddfast.use_backend(backend), pytest.raises(ValueError, match=message):
            f()
