"""Gates of the Triton kernels of `characteristic_function`: on the GPU, or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from ddfast import losses
from ddfast.losses import Frequencies
from ddfast.ops import characteristic_function as ops
from ddfast.reference import characteristic_function as reference
from ddfast.reference import frequencies as drawn_reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
drawn_words = pytest.importorskip("ddfast.kernels.frequencies").drawn_words

NUMBERS = (0, 0, 1.0, 0)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import characteristic_function

    return characteristic_function


def with_nan_between(shape, dtype, device, scale=1.0):
    """Random rows of which each is followed by three NaN, as is the end and the beginning."""
    wide = poisoned((*shape[:-1], shape[-1] + 3), dtype, device)
    wide.mul_(scale)[..., shape[-1] :] = float("nan")
    return wide[..., : shape[-1]]


def run(module, x, t, grad, numbers=NUMBERS, keep=True):
    phi, phase = module.characteristic_function(x, t, *numbers, keep)
    grads = module.characteristic_function_bwd(
        grad.to(phi.dtype), x, t, phase, *numbers, True, t is not None
    )
    return [phi, *grads] if t is not None else [phi, grads[0]]


def check(kernels, x, t, numbers=NUMBERS, tiny=8.0):
    count = numbers[0] if t is None else t.shape[1]
    grad = poisoned((x.shape[0], count, 2), torch.float32, x.device)
    with unchanged(x, *([] if t is None else [t])):
        found = run(kernels, x, t, grad, numbers)
    wide = None if t is None else t.double()
    assert_within_budget(
        found,
        run(reference, x, t, grad, numbers),
        run(reference, x.double(), wide, grad, numbers),
        tiny=tiny,
    )
    assert_same_bits(found, run(kernels, x, t, grad, numbers))
    assert_same_bits(found, run(kernels, x, t, grad, numbers, keep=False))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 5, 7, 3), torch.float32),
        ((1, 65, 65, 65), torch.float32),
        ((2, 64, 64, 64), torch.float32),
        ((2, 63, 130, 70), torch.bfloat16),
        ((1, 70, 63, 129), torch.float16),
        ((1, 1, 1, 1), torch.float32),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_error_budget(kernels, triton_device, shape, dtype, shared):
    classes, n, k, d = shape
    x = with_nan_between((classes, n, d), dtype, triton_device, d**-0.5)
    t = with_nan_between((1 if shared else classes, k, d), dtype, triton_device)
    check(kernels, x, t)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_error_budget_of_drawn_frequencies(kernels, triton_device, dtype):
    x = with_nan_between((2, 67, 70), dtype, triton_device, 0.1)
    check(kernels, x, None, (65, 2**40 + 5, 0.7, 3))


def test_mixed_dtypes_and_float64(kernels, triton_device):
    x = poisoned((2, 5, 33), torch.bfloat16, triton_device)
    t = poisoned((2, 6, 33), torch.float32, triton_device)
    check(kernels, x, t)
    grad = poisoned((2, 6, 2), torch.float64, triton_device)
    found = run(kernels, x.double(), t, grad)
    assert_same_bits(found, run(reference, x.double(), t, grad))


def test_many_rows_take_longer_chunks(kernels, triton_device):
    assert kernels.chunk_size(1) == 64 and kernels.chunk_size(1024) == 64
    assert kernels.chunk_size(1025) == 128
    x = poisoned((1, 1030, 5), torch.float32, triton_device)
    check(kernels, x, poisoned((1, 9, 5), torch.float32, triton_device))


def test_frequencies_are_weighed_in_slabs(kernels, triton_device, monkeypatch):
    x = poisoned((2, 20, 9), torch.float32, triton_device)
    t = poisoned((1, 150, 9), torch.float32, triton_device)
    grad = poisoned((2, 150, 2), torch.float32, triton_device)
    drawn = (150, 9, 1.0, 0)
    whole = run(kernels, x, t, grad), run(kernels, x, None, grad, drawn)
    monkeypatch.setattr(kernels, "WEIGHTS_BYTES", 64 * 2 * 20 * 4)
    for keep in (True, False):
        parts = (
            run(kernels, x, t, grad, keep=keep),
            run(kernels, x, None, grad, drawn, keep=keep),
        )
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_layouts(kernels, triton_device):
    base = poisoned((4, 6, 10), torch.float32, triton_device)
    for view in (
        base.transpose(0, 2),
        base.transpose(0, 1),
        base[:, :1].expand(4, 6, 10),
        base[:1].expand(4, 6, 10),
        base[::2, 1:6:2, 3:],
        base[:, :, ::3],
        base[:, :, 4:5],
    ):
        grad = poisoned((view.shape[0], view.shape[1], 2), torch.float32, triton_device)
        with unchanged(base):
            found = run(kernels, view, view, grad)
        assert_same_bits(found, run(kernels, view.contiguous(), view.contiguous(), grad))


def test_nothing_at_all(kernels, triton_device):
    for shape, count in (((0, 3, 4), 5), ((2, 3, 0), 5)):
        x = torch.ones(shape, device=triton_device)
        t = torch.ones(1, count, shape[2], device=triton_device)
        grad = torch.ones(shape[0], count, 2, device=triton_device)
        for frequencies, numbers in ((t, NUMBERS), (None, (count, 1, 1.0, 0))):
            found = run(kernels, x, frequencies, grad, numbers)
            assert [f.shape for f in found] == [
                f.shape for f in run(reference, x, frequencies, grad, numbers)
            ]


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Rows that lie 2^31 elements and more apart in memory never touched."""
    stride, width = 2**31 + 64, 40
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(stride + width, dtype=torch.bfloat16, device=triton_device)
    values = poisoned((1, 2, width), torch.bfloat16, triton_device)
    grad = poisoned((1, 2, 2), torch.float32, triton_device)
    rows = flat.as_strided((1, 2, width), (0, stride, 1))
    rows.copy_(values)
    expected = kernels.characteristic_function(values, values, *NUMBERS, True)
    assert_same_bits(list(kernels.characteristic_function(rows, rows, *NUMBERS, True)), expected)
    classes, other = rows.transpose(0, 1), values.transpose(0, 1).contiguous()
    assert_same_bits(
        kernels.characteristic_function(classes, classes, *NUMBERS, True)[0],
        kernels.characteristic_function(other, other, *NUMBERS, True)[0],
    )
    assert grad.isfinite().all()


