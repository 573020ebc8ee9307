"""Gates of the Triton kernels of `augment`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from ddfast.reference import augment as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE = range(6)
ROWS = [
    (COLOR, 0.3, 1.4, 0.8),
    (CROP, 1, -1, 0),
    (CROP, -8, 6, 0),
    (CROP, 0, 1e9, 0),
    (CUTOUT, 0, 0, 0.5),
    (CUTOUT, 9, 7, 0.5),
    (CUTOUT, 4, 3, 0.0),
    (CUTOUT, 4, 3, 2.5),
    (FLIP, 1, 0, 0),
    (FLIP, 0, 0, 0),
    (SCALE, 1.2, 1 / 1.2, 0),
    (SCALE, 1 / 1.2, 1.2, 0),
    (SCALE, 1.0, 1.0, 0),
    (SCALE, 5.0, 0.3, 0),
    (SCALE, 1e9, 1e-9, 0),
    (ROTATE, math.radians(15), 0, 0),
    (ROTATE, -math.radians(11), 0, 0),
    (ROTATE, 0, 0, 0),
    (ROTATE, math.pi / 2, 0, 0),
]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import augment

    return augment


def record(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def both(module, x, rows, align_corners=False):
    return [
        module.augment(x, rows, align_corners, True),
        module.augment(x, rows, align_corners, False),
        module.augment_adjoint(x, rows, align_corners),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_error_budget(kernels, triton_device, dtype, row):
    """Odd sizes, NaN around the images; what the kernels do is compared on the same device."""
    for shape, align_corners in (((2, 3, 9, 7), False), ((1, 2, 7, 9), True)):
        x = poisoned(shape, dtype, triton_device)
        with unchanged(x):
            ours = both(kernels, x, record(row), align_corners)
        eager = both(reference, x, record(row), align_corners)
        exact = both(reference, x.double(), record(row), align_corners)
        # The reference finds the source points in float64, the kernels in the accumulation dtype;
        # outside the published ranges those are farther away, and their rounding with them.
        published = row[0] not in (SCALE, ROTATE) or max(row[1:]) <= 1.2
        tiny = 16 if published and dtype != torch.float64 else 256
        assert_within_budget(ours, eager, exact, tiny=tiny)


def test_every_shift_and_every_square(kernels, triton_device):
    rows = [(CROP, i, j, 0) for i in (-4, -1, 0, 2, 3) for j in (-3, 0, 1, 4)]
    rows += [(CUTOUT, i, j, ratio) for i in range(-1, 5) for j in (0, 2, 3) for ratio in (0.3, 0.7)]
    x = poisoned((len(rows), 1, 4, 3), torch.float32, triton_device)
    for ours, exact in zip(
        both(kernels, x, record(*rows)), both(reference, x, record(*rows)), strict=True
    ):
        assert_same_bits(ours, exact)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 5), (1, 2, 6, 1), (1, 1, 37, 29)])
def test_shapes(kernels, triton_device, shape):
    """Sides of one pixel, and more than one block of pixels (37 x 29 = 1024 + 49)."""
    x = poisoned(shape, torch.float64, triton_device)
    for row in [ROWS[i] for i in (0, 1, 4, 8, 10, 15)]:
        for align_corners in (False, True):
            ours = both(kernels, x, record(row), align_corners)
            exact = both(reference, x, record(row), align_corners)
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_adjointness(kernels, triton_device):
    x, g = (poisoned((len(ROWS), 1, 5, 4), torch.float64, triton_device) for _ in range(2))
    g = g.flip(0).contiguous()
    for align_corners in (False, True):
        _, linear, _ = both(kernels, x, record(*ROWS), align_corners)
        transposed = kernels.augment_adjoint(g, record(*ROWS), align_corners)
        left, right = (linear * g).sum((1, 2, 3)), (x * transposed).sum((1, 2, 3))
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def test_each_image_its_own_operation_and_the_same_bits_in_any_batch(kernels, triton_device):
    x = poisoned((len(ROWS), 1, 5, 4), torch.float32, triton_device)
    together = both(kernels, x, record(*ROWS))
    # The adjoint's window is the widest of the batch, and what it adds beyond a row's own is zero.
    for n, row in enumerate(ROWS):
        alone = both(kernels, x[n : n + 1], record(row))
        assert_same_bits([t[n : n + 1] for t in together], alone)
    assert_same_bits(both(kernels, x, record(*ROWS)), together)


def test_copies_move_bits(kernels, triton_device):
    for dtype in DTYPES:
        x = poisoned((1, 1, 4, 4), dtype, triton_device)
        x[0, 0, 1] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
        flipped, _, _ = both(kernels, x, record((FLIP, 1, 0, 0)))
        assert_same_bits(flipped, x.flip(3))
        erased, _, _ = both(kernels, x, record((CUTOUT, 2, 2, 1.0)))
        assert_same_bits(erased, torch.zeros_like(x))


def test_layouts_and_empty_batches(kernels, triton_device):
    base = poisoned((2, 4, 6, 8), torch.float32, triton_device)
    for x in (base.transpose(2, 3), base[:1].expand(2, 4, 6, 8), base[:, ::2, 1:5, ::3]):
        for row in (ROWS[0], ROWS[1], ROWS[10]):
            assert_same_bits(
                both(kernels, x, record(row)), both(kernels, x.contiguous(), record(row))
            )
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        x = torch.zeros(shape, device=triton_device)
        for result in both(kernels, x, record(ROWS[0])):
            assert result.shape == shape


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Element offsets over 2^31: a plane stride of 2^31 + 64 over memory that is never touched."""
    stride = 2**31 + 64
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    x, out = (
        torch.empty(stride + 64, dtype=torch.bfloat16, device=triton_device) for _ in range(2)
    )
    values = torch.arange(1.0, 65.0, dtype=torch.bfloat16)
    x[:64], x[stride:] = 0, values
    # Height 1, width 64, two planes of one image; block size one plane.
    arguments = (1, 2, 1, 64, stride, 1)
    acc = {"ACC": kernels.tl.float32, "BLOCK": 64}

    def table(row):
        filled, _, window = kernels._table(
            record(row).numpy(), torch.Size((1, 2, 1, 64)), False, True, False
        )
        return torch.from_numpy(filled).float().to(triton_device), window

    kernels.copy_kernel[(2,)](x, out, table((FLIP, 1, 0, 0))[0], *arguments, BLOCK=64)
    assert_same_bits(out[stride:], values.flip(0).to(triton_device))
    identity, window = table((SCALE, 1, 1, 0))
    kernels.resample_kernel[(2,)](x, out, identity, *arguments, **acc)
    assert_same_bits(out[stride:], values.to(triton_device))
    out[stride:] = 0
    kernels.resample_adjoint_kernel[(2,)](x, out, identity, *arguments, *window, SLACK=0.01, **acc)
    assert_same_bits(out[stride:], values.to(triton_device))
    mean = torch.zeros(1, device=triton_device)
    kernels.color_kernel[(1,)](
        x, out, table((COLOR, 1, 1, 1))[0], mean, 1, 2, stride, 1, ACC=kernels.tl.float32, BLOCK=64
    )
    assert_same_bits(out[stride:], (values + 1).to(triton_device))


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("augment", capability)
    assert {k["name"] for k in kernels} == {
        "mean_kernel",
        "color_kernel",
        "copy_kernel",
        "resample_kernel",
        "resample_adjoint_kernel",
    }
    assert all(k["spilled"] == 0 for k in kernels), kernels


@pytest.mark.gpu
def test_the_operator_runs_them_on_a_gpu():
    from ddfast.ops.augment import augment, augment_adjoint

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    for row in ROWS:
        leaf = x.cuda().requires_grad_()
        y = augment(leaf, record(row), False, True)
        (gradient,) = torch.autograd.grad(y, leaf, x.cuda())
        on_cpu = [augment(x, record(row), False, True), augment_adjoint(x, record(row), False)]
        torch.testing.assert_close([y.cpu(), gradient.cpu()], on_cpu, rtol=1e-4, atol=1e-4)
        again = augment(leaf, record(row), False, True)
        assert_same_bits(again, y)
