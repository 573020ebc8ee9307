"""Gates of the Triton kernels of `mmd`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddfast import losses
from ddfast.ops import mmd as ops
from ddfast.reference import mmd as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    error,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import mmd

    return mmd


def rows(shape, dtype, device, mean=0.0):
    """Random rows of which each is followed by three NaN, as is the end and the beginning."""
    wide = poisoned((*shape[:-1], shape[-1] + 3), dtype, device)
    wide.add_(mean)[..., shape[-1] :] = float("nan")
    return wide[..., : shape[-1]]


def bandwidths_of(kernel, x):
    values = [2.0, 0.0, 7.0] if kernel in ("gaussian", "laplace") else []
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The second class has other bandwidths; a zero leaves its term out.
    each = torch.tensor([[h * (c + 1) for h in values] for c in range(len(x))], dtype=wide)
    return each.reshape(len(x), len(values)).to(x.device)


def check(kernels, x, y, kernel, degree=2, unbiased=False, tiny=8.0):
    bandwidths = bandwidths_of(kernel, x)
    common = (bandwidths, kernel, degree, unbiased)
    weights = torch.linspace(1, 2, len(x), device=x.device)
    with unchanged(x, y):
        value, by = kernels.mmd(x, y, *common, True, True)
        scaled = kernels.mmd_bwd(weights, x, y, *common, True, True)
    wide = bandwidths.dtype
    eager, exact = ([t.to(d) for t in (x, y)] for d in (wide, torch.float64))
    values = [reference.mmd(*s, bandwidths.to(s[0].dtype), *common[1:]) for s in (eager, exact)]
    assert value.dtype == wide
    # The value is a difference of means, which are of this size.
    size = {"gaussian": 3.0, "laplace": 3.0, "energy": 10.0}.get(
        kernel, float(exact[0].norm(dim=2).max()) ** 4
    )
    allowed = 2 * error(values[0], values[1]) + tiny * torch.finfo(wide).eps * size
    assert error(value, values[1]) <= allowed
    for found, cotangent in ((by, torch.ones_like(weights)), (scaled, weights)):
        both = [
            reference.mmd_bwd(cotangent, *s, bandwidths.to(s[0].dtype), *common[1:], True, True)
            for s in (eager, exact)
        ]
        assert_within_budget(found, *both, tiny=tiny)
    assert_same_bits(
        [value, *by], [*(again := kernels.mmd(x, y, *common, True, True))[:1], *again[1]]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", reference.KERNELS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_error_budget(kernels, triton_device, dtype, kernel, unbiased):
    x, y = rows((2, 17, 18), dtype, triton_device), rows((2, 5, 18), dtype, triton_device, 0.5)
    check(kernels, x, y, kernel, 3, unbiased)


@pytest.mark.parametrize("kernel", ["gaussian", "energy", "polynomial"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 65, 16), (70, 33, 33), (3, 130, 5)])
def test_around_the_tiles(kernels, triton_device, kernel, shape):
    n, m, d = shape
    x = rows((1, n, d), torch.float32, triton_device)
    y = rows((1, m, d), torch.float32, triton_device, 0.5)
    check(kernels, x, y, kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "energy"])
def test_pairs_that_meet_or_nearly_do(kernels, triton_device, dtype, kernel):
    x = rows((2, 20, 21), dtype, triton_device).clone()
    y = rows((2, 18, 21), dtype, triton_device).clone()
    x[:, 3], y[:, 4] = x[:, 2], x[:, 2]
    x[:, 5] = x[:, 6] + 1e-4
    y[:, 1] = x[:, 7] + 1e-4
    check(kernels, x + 3, y + 3, kernel)


def test_rows_that_are_all_equal(kernels, triton_device):
    x = poisoned((1, 1, 9), torch.float32, triton_device).add_(5).expand(1, 20, 9)
    for kernel in ("gaussian", "laplace", "energy"):
        value, by = kernels.mmd(x, x[:, :4], bandwidths_of(kernel, x), kernel, 2, False, True, True)
        for t in (value, *by):
            assert_same_bits(t.abs(), torch.zeros_like(t))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    classes=st.integers(1, 3),
    n=st.integers(2, 40),
    m=st.integers(2, 40),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    kernel=st.sampled_from(reference.KERNELS),
    unbiased=st.booleans(),
)
def test_any_shape(kernels, triton_device, classes, n, m, d, dtype, kernel, unbiased):
    x = rows((classes, n, d), dtype, triton_device)
    y = rows((classes, m, d), dtype, triton_device, 0.7)
    check(kernels, x, y, kernel, 2, unbiased, tiny=16)


def test_a_set_against_itself(kernels, triton_device):
    x = rows((2, 20, 7), torch.float32, triton_device)
    for kernel in reference.KERNELS:
        common = (bandwidths_of(kernel, x), kernel, 2, False, True, True)
        itself, copied = kernels.mmd(x, x, *common), kernels.mmd(x, x.clone(), *common)
        assert_same_bits([itself[0], *itself[1]], [copied[0], *copied[1]])
        assert itself[0].abs().max() < 1e-3


def test_only_what_is_needed(kernels, triton_device):
    x = rows((2, 6, 7), torch.float32, triton_device)
    y = rows((2, 9, 7), torch.float32, triton_device, 1.0)
    for kernel in ("gaussian", "linear"):
        common = (bandwidths_of(kernel, x), kernel, 2, False)
        value, (by_x, by_y) = kernels.mmd(x, y, *common, True, True)
        assert_same_bits(kernels.mmd(x, y, *common, True, False)[1], [by_x])
        assert_same_bits(kernels.mmd(x, y, *common, False, True)[1], [by_y])
        alone, nothing = kernels.mmd(x, y, *common, False, False)
        assert nothing == []
        assert_same_bits(alone, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(kernels, triton_device, dtype):
    base = poisoned((4, 6, 10), dtype, triton_device)
    for x in (
        base.transpose(0, 2),
        base.transpose(0, 1),
        base[:, :1].expand(4, 6, 10),
        base[::2, 1:6:2, 3:],
        base[:, :, ::3],
        base[:, :, 4:5],
    ):
        y = (x + 0.5).contiguous()
        common = (bandwidths_of("gaussian", x), "gaussian", 2, False, True, True)
        ours, dense = kernels.mmd(x, y, *common), kernels.mmd(x.contiguous(), y, *common)
        assert_same_bits([ours[0], *ours[1]], [dense[0], *dense[1]])


def test_empty_sets(kernels, triton_device):
    for kernel in reference.KERNELS:
        for shape in ((0, 3, 4), (2, 3, 0)):
            x = torch.ones(shape, device=triton_device)
            value, by = kernels.mmd(x, x, bandwidths_of(kernel, x), kernel, 2, False, True, True)
            assert_same_bits(value.abs().cpu(), torch.zeros(shape[0]))
            assert [t.shape for t in by] == [x.shape] * 2


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Rows, then classes, that lie 2^31 elements and more apart in memory never touched."""
    stride, width = 2**31 + 64, 20
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(stride + width, dtype=torch.bfloat16, device=triton_device)
    values = poisoned((1, 2, width), torch.bfloat16, triton_device)
    far = flat.as_strided((1, 2, width), (0, stride, 1))
    far.copy_(values)
    common = (bandwidths_of("gaussian", values), "gaussian", 2, False, False, False)
    expected = kernels.mmd(values, values + 1, *common)[0]
    assert_same_bits(kernels.mmd(far, values + 1, *common)[0], expected)
    classes = values.transpose(0, 1)
    common = (bandwidths_of("gaussian", classes), *common[1:])
    expected = kernels.mmd(classes, classes + 1, *common)[0]
    assert_same_bits(kernels.mmd(far.transpose(0, 1), classes + 1, *common)[0], expected)


