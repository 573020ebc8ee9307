"""`ddfast.augment`: what is drawn, how it is applied, and the errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ddfast.augment import DSA, OPERATIONS, apply
from ddfast.testing import assert_same_bits, unchanged

EVERY = "color_crop_cutout_flip_scale_rotate"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def rows_of(strategy, count=4000, size=(32, 24), **parameters):
    """Many rows of one operation, without the operation's column."""
    draw = DSA(strategy, **parameters).draw(generator(), size, count)
    assert draw.shape == (1, count, 4)
    assert (draw[0, :, 0] == OPERATIONS.index(strategy)).all()
    return draw[0, :, 1:]


# --- what is drawn ----------------------------------------------------------------------------


def spread(values, low, high):
    """Assert that values fill [low, high) evenly."""
    assert low <= values.min() and values.max() < high
    histogram = torch.histc(values, 8, low, high) / len(values)
    assert (histogram - 1 / 8).abs().max() < 0.025


def test_color():
    rows = rows_of("color")
    spread(rows[:, 0], -0.5, 0.5)
    spread(rows[:, 1], 0.0, 2.0)
    spread(rows[:, 2], 0.5, 1.5)
    # Independent of each other.
    assert (torch.corrcoef(rows.T) - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize(("side", "limit"), [(28, 4), (32, 4), (64, 8), (128, 16), (224, 28)])
def test_crop_shifts_as_published(side, limit):
    rows = rows_of("crop", size=(side, 24))
    assert sorted(rows[:, 0].unique().tolist()) == list(range(-limit, limit + 1))
    assert sorted(rows[:, 1].unique().tolist()) == [-3, -2, -1, 0, 1, 2, 3]
    counts = (rows[:, 0, None] == torch.arange(-limit, limit + 1)).sum(0) / len(rows)
    assert (counts * (2 * limit + 1) - 1).abs().max() < 0.4


@pytest.mark.parametrize("ratio", [0.5, 0.41])
def test_cutout_offsets_reach_both_ends(ratio):
    """An even square may stick out by half at both ends, an odd one has a centre pixel."""
    rows = rows_of("cutout", size=(32, 9), ratio_cutout=ratio)
    for column, side in ((0, 32), (1, 9)):
        last = side - int(side * ratio + 0.5) % 2
        assert sorted(rows[:, column].unique().tolist()) == list(range(last + 1))
    assert (rows[:, 2] == ratio).all()


def test_flip_scale_rotate():
    assert abs(rows_of("flip")[:, 0].mean() - 0.5) < 0.03
    assert abs(rows_of("flip", prob_flip=0.1)[:, 0].mean() - 0.1) < 0.03
    scale = rows_of("scale")
    spread(scale[:, 0], 1 / 1.2, 1.2)
    spread(scale[:, 1], 1 / 1.2, 1.2)
    assert abs(torch.corrcoef(scale[:, :2].T)[0, 1]) < 0.05
    spread(rows_of("rotate")[:, 0], -math.radians(15), math.radians(15))


def test_single_mode_draws_one_operation_uniformly():
    dsa, source = DSA(EVERY), generator()
    seen = torch.stack([dsa.draw(source, (8, 8))[0, 0, 0] for _ in range(1200)])
    assert (torch.bincount(seen.long(), minlength=6) / 200 - 1).abs().max() < 0.25
    many = dsa.draw(source, (8, 8), 50)
    assert many.shape == (1, 50, 4) and len(many[0, :, 0].unique()) == 1
    assert len(many[0].unique(dim=0)) > 1
    independent = dsa.draw(source, (8, 8), 200, independent=True)
    assert len(independent[0, :, 0].unique()) == 6


def test_multiple_mode_draws_every_operation_in_order():
    dsa = DSA("rotate_color_rotate", mode="M")
    draw = dsa.draw(generator(), (8, 8), 3)
    assert draw.shape == (3, 3, 4) and draw.dtype == torch.float64
    assert draw[:, :, 0].tolist() == [[5.0] * 3, [0.0] * 3, [5.0] * 3]
    assert not torch.equal(draw[0], draw[2])


def test_combined_mode_is_flip_and_color_then_one_of_three_then_cutout():
    dsa = DSA("scale_cutout_color_crop_rotate_flip", mode="C")
    flip, color, cutout = (float(OPERATIONS.index(n)) for n in ("flip", "color", "cutout"))
    one = {float(OPERATIONS.index(name)) for name in ("crop", "scale", "rotate")}
    found = []
    for seed in range(60):
        draw = dsa.draw(generator(seed), (8, 8), 5)
        assert draw.shape == (4, 5, 4) and (draw[2, :, 0] == draw[2, 0, 0]).all()
        assert draw[[0, 1, 3], 0, 0].tolist() == [flip, color, cutout]
        assert len(draw[1].unique(dim=0)) == 5  # parameters of their own
        found.append(draw[2, 0, 0].item())
    assert {value: found.count(value) > 10 for value in one} == dict.fromkeys(one, True)
    rows = dsa.draw(generator(), (8, 8), 60, independent=True)
    assert set(rows[2, :, 0].tolist()) == one
    # As matching in IDC has it: no choice is left.
    draw = DSA("color_crop_cutout", mode="C").draw(generator(), (8, 8))
    crop = OPERATIONS.index("crop")
    assert draw[:, 0, 0].tolist() == [color, crop, cutout]
    x = images(3, 3, 8, 8)
    expected = x
    for record in draw:
        expected = apply(expected, record[None])
    assert_same_bits(dsa(x, draw), expected)


def test_draws_depend_on_the_generator_only():
    for dsa in (DSA(), DSA(mode="M"), DSA(mode="C")):
        first = dsa.draw(generator(3), (32, 32), 4)
        assert_same_bits(first, dsa.draw(generator(3), (32, 32), 4))
        assert not torch.equal(first, dsa.draw(generator(4), (32, 32), 4))
    # How far the generator moves does not depend on the operation drawn or on the size.
    sources = [generator(5), generator(5)]
    DSA("flip").draw(sources[0], (32, 32))
    DSA("color").draw(sources[1], (9, 5))
    assert torch.equal(sources[0].get_state(), sources[1].get_state())


@pytest.mark.parametrize("strategy", ["", "none", "None", None])
@pytest.mark.parametrize("mode", ["S", "M", "C"])
def test_identity(strategy, mode):
    dsa = DSA(strategy, mode=mode)
    draw = dsa.draw(generator(), (8, 8), 2)
    assert draw.shape == (0, 2, 4) and dsa.operations == ()
    x = images(2, 3, 8, 8)
    assert dsa(x, draw) is x


# --- how it is applied ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["S", "M"])
def test_siamese(mode):
    """Real and synthetic images get the same, whatever their number."""
    dsa, x = DSA(mode=mode), images(7, 3, 12, 10)
    for seed in range(12):
        draw = dsa.draw(generator(seed), (12, 10))
        with unchanged(x, draw):
            whole = dsa(x, draw)
        assert not torch.equal(whole, x) or draw[0, 0, 0] in (1, 3)
        assert_same_bits(dsa(x[2:3], draw), whole[2:3])


def test_every_image_its_own_row():
    dsa, x = DSA(), images(7, 3, 12, 10)
    for seed in range(12):
        draw = dsa.draw(generator(seed), (12, 10), 7, independent=seed % 2 == 0)
        whole = dsa(x, draw)
        for n in range(7):
            assert_same_bits(dsa(x[n : n + 1], draw[:, n : n + 1]), whole[n : n + 1])


@pytest.mark.parametrize("mode", ["S", "M"])
def test_one_row_per_class(mode):
    dsa, counts = DSA(mode=mode), [3, 0, 2, 4]
    x = images(9, 3, 12, 10)
    for seed in range(8):
        draw = dsa.draw(generator(seed), (12, 10), 4, independent=True)
        parts = [
            dsa(part, draw[:, i : i + 1]) for i, part in enumerate(x.split(counts)) if len(part)
        ]
        assert_same_bits(dsa(x, draw, counts), torch.cat(parts))
    single = dsa.draw(generator(), (12, 10))
    assert_same_bits(dsa(x, single, [9]), dsa(x, single))


def test_multiple_mode_is_one_pass_after_another():
    dsa, x = DSA("color_scale_crop", mode="M"), images(4, 3, 12, 10)
    draw = dsa.draw(generator(), (12, 10), 4)
    expected = x
    for record in draw:
        expected = apply(expected, record[None])
    assert_same_bits(dsa(x, draw), expected)


def test_align_corners_is_passed_on():
    x = images(2, 3, 12, 10)
    for strategy in ("scale", "rotate"):
        old, new = DSA(strategy, align_corners=True), DSA(strategy)
        draw = new.draw(generator(), (12, 10))
        assert_same_bits(old(x, draw), apply(x, draw, align_corners=True))
        assert old(x, draw).isfinite().all()
    # Scaling about the centre is the same for both; rotation of a rectangle is not.
    assert not torch.equal(old(x, draw), new(x, draw))


def test_gradients_reach_the_images():
    dsa, x = DSA(mode="M"), images(3, 2, 6, 5, dtype=torch.float64).requires_grad_()
    draw = dsa.draw(generator(1), (6, 5), 3)
    v = images(3, 2, 6, 5, seed=1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((dsa(x, draw) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient, x, v)
    step = 1e-6
    with torch.no_grad():
        values = [(dsa(x + s * v, draw) ** 2).sum() for s in (-step, step)]
    slope = (values[1] - values[0]) / (2 * step)
    torch.testing.assert_close((gradient * v).sum(), slope, rtol=1e-8, atol=0)
    # The function is quadratic, and the second derivative along v is 2 |A v|^2.
    linear = dsa(v, draw) - dsa(torch.zeros_like(v), draw)
    torch.testing.assert_close((second * v).sum(), 2 * (linear**2).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype):
    x = images(2, 3, 8, 8, dtype=dtype)
    assert DSA()(x, DSA().draw(generator(), (8, 8))).dtype == dtype


def test_torch_compile():
    torch._dynamo.reset()
    dsa, x = DSA(), images(4, 3, 8, 8).requires_grad_()
    draw = dsa.draw(generator(2), (8, 8), 2, independent=True)

    def f(t):
        return (dsa(t, draw, [1, 3]) ** 2).sum()

    found = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, f(x))
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(f(x), x))


# --- errors -----------------------------------------------------------------------------------


def test_the_settings_are_the_published_ones():
    published = {
        "prob_flip": 0.5,
        "ratio_scale": 1.2,
        "ratio_rotate": 15,
        "ratio_crop_pad": 0.125,
        "ratio_cutout": 0.5,
        "brightness": 1,
        "saturation": 2,
        "contrast": 0.5,
        "mode": "S",
        "strategy": EVERY,
        "align_corners": False,
    }
    assert dataclasses.asdict(DSA()) == published


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "color_blur"}, ValueError, "'blur'.*color, crop, cutout"),
        ({"strategy": "color__crop"}, ValueError, "unknown operation ''"),
        ({"strategy": 3}, TypeError, "strategy: got int"),
        ({"mode": "X"}, ValueError, "mode: got 'X'"),
        ({"prob_flip": 1.5}, ValueError, "prob_flip: got 1.5"),
        ({"ratio_scale": 0}, ValueError, "ratio_scale: got 0"),
        ({"ratio_rotate": float("nan")}, ValueError, "ratio_rotate: got nan"),
        ({"brightness": -1}, ValueError, "brightness: got -1"),
        ({"contrast": "high"}, TypeError, "contrast: got 'high'"),
    ],
)
def test_wrong_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        DSA(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((7, (8, 8)), TypeError, "generator: got int"),
        ((None, (8, 8)), TypeError, "generator: got NoneType"),
        ((torch.Generator(), (8,)), ValueError, "size: got"),
        ((torch.Generator(), (8, 0)), ValueError, "size: got"),
        ((torch.Generator(), (8, 8), 0), ValueError, "count: got 0"),
    ],
)
def test_wrong_draws(arguments, error, message):
    with pytest.raises(error, match=message):
        DSA().draw(*arguments)


