"""Inputs and errors of `gradient_distance`."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.reference import gradient_distance as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    unchanged,
)

METRICS = reference.METRICS
SHAPES = [(3, 4, 5), (3,), (4, 7), (2, 3, 3, 3)]


def draw(shapes, seed=0, dtype=torch.float64, classes=None, scale=1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if classes is None else (classes,)
    return [
        (torch.randn((*lead, *s), generator=generator, dtype=torch.float64) * scale).to(dtype)
        for s in shapes
    ]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


# --- inputs -----------------------------------------------------------------------------------

dimensions = st.integers(1, 9)
shapes = st.lists(
    st.one_of(
        st.tuples(dimensions),
        st.tuples(dimensions, dimensions),
        st.tuples(dimensions, st.integers(1, 70)),
        st.tuples(dimensions, dimensions, st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=4,
)


@given(
    shapes=shapes,
    classes=st.one_of(st.none(), st.integers(1, 4)),
    dtypes=st.tuples(*[st.sampled_from(losses.FLOATS)] * 2),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_any_shapes_and_dtypes_match_the_reference(shapes, classes, dtypes, metric, seed):
    syn = draw(shapes, seed, dtypes[0], classes)
    real = draw(shapes, seed + 1, dtypes[1], classes)
    batched = classes is not None
    with unchanged(syn, real):
        ours = losses.gradient_distance_and_gradient(syn, real, metric, batched=batched)
    with ddfast.use_backend("reference"):
        eager = losses.gradient_distance_and_gradient(syn, real, metric, batched=batched)
        exact = losses.gradient_distance_and_gradient(
            [t.double() for t in syn], [t.double() for t in real], metric, batched=batched
        )
    assert_within_budget(ours, eager, exact, tiny=16)
    common = torch.promote_types(*dtypes)
    assert all(g.dtype == common for g in ours[1])
    assert ours[0].dtype == (torch.float64 if common == torch.float64 else torch.float32)


def test_layouts():
    base_s, base_r = draw([(6, 8, 10)])[0], draw([(6, 8, 10)], 1)[0]
    views = {
        "transposed": lambda t: t.transpose(0, 2),
        "expanded": lambda t: t[:, :1].expand(6, 8, 10),
        "sliced": lambda t: t[::2, 1:7:3],
        "channels_last": lambda t: t.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    }
    for (name, left), (_, right) in itertools.product(views.items(), views.items()):
        syn, real = left(base_s), right(base_r)
        if syn.shape != real.shape:
            continue
        for metric in METRICS:
            with unchanged(base_s, base_r):
                ours = losses.gradient_distance_and_gradient([syn], [real], metric)
            dense = losses.gradient_distance_and_gradient(
                [syn.contiguous()], [real.contiguous()], metric
            )
            assert_same_bits(ours, dense), name


@pytest.mark.parametrize("metric", METRICS)
def test_empty_tensors_and_single_elements(metric):
    shapes = [(0, 3), (2, 0), (1, 1), (0,)]
    syn, real = draw(shapes), draw(shapes, 1)
    ours = losses.gradient_distance_and_gradient(syn, real, metric)
    with ddfast.use_backend("reference"):
        exact = losses.gradient_distance_and_gradient(syn, real, metric)
    torch.testing.assert_close(ours, exact)
    none = losses.gradient_distance(
        draw([(2, 3)], classes=0), draw([(2, 3)], classes=0), batched=True
    )
    assert none.shape == (0,)


@pytest.mark.parametrize("shared", [True, False])
def test_expanded_and_shared_inputs_are_not_written(shared):
    t = leaves(draw([(3, 4)]))[0]
    other = t if shared else draw([(3, 4)], 1)[0]
    with unchanged(t, other):
        losses.gradient_distance([t], [other]).backward()
    if shared:  # the distance of a tensor to itself only feels epsilon
        assert t.grad.abs().max() < 1e-5


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.ones(2), [torch.ones(2)]), TypeError, "syn: got Tensor"),
        (([torch.ones(2)], [1.0]), TypeError, r"real\[0\]: got float"),
        (([torch.ones(2).int()], [torch.ones(2)]), TypeError, r"syn\[0\]: got torch.int32"),
        (([], []), ValueError, "syn: got an empty sequence"),
        (([torch.ones(2)], []), ValueError, "real: got 0 tensors, expected 1"),
        (([torch.ones(2)], [torch.ones(3)]), ValueError, r"real\[0\]: got shape \(3,\)"),
        (([torch.ones(2)], [torch.ones(2)], "cos"), ValueError, "metric: got 'cos'"),
        (([torch.ones(2)], [torch.ones(2)], "mse", -1.0), ValueError, "eps: got -1.0"),
        (([torch.ones(2)], [torch.ones(2)], "mse", float("nan")), ValueError, "eps: got nan"),
        (([torch.ones(2)], [torch.ones(2, device="meta")]), ValueError, "expected cpu"),
        (
            ([torch.ones(2, 2), torch.ones(3, 2)],) * 2 + ("mse", 1e-6, True),
            ValueError,
            r"syn\[1\]: got shape \(3, 2\), expected a leading class dimension of 2",
        ),
    ],
)
def test_bad_input_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        losses.gradient_distance(*arguments)