@triton.jit(do_not_specialize=["seed", "stream"])
def words_kernel(out, seed, stream, FREQUENCIES: tl.constexpr):
    m = tl.arange(0, FREQUENCIES)
    a, b, c, d = drawn_words(m, 64, seed, stream + tl.program_id(0).to(tl.int64), FREQUENCIES)
    at = m[:, None] * 64 + tl.arange(0, 16)[None, :]
    tl.store(out + at, a.to(tl.int64))
    tl.store(out + at + 16, b.to(tl.int64))
    tl.store(out + at + 32, c.to(tl.int64))
    tl.store(out + at + 48, d.to(tl.int64))


def test_words_are_those_of_the_reference(triton_device):
    """Every bit of Philox, with a key and counters beyond 32 bits of either word."""
    for seed, stream in ((0, 0), (1, 1), (2**62 + 2**31 + 77, 2**32 - 2)):
        out = torch.zeros(16, 64, dtype=torch.int64, device=triton_device)
        words_kernel[(1,)](out, seed, stream, FREQUENCIES=16)
        expected = drawn_reference.words(16, 128, seed, stream, 1, "cpu")[0, :, 1]
        assert torch.equal(out.cpu() & 0xFFFFFFFF, expected.reshape(16, 64)), (seed, stream)


def test_values_are_those_of_the_reference(kernels, triton_device):
    """The product with a matrix of ones and zeros gives the frequencies themselves."""
    weights = torch.eye(70, device=triton_device).view(1, 70, 70)
    out = torch.empty(1, 70, 130, device=triton_device)
    kernels._drawn_product(weights, out, 0, 2**40 + 1, 0.7, 5)
    exact = drawn_reference.frequencies(70, 130, 2**40 + 1, 0.7, 5, 1, torch.float64)
    error = (out.cpu().double() - exact).abs()
    assert (error <= 8 * 2**-23 * exact.abs()).all()


def test_the_cuda_key_answers_with_these_kernels(kernels, triton_device):
    x = poisoned((2, 9, 20), torch.float32, triton_device)
    t = poisoned((2, 7, 20), torch.float32, triton_device)
    grad = poisoned((2, 7, 2), torch.float32, triton_device)
    phi, phase = ops._cuda(kernels, x, t, *NUMBERS, True)
    grads = ops._bwd_cuda(kernels, grad, x, t, phase, *NUMBERS, True, True)
    assert_same_bits([phi, *grads], run(kernels, x, t, grad))


@pytest.mark.parametrize("drawn", [False, True])
def test_public_distance_and_gradient_where_the_kernels_run(triton_device, drawn):
    x = poisoned((2, 9, 70), torch.float32, triton_device).clone().requires_grad_()
    y = poisoned((2, 12, 70), torch.float32, triton_device)
    t = Frequencies(30, 5, 0.2) if drawn else poisoned((30, 70), torch.float32, triton_device) / 5
    value = losses.characteristic_function_distance(x, y, t, 0.9, 0.3)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    by_hand = losses.characteristic_function_distance_and_gradient(x, y, t, 0.9, 0.3)
    wide = x.detach().double().requires_grad_()
    exact_t = None if drawn else t.double()[None]
    numbers = (30, 5, 0.2, 0)
    phis = [reference.characteristic_function(s, exact_t, *numbers)[0] for s in (wide, y.double())]
    exact = reference.distance(*phis, 0.9, 0.3)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
    for found in ((value, gradient), by_hand):
        torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1].double(), exact_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    kernels = compile_ahead_of_time("characteristic_function", capability)
    names = {"wave_kernel", "weigh_kernel", "drawn_product_kernel"}
    assert {k["name"] for k in kernels} == names
    assert all(k["spilled"] == 0 for k in kernels), kernels
