"""Gates of the Triton kernel of `class_weight_grad` and of what answers its family on CUDA."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from ddfast.ops import class_weight_grad as ops
from ddfast.reference import class_weight_grad as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Kernel, padding, size of the images.
CONVOLUTIONS = [
    ((3, 3), 1, (5, 6)),
    ((1, 1), 0, (2, 3)),
    ((1, 2), 0, (4, 5)),
    ((5, 3), 2, (3, 4)),
    ((2, 2), 3, (1, 2)),
]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import class_weight_grad

    return class_weight_grad


def planes(images, channels, size, dtype, device, last=False, sign=1.0):
    """Random images (rows, for a linear layer) with NaN right before and behind all of them."""
    if not last:
        t = poisoned((images, channels, *size), dtype, device)
    else:
        t = poisoned((images, *size, channels), dtype, device).permute(0, 3, 1, 2)
    return t.add_(0.25).mul_(sign)


def pair(images, inputs, outputs, convolution, dtype, device, last=False):
    """x, and grad of the size of the convolution's result."""
    kernel, padding, size = convolution
    result = tuple(n + 2 * padding - k + 1 for n, k in zip(size, kernel, strict=True))
    x = planes(images, inputs, size, dtype, device, last)
    return x, planes(images, outputs, result, dtype, device, last, -1.0)


def check(kernels, x, grad, counts, kernel, padding, tiny=4.0):
    with unchanged(x, grad):
        ours = kernels.class_weight_grad(x, grad, counts, kernel, padding)
    eager = reference.class_weight_grad(x, grad, counts, kernel, padding)
    exact = reference.class_weight_grad(x.double(), grad.double(), counts, kernel, padding)
    assert ours.dtype == eager.dtype and ours.is_contiguous()
    assert_within_budget(ours, eager, exact, tiny=tiny)
    assert_same_bits(ours, kernels.class_weight_grad(x, grad, counts, kernel, padding))
    return ours


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(kernels, triton_device, dtype, last):
    for convolution, counts in itertools.product(CONVOLUTIONS[:3], ([2, 0, 3], [2, 2])):
        x, grad = pair(sum(counts), 3, 4, convolution, dtype, triton_device, last)
        ours = check(kernels, x, grad, counts, *convolution[:2])
        if 0 in counts:
            assert_same_bits(ours[counts.index(0)], torch.zeros_like(ours[0]))


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_kernels_and_paddings(kernels, triton_device, convolution):
    x, grad = pair(4, 2, 3, convolution, torch.float32, triton_device)
    check(kernels, x, grad, [1, 3], *convolution[:2])


@pytest.mark.parametrize("counts", [[3, 3], [1, 0, 4], [5], [1, 1, 1], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers(kernels, triton_device, dtype, counts):
    x = planes(sum(counts), 19, (), dtype, triton_device)
    grad = planes(sum(counts), 7, (), dtype, triton_device, sign=-1.0)
    check(kernels, x, grad, counts, (), 0)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 64), (17, 65), (65, 1), (1, 129)])
def test_around_the_tiles(kernels, triton_device, inputs, outputs):
    for convolution in (CONVOLUTIONS[1], ((3, 3), 1, (2, 2))):
        x, grad = pair(3, inputs, outputs, convolution, torch.float32, triton_device)
        check(kernels, x, grad, [2, 1], *convolution[:2])


