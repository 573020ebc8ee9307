"""Gates of the Triton kernels of `multi_formation`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddfast.ops import multi_formation as ops
from ddfast.reference import multi_formation as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import multi_formation

    return multi_formation


def both(module, x, g, factor, order):
    return [
        module.multi_formation(x, factor, order, 0.5),
        module.multi_formation_adjoint(g, factor, order),
    ]


def check(kernels, device, shape, factor, dtype, order):
    x = poisoned(shape, dtype, device)
    g = poisoned((shape[0] * factor**2, *shape[1:]), dtype, device)
    with unchanged(x, g):
        ours = both(kernels, x, g, factor, order)
    eager = both(reference, x, g, factor, order)
    assert_within_budget(ours, eager, both(reference, x.double(), g.double(), factor, order))
    assert_same_bits(ours, both(kernels, x, g, factor, order))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "factor"), [((2, 1, 7, 5), 3), ((1, 2, 8, 8), 2)])
def test_error_budget(kernels, triton_device, shape, factor, dtype):
    check(kernels, triton_device, shape, factor, dtype, "crop")


@pytest.mark.parametrize(
    ("shape", "factor"), [((2, 2, 7, 5), 2), ((2, 1, 1, 1), 2), ((1, 1, 5, 6), 4)]
)
def test_crops_of_an_image_side_by_side(kernels, triton_device, shape, factor):
    check(kernels, triton_device, shape, factor, torch.float32, "image")


@pytest.mark.parametrize("shape", [(1, 1, 17, 65), (1, 1, 3, 130), (1, 1, 33, 2)])
def test_several_tiles(kernels, triton_device, shape):
    check(kernels, triton_device, shape, 2, torch.float32, "crop")


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 1, 9, 9))),
    factor=st.integers(2, 4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(kernels, triton_device, shape, factor, dtype):
    check(kernels, triton_device, shape, factor, dtype, "image")


def test_wide_images_count_in_64_bits(kernels, triton_device):
    """2 side^2 beyond 32 bits: the last output pixels must still read the last source pixels."""
    width = 65_600
    x = torch.zeros(1, 1, 1, width, device=triton_device)
    x[..., -1] = 1
    found = kernels.multi_formation(x, 2, "image", 0.0)
    expected = reference.multi_formation(x, 2, "image", 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert found.sum() > 1
    constants = kernels._constants(x, "image", 64)
    assert "64" in str(constants["INDEX"])
    assert "32" in str(kernels._constants(x[..., :32], "image", 64)["INDEX"])


def test_infinity_and_nan_stay_with_the_pixels_that_read_them(kernels, triton_device):
    x = poisoned((1, 1, 8, 8), torch.float32, triton_device)
    x[0, 0, 1, 2], x[0, 0, 6, 6] = float("nan"), float("inf")
    g = poisoned((4, 1, 8, 8), torch.float32, triton_device)
    g[0, 0, 3, 3] = float("nan")
    for ours, wanted in zip(
        both(kernels, x, g, 2, "crop"), both(reference, x, g, 2, "crop"), strict=True
    ):
        assert torch.equal(ours.isnan(), wanted.isnan()) and ours.isnan().any()
        assert torch.equal(ours.isinf(), wanted.isinf())


def test_layouts_and_empty_sets(kernels, triton_device):
    x = poisoned((4, 2, 6, 5), torch.float32, triton_device)
    strided = x.transpose(2, 3)
    ours = both(kernels, strided, strided, 2, "image")
    assert_same_bits(ours, both(kernels, *[strided.contiguous()] * 2, 2, "image"))
    for shape in ((0, 3, 8, 8), (4, 0, 8, 8)):
        x = torch.empty(shape, device=triton_device)
        forth, back = both(kernels, x, x, 2, "crop")
        assert forth.shape == (4 * shape[0], *shape[1:])
        assert back.shape == (shape[0] // 4, *shape[1:])


def test_the_cuda_key_answers_with_these_kernels(kernels, triton_device):
    x = poisoned((4, 1, 6, 5), torch.float32, triton_device)
    forth, back = both(kernels, x, x, 2, "crop")
    assert_same_bits(ops._cuda(kernels, x, 2, "crop", 0.5), forth)
    assert_same_bits(ops._adjoint_cuda(kernels, x, 2, "crop"), back)
    assert_same_bits(ops._cuda(kernels, x, 1, "crop", 0.5), x)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("multi_formation", capability)
    assert {k["name"] for k in kernels} == {"form_kernel", "adjoint_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
