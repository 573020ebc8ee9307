"""Gates of the Triton kernels of `gradient_distance`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ddfast.reference import gradient_distance as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

METRICS = reference.METRICS
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Not multiples of any block; 9000 and 3*8192+1 cross the chunk of the metrics without rows.
SHAPES = [(3, 27), (2, 1, 5, 7), (5,), (2, 1030), (1, 9000), (3 * 8192 + 1,)]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import gradient_distance

    return gradient_distance


def tensors(shapes, dtype, device, classes=None, offset=0):
    lead = () if classes is None else (classes,)
    drawn = [poisoned((*lead, *s), dtype, device) for s in shapes]
    for t in drawn:
        t.mul_(0.1).add_(offset * 0.01)
    return drawn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("classes", [None, 2])
def test_error_budget(kernels, triton_device, dtype, metric, classes):
    batched = classes is not None
    syn, real = (tensors(SHAPES, dtype, triton_device, classes, i) for i in (0, 1))
    for r in real:
        r.copy_(r.roll(1, -1))
    u, w = tensors(SHAPES, dtype, triton_device, classes, 2), real
    grad = torch.tensor([0.7, -1.3][: classes or 1], dtype=reference.accumulator(dtype))
    grad = grad.to(triton_device)

    def through(kernel_module, cast):
        s, r, p, q = ([t.to(cast) for t in x] for x in (syn, real, u, w))
        g = grad.to(reference.accumulator(cast))
        if kernel_module is None:
            value = reference.gradient_distance(s, r, metric, 1e-6, batched)
            first = reference.gradient_distance_bwd(g, s, r, metric, 1e-6, batched)
            second = reference.gradient_distance_bwd_bwd(p, q, g, s, r, metric, 1e-6, batched)
            return [value, *first[0], *first[1], second[0], *second[1], *second[2]]
        value, gradient = kernel_module.gradient_distance(s, r, metric, 1e-6, batched, True)
        arguments = (g, s, r, metric, 1e-6, batched)
        both = kernel_module.gradient_distance_bwd(*arguments, True, True)
        ones = kernel_module.gradient_distance_bwd(torch.ones_like(g), *arguments[1:], True, False)
        assert_same_bits(gradient, ones)
        return [value, *both, *kernel_module.gradient_distance_bwd_bwd(p, q, *arguments)]

    with unchanged(syn, real, u):
        ours = through(kernels, dtype)
    assert_within_budget(
        ours,
        through(None, dtype),
        through(None, torch.float64),
        tiny=32 if dtype == torch.float64 else 8,
    )


def test_zero_rows(kernels, triton_device):
    row, zero = torch.tensor([[3.0, -4.0]]), torch.zeros(1, 2)
    for real, syn, gradient in [(zero, row, zero), (zero, zero, zero), (row, zero, -row / 1e-6)]:
        value, (found,) = kernels.gradient_distance(
            [syn.to(triton_device)], [real.to(triton_device)], "row_cosine", 1e-6, False, True
        )
        assert value.item() == 1
        torch.testing.assert_close(found.cpu(), gradient)


def test_empty_tensors(kernels, triton_device):
    shapes = [(0, 3), (2, 0), (1, 1), (0,)]
    syn = [torch.ones(s, device=triton_device) for s in shapes]
    for metric in METRICS:
        value, gradient = kernels.gradient_distance(syn, syn, metric, 1e-6, False, True)
        exact = reference.gradient_distance(syn, syn, metric, 1e-6, False)
        torch.testing.assert_close(value, exact)
        assert [g.shape for g in gradient] == [s.shape for s in syn]


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Element offsets over 2^31: a class stride of 2^31 + 64 over memory that is never touched."""
    stride = 2**31 + 64
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(stride + 64, dtype=torch.bfloat16, device=triton_device)
    for begin in (0, stride):
        flat[begin : begin + 64] = torch.arange(1.0, 65.0, dtype=torch.bfloat16)
    value = torch.zeros(2, device=triton_device)
    # Two programs, one a class: share is the class stride and length the 64 elements they own.
    kernels.first_kernel[(2,)](
        flat, flat, flat, flat, value, value, value, stride, 64, 1,
        METRIC=0, PHASE=0, EPS=1e-6, HAS_SCALE=False, HAS_SYN=False, HAS_REAL=False,
        ACC=kernels.tl.float32, BLOCK=64,
    )  # fmt: skip
    assert (value.abs() < 1e-5).all() and flat[stride].item() == 1


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("gradient_distance", capability)
    assert {k["name"] for k in kernels} == {"first_kernel", "second_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
