"""The fused engine against autograd's double backward, in float64, over the ConvNet family."""

from __future__ import annotations

import itertools

import pytest
import torch

from ddfast import engine

NORMS = ("instancenorm", "none", "groupnorm")
ACTIVATIONS = ("relu", "leakyrelu", "sigmoid", "swish")
POOLINGS = ("avgpooling", "maxpooling", "none")
COUNTS = {1: [3], 2: [2, 4], 10: [1, 2, 3, 1, 2, 1, 4, 2, 1, 2]}
BOUND = 1e-10


def compare(tools, net, counts, shape=(3, 8, 8), metric="row_cosine", kind="matrices", **options):
    images, labels = tools.batch(counts, shape)
    everything = engine.weight_names(net, "all")
    found = engine.segment_gradients(net, images, labels, counts, path="fused", **options)
    stored = engine.segment_gradients(
        net, images, labels, counts, path="fused", recompute=False, **options
    )
    for a, b in zip(found, stored, strict=True):
        assert (a - b).abs().max() <= BOUND * b.abs().max().clamp(min=1e-3)
    for name, ours, exact in zip(
        everything,
        found,
        tools.class_loop(net, images, labels, counts, everything),
        strict=True,
    ):
        # A bias before instance normalisation has gradient 0, of which autograd leaves rounding.
        assert (ours - exact).abs().max() <= BOUND * max(exact.abs().max(), 1e-3), name
    names = engine.weight_names(net, kind)
    real = tools.real_gradients(net, names, len(counts))
    losses, gradient = engine.match_gradients(
        net, images, labels, counts, real, names, metric, path="fused", **options
    )
    exact_losses, exact = tools.double_backward(net, images, labels, counts, real, names, metric)
    assert tools.relative(losses, exact_losses) < BOUND
    assert exact.abs().max() > 0
    assert tools.relative(gradient, exact) < BOUND


@pytest.mark.parametrize(
    ("norm", "activation", "pooling"), list(itertools.product(NORMS, ACTIVATIONS, POOLINGS))
)
@pytest.mark.parametrize("classes", COUNTS)
def test_equals_double_backward(engine_tools, norm, activation, pooling, classes) -> None:
    net = engine_tools.make(norm, activation, pooling)
    compare(engine_tools, net, COUNTS[classes])


@pytest.mark.parametrize("metric", ["cosine", "mse", "l1"])
@pytest.mark.parametrize("norm", NORMS)
def test_metrics_that_count_every_parameter(engine_tools, norm, metric) -> None:
    net = engine_tools.make(norm, "swish")
    compare(engine_tools, net, COUNTS[2], metric=metric, kind="all")


@pytest.mark.parametrize("metric", ["mse", "row_cosine"])
def test_convolutions_only(engine_tools, metric) -> None:
    net = engine_tools.make(activation="swish")
    compare(engine_tools, net, COUNTS[2], metric=metric, kind="conv")


@pytest.mark.parametrize(
    ("size", "channels", "depth", "width"),
    [
        ((7, 9), 3, 2, 5),  # odd planes lose their last row or column
        ((28, 28), 1, 3, 4),  # padding 3 in the first convolution
        ((4, 4), 4, 1, 20),
        ((8, 8), 1, 3, 17),  # ends in single pixels
        ((16, 8), 3, 2, 32),
    ],
)
@pytest.mark.parametrize("norm", ["instancenorm", "none"])
def test_sizes(engine_tools, size, channels, depth, width, norm) -> None:
    net = engine_tools.make(norm, "relu", "avgpooling", size, depth, width, channels)
    compare(engine_tools, net, [2, 3], (channels, *size))


@pytest.mark.parametrize("algorithm", ["direct", "auto"])
def test_algorithms(engine_tools, algorithm) -> None:
    net = engine_tools.make(size=(16, 16), width=16)
    compare(engine_tools, net, [2, 3], (3, 16, 16), algorithm=algorithm)


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 5])
def test_chunks_change_nothing_beyond_rounding(engine_tools, images_at_once, monkeypatch) -> None:
    from ddfast.engine import gradients

    net = engine_tools.make()
    outputs, inputs = gradients.recognise(net).elements((3, 8, 8))
    a, b = gradients.FUSED_SECOND
    compare(
        engine_tools,
        net,
        [4, 0, 2, 7, 1],
        memory=int(8 * images_at_once * (a * outputs + b * inputs)) + 1,
    )
    monkeypatch.setattr(gradients, "CACHE", images_at_once * 8 * (outputs + inputs))
    compare(engine_tools, net, [4, 0, 2, 7, 1])