def test_the_cuda_key_answers_with_these_kernels(kernels, triton_device):
    x, y = (poisoned((2, 9, 20), torch.float32, triton_device) for _ in range(2))
    common = (x, y, bandwidths_of("gaussian", x), "gaussian", 2, False, True, False)
    ours, direct = ops._cuda(kernels, *common), kernels.mmd(*common)
    assert_same_bits([ours[0], *ours[1]], [direct[0], *direct[1]])
    grad = torch.ones(2, device=triton_device)
    assert_same_bits(ops._bwd_cuda(kernels, grad, *common), direct[1])


def test_public_loss_and_gradient_where_the_kernels_run(triton_device):
    x = poisoned((3, 12, 30), torch.float32, triton_device).clone().requires_grad_()
    y = poisoned((3, 9, 30), torch.float32, triton_device).add(0.3)
    for bandwidth in (None, "median", 20.0):
        value = losses.mmd(x, y, "gaussian", bandwidth)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        wide = x.detach().double().cpu().requires_grad_()
        exact = losses.mmd(wide, y.double().cpu(), "gaussian", bandwidth)
        (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
        torch.testing.assert_close(value.double().cpu(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double().cpu(), exact_gradient, rtol=1e-4, atol=1e-6)
        found = losses.mmd_and_gradient(x.detach(), y, "gaussian", bandwidth)
        torch.testing.assert_close(found, (value.detach(), gradient), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("mmd", capability)
    assert {k["name"] for k in kernels} == {"sum_kernel", "gradient_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
