"""Kernel regression block by block: the same as whole matrices, for any blocks."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

from ddfast import losses
from ddfast.engine import kernel_regression as engine
from ddfast.kernel_matrix import kernel_matrix, kernel_options


def smooth(x, y=None):
    """A kernel in plain torch, of images as rows."""
    x = x.flatten(1)
    y = x if y is None else y.flatten(1)
    return torch.exp(-((x[:, None] - y[None]) ** 2).sum(2) / 8) + 0.1


def draw(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def problem(n=5, m=13, columns=3):
    return (
        draw(n, 2, 3, 3),
        draw(n, columns, seed=1),
        draw(m, 2, 3, 3, seed=2),
        draw(m, columns, seed=3),
    )


def blocks(images, targets, size):
    return zip(images.split(size), targets.split(size), strict=True)


@pytest.mark.parametrize("size", [1, 4, 13, 100])
@pytest.mark.parametrize(
    "kernel", [smooth, partial(kernel_matrix, depth=2), partial(kernel_matrix, kind="nngp")]
)
def test_gradients_are_those_of_whole_matrices(kernel, size):
    support, labels, images, targets = problem()
    x, y = support.clone().requires_grad_(), labels.clone().requires_grad_()
    value = losses.krr_loss(kernel(x), kernel(images, x), y, targets, reg=1e-3)
    expected = value, *torch.autograd.grad(value, [x, y])
    found = engine.regression_gradient(
        kernel, support, labels, blocks(images, targets, size), len(images), 1e-3
    )
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)
        assert not ours.requires_grad


def test_gradients_by_differences():
    support, labels, images, targets = problem()
    run = partial(engine.regression_gradient, smooth, reg=1e-2, count=13)
    _, by_support, _ = run(support=support, labels=labels, blocks=blocks(images, targets, 5))
    way, step = draw(*support.shape, seed=4), 1e-5
    ends = [
        run(support=support + s * way, labels=labels, blocks=blocks(images, targets, 5))[0]
        for s in (step, -step)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((by_support * way).sum(), slope, rtol=1e-7, atol=0)


@pytest.mark.parametrize("size", [3, 100])
def test_predictions(size):
    support, labels, images, _ = problem()
    found = engine.predictions(smooth, support, labels, images.split(size), 1e-3)
    expected = losses.krr_predict(smooth(support), smooth(images, support), labels, reg=1e-3)
    torch.testing.assert_close(torch.cat(list(found)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("n", [5, 20])
def test_solved_labels(size, n):
    support, _, images, targets = problem(n)
    expected = losses.label_solve(smooth(support), smooth(images, support), targets, reg=1e-2)
    found = engine.solved_labels(smooth, support, lambda: blocks(images, targets, size), 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_float32_kernels_are_solved_in_float64():
    support, labels, images, targets = problem()
    args = (labels, blocks(images, targets, 4), 13, 1e-3)
    exact = engine.regression_gradient(smooth, support, *args)
    half = blocks(images.float(), targets, 4)
    found = engine.regression_gradient(smooth, support.float(), labels, half, 13, 1e-3)
    assert [x.dtype for x in found] == [torch.float64, torch.float32, torch.float64]
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_near_duplicates_ask_for_a_kernel_in_float64():
    """At reg 1e-6 a float32 kernel of near-duplicates loses what a float64 one keeps."""
    support, labels, images, targets = problem(6, 40)
    support[3:] = support[:3] + 1e-4 * draw(3, 2, 3, 3, seed=5)
    kernel = partial(kernel_matrix, depth=3)

    def gradient(dtype, reg):
        found = engine.regression_gradient(
            kernel, support.to(dtype), labels, blocks(images.to(dtype), targets, 40), 40, reg
        )
        return found[2]

    def away(reg):
        exact = gradient(torch.float64, reg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return (gradient(torch.float32, reg) - exact).norm() / exact.norm()

    assert away(1e-6) > 1e-2 > 1e-3 > away(5e-3)


def test_rows_at_once():
    support = torch.zeros(10, 3, 8, 8)
    few, many = (engine.rows_at_once(support, 10, memory) for memory in (1 << 20, 1 << 24))
    assert 1 <= few < many
    with pytest.raises(ValueError, match="memory: the budget of 100 bytes is too small"):
        engine.rows_at_once(support, 10, 100)


def test_no_targets():
    with pytest.raises(ValueError, match="targets: no block"):
        engine.solved_labels(smooth, problem()[0], lambda: iter(()), 1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ntk-fc3", {"kind": "ntk", "net": "fc", "depth": 3}),
        ("nngp-fc0", {"kind": "nngp", "net": "fc", "depth": 0}),
        (
            "nngp-conv2",
            {"kind": "nngp", "net": "conv", "depth": 2, "pool": True, "readout": "flatten"},
        ),
        (
            "ntk-conv2-gap",
            {"kind": "ntk", "net": "conv", "depth": 2, "pool": True, "readout": "gap"},
        ),
        (
            "ntk-conv2-nopool",
            {"kind": "ntk", "net": "conv", "depth": 2, "pool": False, "readout": "flatten"},
        ),
        ("ntk-kip_convnet", {"kind": "ntk", "net": "kip_convnet"}),
        ("ntk-myrtle5", {"kind": "ntk", "net": "myrtle5"}),
    ],
)
def test_kernels_by_name(name, options):
    assert kernel_options(name) == options
    assert kernel_matrix(draw(2, 1, 8, 8), **options).shape == (2, 2)


@pytest.mark.parametrize(
    "name",
    ["", "fc3", "ntk", "ntk-fc", "ntk-fc3-gap", "nnk-fc3", "ntk-conv0", "ntk-conv3-gap-nopool"],
)
def test_unknown_kernels(name):
    with pytest.raises(ValueError, match=r"expected (KIND-NETWORK|at least 1)"):
        kernel_options(name)


def test_a_kernel_is_a_name():
    with pytest.raises(TypeError, match="kernel: got 3, expected a name"):
        kernel_options(3)