@pytest.mark.parametrize("counts", [[7, 7], [11, 3]])
def test_images_in_several_chunks(kernels, triton_device, monkeypatch, counts):
    """The sum of two chunks is that of one; the last chunk may be short, or missing."""
    monkeypatch.setattr(kernels, "FEWEST", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    assert kernels.chunk_size(max(counts), 2, 9) == max(counts)
    x, grad = pair(14, 3, 4, ((3, 3), 1, (3, 3)), torch.float32, triton_device)
    whole = check(kernels, x, grad, counts, (3, 3), 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    assert kernels.chunk_size(7, 2, 9) == 3
    cut = check(kernels, x, grad, counts, (3, 3), 1)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def test_chunks(kernels):
    """Enough programs for a GPU, each with enough to do, and positions that 32 bits can count."""
    for images, programs, pixels in itertools.product((1, 10, 256), (2, 20, 360, 5000), (1, 1024)):
        size = kernels.chunk_size(images, programs, pixels)
        chunks = -(-images // size)
        assert 1 <= size <= images
        assert chunks == 1 or (chunks - 1) * programs < kernels.PROGRAMS
        assert chunks == 1 or size * pixels >= kernels.FEWEST
        full = chunks * programs * 2 > kernels.PROGRAMS
        assert full or chunks == images or size * pixels <= 2 * kernels.FEWEST or chunks == 1
    assert kernels.chunk_size(256, 20, 1024) == 3 and kernels.chunk_size(10, 360, 64) == 10
    assert kernels.chunk_size(10**6, 10**4, 10**4) * 10**4 < 2**31


def test_layouts(kernels, triton_device):
    convolution = ((3, 3), 1, (4, 3))
    x, grad = pair(4, 3, 5, convolution, torch.float32, triton_device)
    dense = kernels.class_weight_grad(x, grad, [1, 3], (3, 3), 1)

    def sliced(t):
        wide = torch.full([2 * n + 1 for n in t.shape], float("nan"), device=t.device)
        wide[1::2, 1::2, 1::2, 1::2] = t
        return wide[1::2, 1::2, 1::2, 1::2]

    def turned(t):
        return t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    for first, second in ((sliced, turned), (turned, sliced)):
        ours = kernels.class_weight_grad(first(x), second(grad), [1, 3], (3, 3), 1)
        assert_same_bits(ours, dense)
    for k in range(4):
        thin = grad.narrow(k, 0, 1)
        ours, copied = (
            kernels.class_weight_grad(x, g, [1, 3], (3, 3), 1)
            for g in (thin.expand_as(grad), thin.expand_as(grad).contiguous())
        )
        assert_same_bits(ours, copied)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # inf * 0
def test_infinity_stays_in_its_class_and_channel(kernels, triton_device):
    x, grad = pair(4, 3, 2, CONVOLUTIONS[1], torch.float32, triton_device)
    x[1, 2, 0, 0] = float("inf")
    ours = kernels.class_weight_grad(x, grad, [2, 2], (1, 1), 0)
    assert not ours[0, :, 2].isfinite().any()
    assert ours[0, :, :2].isfinite().all() and ours[1].isfinite().all()


def test_empty_sizes(kernels, triton_device):
    for images, inputs, outputs, counts in ((0, 2, 3, [0, 0]), (0, 2, 3, [])):
        x, grad = pair(images, inputs, outputs, CONVOLUTIONS[0], torch.float32, triton_device)
        ours = kernels.class_weight_grad(x, grad, counts, (3, 3), 1)
        assert_same_bits(ours, torch.zeros(len(counts), outputs, inputs, 3, 3, device=x.device))


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Images, channels, rows, then columns 2^31 elements and more apart in untouched memory."""
    reach = 2**31 + 64
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(reach + 200, dtype=torch.bfloat16, device=triton_device)
    x = planes(3, 3, (3, 3), torch.bfloat16, triton_device)
    grad = planes(3, 3, (3, 3), torch.bfloat16, triton_device, sign=-1.0)
    dense = [kernels.class_weight_grad(x, grad, counts, (3, 3), 1) for counts in ([3], [1, 2])]
    for k in range(4):
        views = []
        for start, t in ((0, x), (90, grad)):
            strides = list(t.stride())
            strides[k] = reach // 2
            views.append(flat.as_strided(t.shape, strides, start))
            views[-1].copy_(t)
        for counts, expected in zip(([3], [1, 2]), dense, strict=True):
            assert_same_bits(kernels.class_weight_grad(*views, counts, (3, 3), 1), expected)


def test_tensor_float_is_the_users_choice(kernels, monkeypatch):
    """Through torch's old name for it and its new one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = precision
            assert kernels._precision(torch.float32)[1] == expected
        assert kernels._precision(torch.float64)[1] == "double"
    finally:
        matmul.fp32_precision = before


# --- the two convolutions: plain torch, on any device ---------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 0, 3], [4], [1, 1], [0, 0]])
def test_convolutions_by_class(kernels, triton_device, counts, last):
    for kernel, padding, size in CONVOLUTIONS:
        x = planes(sum(counts), 3, size, torch.float64, triton_device, last)
        weight = poisoned((len(counts), 4, 3, *kernel), torch.float64, triton_device)
        ours = kernels.class_conv(x, weight, counts, padding)
        expected = reference.class_conv(x, weight, counts, padding)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert ours.stride() == expected.stride()
        grad = planes(*expected.shape[:2], expected.shape[2:], x.dtype, triton_device, last)
        ours = kernels.class_input_grad(grad, weight, counts, size, padding)
        expected = reference.class_input_grad(grad, weight, counts, size, padding)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert ours.stride() == expected.stride()


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 0, 3], [4], [0, 0]])
def test_linear_layers_by_class(kernels, triton_device, counts):
    x, grad = (planes(sum(counts), n, (), torch.float64, triton_device) for n in (3, 5))
    weight = poisoned((len(counts), 5, 3), torch.float64, triton_device)
    for ours, expected in (
        (kernels.class_conv(x, weight, counts), reference.class_conv(x, weight, counts)),
        (
            kernels.class_input_grad(grad, weight, counts, ()),
            reference.class_input_grad(grad, weight, counts, ()),
        ),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_the_cuda_keys_answer_with_these_kernels(kernels, triton_device):
    x, grad = pair(3, 2, 4, CONVOLUTIONS[0], torch.float32, triton_device)
    weight = poisoned((2, 4, 2, 3, 3), torch.float32, triton_device)
    for name, arguments in (
        ("conv", (x, weight, [1, 2], 1, "auto")),
        ("input_grad", (grad, weight, [1, 2], [5, 6], 1, "auto")),
        ("weight_grad", (x, grad, [1, 2], [3, 3], 1, "auto")),
    ):
        ours = getattr(ops, f"_{name}_cuda")(kernels, *arguments)
        assert_same_bits(ours, getattr(kernels, f"class_{name}")(*arguments))


def test_arguments_are_checked_as_the_reference_checks_them(kernels, triton_device):
    x, grad = pair(2, 3, 4, CONVOLUTIONS[0], torch.float32, triton_device)
    for f, arguments, message in (
        ("class_weight_grad", (x, grad, [1, 2], (3, 3), 1), "counts: add up to 3, expected 2"),
        ("class_conv", (x, grad, [2], 1), "weight: got shape"),
        ("class_input_grad", (grad, grad, [2], (5, 6), 1), "weight: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(kernels, f)(*arguments)
        ours, theirs = (inspect.signature(getattr(m, f)) for m in (kernels, reference))
        assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("class_weight_grad", capability)
    assert {k["name"] for k in kernels} == {"weight_grad_kernel"}
    assert {k["constants"]["PRECISION"] for k in kernels} == {"ieee", "tf32", "double"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
