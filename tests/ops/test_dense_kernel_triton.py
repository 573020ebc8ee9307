"""Gates of the Triton kernels of `dense_kernel`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddfast.kernel_matrix import kernel_matrix
from ddfast.ops import dense_kernel as ops
from ddfast.reference import dense_kernel as reference
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
    from ddfast.kernels import dense_kernel

    return dense_kernel


def rows(shape, dtype, device, mean=0.0):
    """Random rows of which each is followed by three NaN, as is the end and the beginning."""
    wide = poisoned((*shape[:-1], shape[-1] + 3), dtype, device)
    wide.add_(mean)[..., shape[-1] :] = float("nan")
    return wide[..., : shape[-1]]


def cotangent(x, y, dtype):
    n, m = len(x), len(x if y is None else y)
    values = torch.cos(torch.arange(n * m, dtype=torch.float64, device=x.device))
    return values.view(n, m).to(dtype)


def results(f, g, x, y, network):
    """The matrix and the gradients by the operator's two functions."""
    value, gram = f(x, y, *network, True)
    grad = cotangent(x, y, value.dtype)
    return [value, *g(grad, x, y, gram, *network, True, y is not None)]


def defined(x, y, network, dtype):
    x, y = x.to(dtype), None if y is None else y.to(dtype)
    value = reference.dense_kernel(x, y, *network)
    grad = cotangent(x, y, value.dtype)
    return [value, *reference.dense_kernel_bwd(grad, x, y, *network, True, y is not None)]


def check(kernels, x, y, network, tiny=8.0):
    with unchanged([t for t in (x, y) if t is not None]):
        found = results(kernels.dense_kernel, kernels.dense_kernel_bwd, x, y, network)
    eager, exact = (defined(x, y, network, dtype) for dtype in (found[0].dtype, torch.float64))
    assert_within_budget(found, eager, exact, tiny=tiny)
    if y is None:
        assert_same_bits(found[0], found[0].mT.contiguous())
    again = results(kernels.dense_kernel, kernels.dense_kernel_bwd, x, y, network)
    assert_same_bits(found, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_error_budget(kernels, triton_device, dtype, kind, depth, alone):
    x, y = rows((17, 18), dtype, triton_device), rows((5, 18), dtype, triton_device, 0.5)
    check(kernels, x, None if alone else y, (kind, depth, 2.0, 0.01))


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 65, 16), (70, 33, 33), (3, 130, 5)])
def test_around_the_tiles(kernels, triton_device, kind, shape):
    n, m, d = shape
    x = rows((n, d), torch.float32, triton_device)
    y = rows((m, d), torch.float32, triton_device, 0.5)
    check(kernels, x, y, (kind, 2, 1.7, 0.0))
    check(kernels, y, None, (kind, 2, 1.7, 0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", reference.KINDS)
def test_rows_that_are_equal_or_zero(kernels, triton_device, dtype, kind):
    x = rows((20, 21), dtype, triton_device).clone()
    y = rows((18, 21), dtype, triton_device).clone() + 0.1
    x[3], y[4], x[7], y[9] = x[2], x[2], 0, 0
    check(kernels, x, y, (kind, 3, 2.0, 0.01))
    check(kernels, x, None, (kind, 3, 2.0, 0.0))
    value = kernels.dense_kernel(x, y, kind, 3, 2.0, 0.01, False)[0]
    alone = kernels.dense_kernel(x, None, kind, 3, 2.0, 0.01, False)[0]
    torch.testing.assert_close(value[2, 4], alone[2, 2], rtol=4e-7, atol=0)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 80),
    m=st.integers(1, 80),
    d=st.integers(1, 40),
    depth=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(reference.KINDS),
    alone=st.booleans(),
)
def test_any_shape(kernels, triton_device, n, m, d, depth, dtype, kind, alone):
    x = rows((n, d), dtype, triton_device)
    y = rows((m, d), dtype, triton_device, 0.7)
    check(kernels, x, None if alone else y, (kind, depth, 2.0, 0.01), tiny=16)