@pytest.mark.parametrize(
    ("x", "rows", "counts", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1, None, TypeError, r"x: got torch\.uint8"),
        ([0.0], 1, None, TypeError, "x: got list"),
        (torch.zeros(3, 8, 8), 1, None, ValueError, r"x: got shape \(3, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8), 2, None, ValueError, "got 2 rows, expected 1 or 3"),
        (torch.zeros(3, 1, 8, 8), 2, [3], ValueError, "counts: got 1, expected 2"),
        (torch.zeros(3, 1, 8, 8), 2, [3, 1], ValueError, "sum 3"),
        (torch.zeros(3, 1, 8, 8), 2, [4, -1], ValueError, "integers >= 0"),
        (torch.zeros(3, 1, 8, 8), 1, [2], ValueError, "sum 3"),
    ],
)
def test_wrong_batches(x, rows, counts, error, message):
    draw = DSA().draw(generator(), (8, 8), rows)
    with pytest.raises(error, match=message):
        apply(x, draw, counts)


def test_wrong_draw_tensors():
    x, draw = torch.zeros(2, 1, 4, 4), DSA("color").draw(generator(), (4, 4))
    for wrong, error in (
        (draw[0], ValueError),
        (draw.float(), ValueError),
        (draw[..., :3], ValueError),
        (draw.clone().requires_grad_(), ValueError),
        (draw.tolist(), TypeError),
    ):
        with pytest.raises(error, match="draw: "):
            apply(x, wrong)
    wrong = draw.clone()
    wrong[0, 0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"record\[0\]: got \[0.0, "):
        apply(x, wrong)
