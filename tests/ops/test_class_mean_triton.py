"""Gates of the Triton kernels of `class_mean`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddfast import losses
from ddfast.ops import class_mean as ops
from ddfast.reference import class_mean as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Around the tile of rows and the chunk; the longest class takes two chunks more than the shortest.
COUNTS = [1, 16, 17, 65, 130]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import class_mean

    return class_mean


def with_nan_between(shape, dtype, device, mean=0.0):
    """Random rows of which each is followed by three NaN, as is the end and the beginning."""
    wide = poisoned((*shape[:-1], shape[-1] + 3), dtype, device)
    wide.add_(mean)[..., shape[-1] :] = float("nan")
    return wide[..., : shape[-1]]


def run(f, syn, real, *counts):
    """Distance and difference, then the mean of syn alone."""
    mean, both = f
    return [*both(syn, real, *counts), mean(syn, counts[0])]


def check(kernels, syn, real, *counts, tiny=4.0):
    ours, eager = ((k.class_mean, k.class_mean_distance) for k in (kernels, reference))
    with unchanged(syn, real):
        found = run(ours, syn, real, *counts)
    assert_within_budget(
        found,
        run(eager, syn, real, *counts),
        run(eager, syn.double(), real.double(), *counts),
        tiny=tiny,
    )
    assert_same_bits(found, run(ours, syn, real, *counts))


@pytest.mark.parametrize(
    ("dtype", "width"),
    [*((dtype, 129) for dtype in DTYPES), *((torch.float32, width) for width in (1, 127, 128))],
)
def test_error_budget_of_uneven_classes(kernels, triton_device, dtype, width):
    syn = with_nan_between((sum(COUNTS), width), dtype, triton_device)
    real = with_nan_between((sum(COUNTS), width), dtype, triton_device, mean=1.0)
    check(kernels, syn, real, COUNTS, COUNTS[::-1])


@pytest.mark.parametrize(
    ("dtype", "rows", "width"),
    [*((dtype, 10, 257) for dtype in DTYPES), (torch.float32, 1, 130), (torch.float32, 66, 40)],
)
def test_error_budget_of_equal_classes(kernels, triton_device, dtype, rows, width):
    syn = with_nan_between((3, rows, width), dtype, triton_device)
    real = poisoned((3, 70, width), dtype, triton_device)
    check(kernels, syn, real, [], [])
    check(kernels, syn, real.view(210, width), [], [70, 1, 139])


def test_many_rows_take_longer_chunks(kernels, triton_device):
    rows = 64 * 64 + 100
    assert kernels.chunk_size(rows) == 128 and kernels.chunk_size(1) == 64
    assert kernels.chunk_size(64 * 64) == 64
    real = poisoned((1, rows, 20), torch.float32, triton_device).add_(3)
    check(kernels, poisoned((1, 1, 20), torch.float32, triton_device), real, [], [])


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(kernels, triton_device, types):
    syn, real = (poisoned((2, 5, 33), dtype, triton_device) for dtype in types)
    difference = kernels.class_mean_distance(syn, real, [], [])[1]
    exact = reference.class_mean_distance(syn.double(), real.double())[1]
    wide = torch.promote_types(torch.float32, torch.promote_types(*types))
    assert difference.dtype == wide
    torch.testing.assert_close(difference.double(), exact, rtol=0, atol=4 * torch.finfo(wide).eps)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rows=st.integers(1, 20),
    width=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(kernels, triton_device, counts, rows, width, dtype):
    # Means of opposite sign: where they cancel, rounding alone decides and no budget holds.
    syn = poisoned((sum(counts), width), dtype, triton_device).add_(2)
    real = poisoned((len(counts), rows, width), dtype, triton_device).sub_(2)
    check(kernels, syn, real, counts, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(kernels, triton_device, dtype):
    base = poisoned((4, 6, 10), dtype, triton_device)
    for x in (
        base.transpose(0, 2),
        base.transpose(0, 1),
        base[:, :1].expand(4, 6, 10),
        base[:1, :1, :1].expand(4, 6, 10),
        base[::2, 1:6:2, 3:],
        base[:, :, ::3],
        base[:, :, 4:5],
    ):
        with unchanged(base):
            ours = kernels.class_mean_distance(x, x[:, :2], [], [])
        dense = kernels.class_mean_distance(x.contiguous(), x[:, :2].contiguous(), [], [])
        assert_same_bits(ours, dense)


def test_infinity_and_nan_stay_in_their_column(kernels, triton_device):
    x = poisoned((2, 20, 40), torch.float32, triton_device)
    x[0, 3, 5], x[0, 15, 6] = float("inf"), float("nan")
    means = kernels.class_mean(x, [])
    assert means[0, 5] == float("inf") and means[0, 6].isnan()
    assert means[0, :5].isfinite().all() and means[0, 7:].isfinite().all()
    assert means[1].isfinite().all()


def test_empty_sets(kernels, triton_device):
    for shape, counts in (((0, 4), []), ((0, 3, 4), []), ((2, 3, 0), []), ((3, 0), [1, 2])):
        x = torch.ones(shape, device=triton_device)
        classes = len(counts) if counts or len(shape) == 2 else shape[0]
        distance, difference = kernels.class_mean_distance(x, x, counts, counts)
        assert_same_bits(distance.cpu(), torch.zeros(classes))
        assert difference.shape == (classes, shape[-1])
        assert kernels.class_mean(x, counts).shape == (classes, shape[-1])


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Rows, then classes, that lie 2^31 elements and more apart in memory never touched."""
    stride, width = 2**31 + 64, 40
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(stride + width, dtype=torch.bfloat16, device=triton_device)
    values = poisoned((1, 2, width), torch.bfloat16, triton_device)
    rows = flat.as_strided((1, 2, width), (0, stride, 1))
    rows.copy_(values)
    expected = kernels.class_mean(values, [])
    assert_same_bits(kernels.class_mean(rows, []), expected)
    assert_same_bits(kernels.class_mean(rows[0], [2]), expected)
    assert_same_bits(kernels.class_mean(rows.transpose(0, 1), []), values[0].float())
    assert_same_bits(kernels.class_mean(rows[0], [1, 1]), values[0].float())


def test_the_cuda_key_answers_with_these_kernels(kernels, triton_device):
    x, y = (poisoned((3, 9, 20), torch.float32, triton_device) for _ in range(2))
    assert_same_bits(ops._mean_cuda(kernels, x, []), kernels.class_mean(x, []))
    assert_same_bits(
        ops._distance_cuda(kernels, x, y, [], []), list(kernels.class_mean_distance(x, y, [], []))
    )


def test_public_loss_and_gradient_where_the_kernels_run(triton_device):
    syn = poisoned((12, 70), torch.float32, triton_device).clone().requires_grad_()
    real = poisoned((3, 9, 70), torch.float32, triton_device)
    counts = [2, 7, 3]
    value = losses.class_mean_distance(syn, real, counts)
    (gradient,) = torch.autograd.grad(value.sum(), syn, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), syn)
    wide = syn.detach().double().requires_grad_()
    exact = reference.class_mean_distance(wide, real.double(), counts)[0]
    (exact_gradient,) = torch.autograd.grad(exact.sum(), wide, create_graph=True)
    (exact_second,) = torch.autograd.grad((exact_gradient**2).sum(), wide)
    for ours, wanted in ((value, exact), (gradient, exact_gradient), (second, exact_second)):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("class_mean", capability)
    assert {k["name"] for k in kernels} == {"sum_kernel", "mean_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