def test_permuting_classes_permutes_results(engine_tools) -> None:
    net = engine_tools.make()
    counts = COUNTS[10]
    images, labels = engine_tools.batch(counts)
    names = engine.weight_names(net)
    real = engine_tools.real_gradients(net, names, 10)
    losses, gradient = engine.match_gradients(net, images, labels, counts, real)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    parts = list(zip(images.split(counts), labels.split(counts), strict=True))
    moved, moved_gradient = engine.match_gradients(
        net,
        torch.cat([parts[c][0] for c in order]),
        torch.cat([parts[c][1] for c in order]),
        [counts[c] for c in order],
        [g[order] for g in real],
    )
    torch.testing.assert_close(moved, losses[order], rtol=1e-12, atol=0)
    expected = torch.cat([gradient.split(counts)[c] for c in order])
    torch.testing.assert_close(moved_gradient, expected, rtol=1e-9, atol=1e-13)
    before = engine.segment_gradients(net, images, labels, counts)
    after = engine.class_gradients(net, images.flip(0), labels.flip(0), 10)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_directional_derivative_by_finite_differences(engine_tools) -> None:
    net = engine_tools.make("instancenorm", "swish")
    counts = [2, 3]
    images, labels = engine_tools.batch(counts)
    names = engine.weight_names(net)
    real = engine_tools.real_gradients(net, names, 2)
    direction, _ = engine_tools.batch(counts, seed=9)

    def loss(x):
        return engine.match_gradients(net, x, labels, counts, real)[0].sum()

    _, gradient = engine.match_gradients(net, images, labels, counts, real)
    step = 1e-5
    slope = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("algorithm", ["direct", "winograd", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_float32_per_image(engine_tools, seed, algorithm) -> None:
    """Median error below 1e-5; few images above 1e-4, those where a ReLU input is almost zero."""
    counts = [10] * 10
    images, labels = engine_tools.batch(counts, (3, 16, 16), seed=seed)
    net = engine_tools.make(size=(16, 16), width=32)
    names = engine.weight_names(net)
    real = engine_tools.class_loop(
        net, *engine_tools.batch(counts, (3, 16, 16), seed=seed + 10), counts, names
    )
    _, exact = engine_tools.double_backward(net, images, labels, counts, real, names)
    _, ours = engine.match_gradients(
        net.float(),
        images.float(),
        labels,
        counts,
        [g.float() for g in real],
        algorithm=algorithm,
        path="fused",
    )
    error = (ours - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.median() < 1e-5
    assert (error > 1e-4).double().mean() <= 0.1


def test_labels_may_differ_inside_a_segment(engine_tools) -> None:
    """DCC: one segment holds all classes."""
    net = engine_tools.make()
    images, labels = engine_tools.batch([2, 3, 4])
    names = engine.weight_names(net)
    real = engine_tools.real_gradients(net, names, 1)
    losses, gradient = engine.match_gradients(net, images, labels, [9], real, path="fused")
    exact_losses, exact = engine_tools.double_backward(net, images, labels, [9], real, names)
    assert engine_tools.relative(losses, exact_losses) < BOUND
    assert engine_tools.relative(gradient, exact) < BOUND


def test_weights_of_images(engine_tools) -> None:
    """With 1 / (classes x images of the class) the joint gradient is the mean of the classes'."""
    net = engine_tools.make()
    counts = [2, 5, 3]
    images, labels = engine_tools.batch(counts)
    share = torch.cat([torch.full((n,), 1 / (3 * n), dtype=torch.float64) for n in counts])
    for path in ("fused", "general"):
        joint = engine.segment_gradients(net, images, labels, [10], weights=share, path=path)
        each = engine.segment_gradients(net, images, labels, counts, path=path)
        for a, b in zip(joint, each, strict=True):
            torch.testing.assert_close(a[0], b.mean(0), rtol=1e-10, atol=1e-14)
