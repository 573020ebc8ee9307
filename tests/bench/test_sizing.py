"""What the sized cases are made with: shares of a size, derivatives, an error in norm."""

from __future__ import annotations

import pytest
import torch

from ddfast.bench import SIZES, registry
from ddfast.benchmarks import sizing

CIFAR = SIZES["cifar10"]


def options(**settings):
    return registry.Options(**{"memory": 1 << 30} | settings)


def test_wanted():
    assert list(sizing.wanted(options(), *sizing.ORDERS)) == list(sizing.ORDERS)
    assert list(sizing.wanted(options(modes=("double", "iteration")), "forward", "double")) == [
        "double"
    ]


def test_share_by_memory():
    few, note = sizing.share(CIFAR, options(memory=300), memory=100)
    assert (few.classes, few.batch_real, note) == (3, 256, "3 of 10 classes")
    few, note = sizing.share(CIFAR, options(memory=50), memory=100)
    assert (few.classes, few.batch_real) == (1, 128)
    assert note == "1 of 10 classes, 128 of 256 real images a class"


def test_share_by_time():
    whole, note = sizing.share(
        CIFAR, options(), memory=1, operations=sizing.OPERATIONS["cpu"] / 1e6
    )
    assert (whole, note) == (CIFAR, "")
    operations = sizing.SECONDS * sizing.OPERATIONS["cpu"] / 4  # of which four fit
    few, _ = sizing.share(CIFAR, options(), memory=1000, operations=operations)
    assert few.classes == 4
    few, _ = sizing.share(CIFAR, options(), memory=1000, operations=operations, seconds=0.5)
    assert few.classes == 2
    few, _ = sizing.share(CIFAR, options(quick=True), memory=1000, operations=operations)
    assert few.classes == 1
    moved = sizing.SECONDS * sizing.BYTES["cpu"] / 3
    few, _ = sizing.share(CIFAR, options(), memory=1000, moved=moved)
    assert few.classes == 3


def test_several_classes_keeps_some():
    one = sizing.SECONDS * sizing.OPERATIONS["cpu"] / 64  # of which 64 fit
    few, note = sizing.several_classes(CIFAR, options(), memory=1, operations=one)
    assert (few.classes, few.batch_real, few.ipc) == (4, 16, 2)
    assert note == "4 of 10 classes, 16 of 256 real images a class, 2 of 10 images per class"
    few, _ = sizing.several_classes(CIFAR, options(memory=8), memory=1, operations=one)
    assert (few.classes, few.batch_real, few.ipc) == (4, 2, 1)
    few, _ = sizing.several_classes(CIFAR, options(memory=1), memory=1, operations=one)
    assert (few.classes, few.batch_real, few.ipc) == (4, 1, 1)
    whole, note = sizing.several_classes(CIFAR, options(), memory=1, operations=one / 1e6)
    assert (whole, note) == (CIFAR, "")


def test_operations_of_image():
    # 3 to 128 channels at 32x32, 128 to 128 at 16x16 and 8x8, nine products and sums each.
    expected = 18 * (3 * 128 * 32**2 + 128 * 128 * (16**2 + 8**2))
    assert sizing.operations_of_image(CIFAR) == expected


def test_work_of_each_order():
    x, directions = torch.tensor([1.0, -2.0]), [torch.tensor([3.0, 5.0])]

    def f(x):
        return (x**3).sum()

    assert sizing.work(f, [x], "forward")() == [f(x)]
    value, gradient = sizing.work(f, [x], "backward")()
    assert value == f(x) and not value.requires_grad
    assert torch.equal(gradient, 3 * x**2)
    first, second = sizing.work(f, [x], "double", directions=directions)()
    assert torch.equal(first, 3 * x**2)
    assert torch.equal(second, 6 * x * directions[0])
    assert not x.requires_grad


def test_work_of_a_linear_function():
    matrix, x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2)
    directions = [torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])]
    double = sizing.work(lambda x: matrix @ x, [x], "double", linear=True, directions=directions)
    first, second = double()
    cotangent = sizing.drawn((4, 2), 7)
    torch.testing.assert_close(first, matrix.T @ cotangent)
    torch.testing.assert_close(second, matrix @ directions[0])


def test_work_is_the_same_for_every_dtype():
    x = torch.ones(2, 3)

    def f(x):
        return x.sin(), x.cos().sum(1)

    narrow, wide = (sizing.work(f, [t], "double")() for t in (x, x.double()))
    for ours, exact in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_compiles():
    assert sizing.compiles(options(), "forward") and sizing.compiles(options(), "backward")
    assert not sizing.compiles(options(), "double")
    assert not sizing.compiles(options(quick=True), "forward")
    assert not sizing.compiles(options(no_compile=True), "forward")


def test_norm_error():
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([100.0])]
    result = [torch.tensor([3.0, 4.5]), torch.tensor([101.0])]
    assert sizing.norm_error(result, exact) == pytest.approx(0.1)
    assert sizing.norm_error(exact, exact) == 0
    assert sizing.norm_error([torch.tensor([1e-3])], [torch.zeros(1)]) == pytest.approx(1e-3)