def test_only_what_is_needed(kernels, triton_device):
    x = rows((6, 7), torch.float32, triton_device)
    y = rows((9, 7), torch.float32, triton_device, 1.0)
    network = ("ntk", 2, 2.0, 0.01)
    value, gram = kernels.dense_kernel(x, y, *network, True)
    light, nothing = kernels.dense_kernel(x, y, *network, False)
    assert nothing.numel() == 0
    assert_same_bits(value, light)
    grad = cotangent(x, y, value.dtype)
    by_x, by_y = kernels.dense_kernel_bwd(grad, x, y, gram, *network, True, True)
    assert_same_bits(kernels.dense_kernel_bwd(grad, x, y, gram, *network, True, False), [by_x])
    assert_same_bits(kernels.dense_kernel_bwd(grad, x, y, gram, *network, False, True), [by_y])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(kernels, triton_device, dtype):
    base = poisoned((12, 10), dtype, triton_device)
    network = ("ntk", 2, 2.0, 0.01)
    for x in (base.mT, base[:1].expand(12, 10), base[1:9:3, 2:], base[:, ::3], base[:, 4:5]):
        y = (x + 0.5).contiguous()
        for a, b in ((x, y), (y, x), (x, None)):
            ours = results(kernels.dense_kernel, kernels.dense_kernel_bwd, a, b, network)
            a, b = a.contiguous(), None if b is None else b.contiguous()
            dense = results(kernels.dense_kernel, kernels.dense_kernel_bwd, a, b, network)
            assert_same_bits(ours, dense)


def test_empty_sets(kernels, triton_device):
    x, none = torch.ones(3, 4, device=triton_device), torch.ones(0, 4, device=triton_device)
    for a, b in ((none, None), (none, x), (x, none)):
        value, *by = results(
            kernels.dense_kernel, kernels.dense_kernel_bwd, a, b, ("ntk", 2, 2.0, 0.01)
        )
        assert value.shape == (len(a), len(a if b is None else b))
        for gradient, of in zip(by, (a, b), strict=False):
            assert_same_bits(gradient, torch.zeros_like(of))


def test_what_is_not_finite_shows(kernels, triton_device):
    x = rows((20, 6), torch.float32, triton_device).clone()
    x[3, 1] = float("nan")
    for kind in reference.KINDS:
        value = kernels.dense_kernel(x, None, kind, 2, 2.0, 0.01, False)[0]
        rest = [i for i in range(20) if i != 3]
        assert value[3].isnan().all() and value[:, 3].isnan().all()
        assert value[rest][:, rest].isfinite().all()


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Rows that lie 2^31 elements and more apart in memory never touched."""
    stride, width = 2**31 + 64, 20
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(stride + width, dtype=torch.bfloat16, device=triton_device)
    values = poisoned((2, width), torch.bfloat16, triton_device)
    far = flat.as_strided((2, width), (stride, 1))
    far.copy_(values)
    network = ("ntk", 2, 2.0, 0.01, False)
    for a, b in ((far, values + 1), (values + 1, far)):
        close = [values if t is far else t for t in (a, b)]
        expected = kernels.dense_kernel(*close, *network)[0]
        assert_same_bits(kernels.dense_kernel(a, b, *network)[0], expected)


def test_the_cuda_key_answers_with_these_kernels(kernels, triton_device):
    x, y = (poisoned((9, 20), torch.float32, triton_device) for _ in range(2))
    network = ("ntk", 2, 2.0, 0.01)
    ours, direct = (
        f(x, y, *network, True) for f in (lambda *a: ops._cuda(kernels, *a), kernels.dense_kernel)
    )
    assert_same_bits(ours, direct)
    grad = cotangent(x, y, torch.float32)
    arguments = (grad, x, y, direct[1], *network, True, False)
    assert_same_bits(ops._bwd_cuda(kernels, *arguments), kernels.dense_kernel_bwd(*arguments))


def test_public_matrix_and_gradient_where_the_kernels_run(triton_device):
    x = poisoned((12, 30), torch.float32, triton_device).clone().requires_grad_()
    y = poisoned((9, 30), torch.float32, triton_device).add(0.3)
    value = kernel_matrix(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    wide = x.detach().double().cpu().requires_grad_()
    exact = kernel_matrix(wide, y.double().cpu())
    (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(value.double().cpu(), exact, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double().cpu(), exact_gradient, rtol=1e-4, atol=1e-6)


def test_the_coefficients_are_those_of_the_compiled_kernels():
    """Every number of csrc/arc_cosine_fit.h, in kernels/arc_cosine.py."""
    root = Path(__file__).parents[2]
    header, source = root / "csrc" / "arc_cosine_fit.h", root / "kernels" / "arc_cosine.py"
    if not header.exists():
        pytest.skip("the sources are not here")
    number = r"\d+\.\d+(?:e-?\d+)?"

    def fits(text):
        return {abs(float(n)) for n in re.findall(number, text)}

    listed = fits("".join(re.findall(r"#define DDFAST_[\s\S]*?\n(?!\s)", header.read_text())))
    assert len(listed) == 8 + 7 + 8 + 18 + 17 + 18
    written = fits(source.read_text()) - {0.0, 1.0, 9.86960440108935861883}
    assert written == listed


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("dense_kernel", capability)
    assert {k["name"] for k in kernels} == {"forward_kernel", "backward_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
