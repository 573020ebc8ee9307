"""Gates of `augment` and its adjoint: definition, derivatives, C++ kernels, the operators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ddfast
from ddfast.ops.augment import augment, augment_adjoint
from ddfast.reference import augment as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "auto"]
COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE = range(6)
# The published ranges and beyond, for images of 9 x 7: identities, shifts by the whole image and
# more, squares at both ends and larger than the image, enlargement, extreme shrinking, half a turn.
ROWS = [
    (COLOR, 0.3, 1.4, 0.8),
    (COLOR, -0.5, 0.0, 1.5),
    (COLOR, 0.0, 1.0, 1.0),
    (CROP, 1, -1, 0),
    (CROP, 0, 0, 0),
    (CROP, 0, 2, 0),
    (CROP, -8, 6, 0),
    (CROP, 9, 0, 0),
    (CROP, 0, -1e9, 0),
    (CUTOUT, 0, 0, 0.5),
    (CUTOUT, 9, 7, 0.5),
    (CUTOUT, 4, 3, 0.3),
    (CUTOUT, 4, 3, 0.0),
    (CUTOUT, 4, 3, 2.5),
    (FLIP, 1, 0, 0),
    (FLIP, 0, 0, 0),
    (SCALE, 1.2, 1 / 1.2, 0),
    (SCALE, 1.0, 1.0, 0),
    (SCALE, 1.0, 1.1, 0),
    (SCALE, 5.0, 0.1, 0),
    (SCALE, 1e9, 1e-9, 0),
    (ROTATE, math.radians(15), 0, 0),
    (ROTATE, -math.radians(11), 0, 0),
    (ROTATE, 0, 0, 0),
    (ROTATE, math.pi / 2, 0, 0),
    (ROTATE, 3.0, 0, 0),
]
SHAPES = [(2, 3, 9, 7), (1, 1, 1, 1), (2, 2, 1, 5), (1, 1, 6, 1), (3, 1, 8, 8)]


def images(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def record(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def both(x, rows, align_corners=False):
    """The operator, its linear part and its adjoint."""
    return [
        augment(x, rows, align_corners, True),
        augment(x, rows, align_corners, False),
        augment_adjoint(x, rows, align_corners),
    ]


# --- the definition ---------------------------------------------------------------------------


def literal(x, row, align_corners=False):
    """What the official operations do, in ordinary torch operations, for one row."""
    operation, first, second, third = row
    height, width = x.shape[2:]
    if operation == COLOR:
        x = x + first
        mean = x.mean(1, keepdim=True)
        x = (x - mean) * second + mean
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * third + mean
    if operation == CROP:
        pad_i, pad_j = height + 1, width + 1
        i = min(max(first, -pad_i), pad_i) + pad_i
        j = min(max(second, -pad_j), pad_j) + pad_j
        padded = F.pad(x, (pad_j, pad_j, pad_i, pad_i))
        return padded[:, :, int(i) : int(i) + height, int(j) : int(j) + width]
    if operation == CUTOUT:
        mask = torch.ones(height, width, dtype=x.dtype)
        side_i, side_j = int(height * third + 0.5), int(width * third + 0.5)
        for i in range(side_i):
            for j in range(side_j):
                r, c = int(first) + i - side_i // 2, int(second) + j - side_j // 2
                if 0 <= r < height and 0 <= c < width:
                    mask[r, c] = 0
        return x * mask
    if operation == FLIP:
        return x.flip(3) if first else x
    if operation == SCALE:
        theta = [[first, 0, 0], [0, second, 0]]
    else:
        cos, sin = math.cos(first), math.sin(first)
        theta = [[cos, -sin, 0], [sin, cos, 0]]
    theta = torch.tensor([theta] * len(x), dtype=x.dtype)
    grid = F.affine_grid(theta, list(x.shape), align_corners=align_corners)
    return F.grid_sample(x, grid, align_corners=align_corners)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior has changed")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operations_are_the_official_ones(backend, align_corners, shape):
    x = images(shape)
    for row in ROWS:
        if row[0] == SCALE and max(row) > 1e6:
            continue  # beyond what torch's own sampling handles
        with ddfast.use_backend(backend):
            found = augment(x, record(row), align_corners, True)
        expected = literal(x, row, align_corners)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_shift_and_every_square(backend):
    """All that crop and cutout can draw, and more, on a small image."""
    x = images((1, 1, 5, 4))
    rows = [(CROP, i, j, 0) for i in range(-6, 7) for j in range(-5, 6)]
    rows += [
        (CUTOUT, i, j, ratio)
        for i in range(-1, 7)
        for j in range(-1, 6)
        for ratio in (0.2, 0.5, 0.75, 1.0)
    ]
    with ddfast.use_backend(backend):
        found = augment(x.expand(len(rows), 1, 5, 4), record(*rows), False, True)
    for image, row in zip(found, rows, strict=True):
        assert torch.equal(image, literal(x, row)[0]), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_adjoint_is_the_gradient_of_the_official_operation(backend):
    for shape in SHAPES:
        x, g = images(shape).requires_grad_(), images(shape, 1)
        for row in ROWS:
            if row[0] == SCALE and max(row) > 1e6:
                continue
            (expected,) = torch.autograd.grad(literal(x, row), x, g)
            with ddfast.use_backend(backend):
                found = augment_adjoint(g, record(row), False)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_adjointness(backend, align_corners):
    """<A x, g> = <x, A^T g> for every operation, shape and extreme parameter."""
    for shape in SHAPES:
        x, g = images(shape, 2), images(shape, 3)
        for row in ROWS:
            with ddfast.use_backend(backend):
                _, linear, _ = both(x, record(row), align_corners)
                transposed = augment_adjoint(g, record(row), align_corners)
            left, right = (linear * g).sum(), (x * transposed).sum()
            size = (linear.norm() * g.norm() + x.norm() * transposed.norm()).item()
            assert abs(left - right) <= 1e-14 * size, (row, shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_is_what_does_not_depend_on_the_images(backend):
    x = images((2, 3, 9, 7))
    for row in ROWS:
        with ddfast.use_backend(backend):
            whole, linear, _ = both(x, record(row))
            constant = augment(torch.zeros_like(x), record(row), False, True)
            doubled = augment(2 * x, record(row), False, False)
        torch.testing.assert_close(whole - linear, constant, rtol=0, atol=1e-14)
        torch.testing.assert_close(doubled, 2 * linear, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturation_leaves_images_of_one_channel(backend):
    x = images((2, 1, 5, 5))
    with ddfast.use_backend(backend):
        found = augment(x, record((COLOR, 0.0, 0.3, 1.0)), False, True)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-15)


def test_moved_bits_are_the_same_bits():
    """crop, cutout and flip copy, NaN and signed zeros included, and erase NaN to zero."""
    x = images((1, 1, 4, 4), dtype=torch.float32)
    x[0, 0, 1] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    for dtype in DTYPES:
        y = x.to(dtype)
        assert_same_bits(augment(y, record((FLIP, 1, 0, 0)), False, True), y.flip(3))
        down = augment(y, record((CROP, 1, 0, 0)), False, True)
        assert_same_bits(down[:, :, :3], y[:, :, 1:])
        assert_same_bits(down[:, :, 3], torch.zeros_like(y[:, :, 3]))
        erased = augment(y, record((CUTOUT, 2, 2, 1.0)), False, True)
        assert_same_bits(erased, torch.zeros_like(y))


# --- derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [ROWS[i] for i in (0, 3, 9, 14, 16, 21)])
def test_gradcheck_to_second_order(backend, row):
    x = images((1, 2, 3, 2)).requires_grad_()
    rows = record(row)
    with ddfast.use_backend(backend):
        check_derivatives(lambda t: augment(t, rows, False, True), (x,))
        check_derivatives(lambda t: augment_adjoint(t, rows, True), (x,))
        # Two passes and something that is not linear around them.
        check_derivatives(
            lambda t: augment(augment(t, rows, False, True) ** 2, record(ROWS[21]), True, True),
            (x,),
        )


def test_definition_has_derivatives_of_its_own():
    """The reference differentiated by torch, not by our formulas."""
    rows = record(ROWS[0], ROWS[16])
    x, g = images((2, 2, 3, 2)).requires_grad_(), images((2, 2, 3, 2), 1)
    check_derivatives(lambda t: reference.augment(t, rows), (x,), order=1)
    (found,) = torch.autograd.grad(reference.augment(x, rows), x, g)
    torch.testing.assert_close(found, reference.augment_adjoint(g, rows), rtol=0, atol=1e-14)


def test_derivatives_of_every_order_stay_in_the_family():
    x, rows = images((2, 3, 9, 7)).requires_grad_(), record(*ROWS[16:18])
    g = images((2, 3, 9, 7), 1).requires_grad_()
    y = augment(x, rows, False, True)
    (first,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert_same_bits(first, augment_adjoint(g, rows, False))
    v = images((2, 3, 9, 7), 2).requires_grad_()
    (second,) = torch.autograd.grad(first, g, v, create_graph=True)
    assert_same_bits(second, augment(v, rows, False, False))
    (third,) = torch.autograd.grad(second, v, g, create_graph=True)
    assert_same_bits(third, augment_adjoint(g, rows, False))
    (fourth,) = torch.autograd.grad(third, g, x)
    assert_same_bits(fourth, augment(x, rows, False, False))


# --- the C++ kernels --------------------------------------------------------------------------


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget_at_every_level(level, dtype):
    """Widths around the blocks of four; planes fill 1, 4 and 16 lanes in part and whole."""
    for k, shape in enumerate([(1, 1, 9, 13), (2, 3, 17, 15), (1, 3, 8, 33), (6, 3, 12, 12)]):
        x = images(shape, k, dtype)
        for row in ROWS:
            for align_corners in (False, True):
                with at_level(level):
                    ours = both(x, record(row), align_corners)
                with ddfast.use_backend("reference"):
                    eager = both(x, record(row), align_corners)
                    exact = both(x.double(), record(row), align_corners)
                # float64 has no wider type to be judged by, and a source point 33 pixels away is
                # itself rounded to 32 times the rounding of 1.
                tiny = 128 if dtype == torch.float64 else 4
                assert_within_budget(ours, eager, exact, tiny=tiny)


@pytest.mark.parametrize("level", levels())
def test_error_budget_against_the_official_operations(level):
    for k, shape in enumerate([(2, 3, 32, 32), (1, 1, 28, 28), (1, 3, 15, 40)]):
        x = images(shape, k, torch.float32).requires_grad_()
        g = images(shape, k + 1, torch.float32)
        for row in ROWS[:4] + ROWS[9:12] + ROWS[14:18] + ROWS[21:24]:
            eager = literal(x, row)
            (eager_gradient,) = torch.autograd.grad(eager, x, g)
            with at_level(level):
                ours = augment(x, record(row), False, True)
                (gradient,) = torch.autograd.grad(ours, x, g)
            exact = literal(x.double(), row)
            exact_gradient = reference.augment_adjoint(g.double(), record(row))
            assert_within_budget([ours, gradient], [eager, eager_gradient], [exact, exact_gradient])


@pytest.mark.parametrize("shape", [(40, 3, 32, 32), (40, 1, 33, 30), (3, 40, 28, 28)])
def test_same_bits_for_any_number_of_threads(shape):
    x = images(shape, dtype=torch.float32)
    for row in (ROWS[0], ROWS[3], ROWS[9], ROWS[14], ROWS[16], ROWS[21]):
        siamese = record(row)
        each = siamese.repeat(shape[0], 1)
        if row[0] in (COLOR, SCALE, ROTATE):
            each[:, 1] += torch.linspace(0, 0.2, shape[0], dtype=torch.float64)
        for rows in (siamese, each):
            assert_same_bits_for_any_threads(lambda rows=rows: both(x, rows))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_gets_the_same_bits_in_any_batch(level, dtype):
    """Alone, in a siamese batch of any size, or with its row spelled out among others."""
    for channels, row in ((3, ROWS[0]), (3, ROWS[16]), (1, ROWS[21]), (2, ROWS[22]), (3, ROWS[3])):
        x = images((19, channels, 11, 10), 4, dtype)
        with at_level(level):
            whole = both(x, record(row))
            for count in (1, 2, 5, 6, 18):
                assert_same_bits(both(x[:count], record(row)), [t[:count] for t in whole])
            mixed = record(*[row if n % 3 else ROWS[(7 * n) % len(ROWS)] for n in range(19)])
            for a, b in zip(both(x, mixed), whole, strict=True):
                same = [n for n in range(19) if n % 3]
                assert_same_bits(a[same], b[same])


def test_large_planes_use_narrow_groups():
    """Beyond the size where sixteen planes side by side leave the cache; also long flat images."""
    for shape in ((6, 1, 200, 150), (3, 2, 2, 3000)):
        x = images(shape, dtype=torch.float32)
        for row in (ROWS[16], ROWS[21]):
            exact = [
                reference.augment(x.double(), record(row)),
                reference.augment_adjoint(x.double(), record(row)),
            ]
            ours = both(x, record(row))
            assert_within_budget([ours[0], ours[2]], exact, exact, tiny=16)


def test_each_image_its_own_operation():
    rows = record(*ROWS)
    x = images((len(ROWS), 3, 9, 7), 5)
    for backend in BACKENDS:
        with ddfast.use_backend(backend):
            together = both(x, rows)
            for n, row in enumerate(ROWS):
                alone = both(x[n : n + 1], record(row))
                torch.testing.assert_close(
                    [t[n : n + 1] for t in together], alone, rtol=1e-14, atol=1e-14
                )


# --- the operator -----------------------------------------------------------------------------


def test_opcheck_on_both_operators():
    x = images((2, 3, 5, 4)).requires_grad_()
    for rows in (record(ROWS[0]), record(ROWS[3]), record(ROWS[16], ROWS[21])):
        torch.library.opcheck(augment, (x, rows, False, True))
        torch.library.opcheck(augment_adjoint, (x, rows, True))
    torch.library.opcheck(augment, (x.detach(), record(ROWS[0]), True, False))
    with ddfast.use_backend("reference"):
        torch.library.opcheck(augment, (x, record(ROWS[16]), False, True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    x = images((2, 3, 8, 8)).requires_grad_()
    rows = record(ROWS[0], ROWS[21])

    def f(t, r):
        return (augment(t * 2, r, False, True) ** 2).sum()

    expected = f(x, rows)
    found = torch.compile(f, backend=compiler, fullgraph=True)(x, rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-12, atol=1e-12
    )


def test_gradient_of_a_gradient_compiled():
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("torch before 2.13 cannot trace autograd.grad")
    torch._dynamo.reset()
    x, rows = images((2, 3, 6, 5)).requires_grad_(), record(ROWS[21])

    def outer(t):
        value = (augment(t, rows, False, True) ** 3).sum()
        (gradient,) = torch.autograd.grad(value, t, create_graph=True)
        return (gradient**2).sum()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(outer, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, torch.autograd.grad(outer(x), x), rtol=1e-10, atol=1e-12)
