from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ddfast
from ddfast.data import Dataset
from ddfast.random import generator
from ddfast.synthetic.multi_formation import (
    decode,
    decoded_count,
    initialise,
    quadrants,
    subsample,
)


def images(n, channels=2, height=6, width=6, dtype=torch.float64):
    drawn = torch.rand(n, channels, height, width, generator=generator(n, "images"))
    return drawn.to(dtype)


def zoom(x, factor):
    """The published decoding of a square image set by one factor, from its description."""
    side = x.shape[-1]
    if side % factor:
        x = F.pad(x, (0, factor - side % factor, 0, factor - side % factor), value=0.5)
    crop = math.ceil(side / factor)
    crops = [
        x[:, :, i : i + crop, j : j + crop]
        for i in range(0, factor * crop, crop)
        for j in range(0, factor * crop, crop)
    ]
    return F.interpolate(torch.cat(crops), size=(side, side), mode="bilinear")


def greedy(n, factor, bound):
    """The published mix, as its arithmetic goes: (factor, images)."""
    left, decoded, room, parts = n, 0, bound - n, []
    for each in range(factor, 0, -1):
        count = min(room // each**2, left) if each > 1 else left
        parts.append((each, count))
        left, decoded = left - count, decoded + count * each**2
        room = bound - decoded - left
    return parts


def same_set(found, expected):
    """Equal but for the order of the images."""
    a, b = (x.flatten(1).sum(1).sort() for x in (found, expected))
    torch.testing.assert_close(found[a.indices], expected[b.indices], rtol=1e-12, atol=1e-12)


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "factor"), [(6, 2), (6, 3), (7, 2), (8, 3), (7, 3), (6, 4)])
def test_single_is_the_published_decoding_class_by_class(side, factor):
    counts = [3, 1, 2]
    x = images(6, height=side, width=side)
    labels = torch.tensor([4, 4, 4, 0, 2, 2])
    decoded, repeated, sizes = decode(x, labels, factor)
    assert sizes == [c * factor**2 for c in counts]
    assert repeated.tolist() == [
        v for v, c in ((4, 3), (0, 1), (2, 2)) for _ in range(c * factor**2)
    ]
    for mine, part in zip(decoded.split(sizes), x.split(counts), strict=True):
        crops = zoom(part, factor).view(factor**2, len(part), *part.shape[1:]).transpose(0, 1)
        torch.testing.assert_close(mine, crops.reshape(mine.shape), rtol=1e-12, atol=1e-12)


def test_multi_takes_every_factor_from_one_on():
    x, labels = images(3, height=7, width=7), torch.tensor([0, 0, 1])
    decoded, repeated, sizes = decode(x, labels, 3, "multi")
    assert sizes == [28, 14] and repeated.tolist() == [0] * 28 + [1] * 14
    for mine, part in zip(decoded.split(sizes), x.split([2, 1]), strict=True):
        by_factor = mine.split([len(part) * f * f for f in (1, 2, 3)])
        for factor, each in enumerate(by_factor, 1):
            same_set(each, zoom(part, factor))


@pytest.mark.parametrize(
    ("n", "factor", "bound"), [(20, 3, 128), (10, 2, 20), (5, 3, 128), (7, 4, 30)]
)
def test_bound_is_the_published_mix(n, factor, bound):
    x, labels = images(2 * n + 1), torch.tensor([0] * n + [1] * n + [2])
    decoded, repeated, sizes = decode(x, labels, factor, "bound", [n, n, 1], bound)
    assert max(sizes) <= bound and sizes[0] == decoded_count(n, factor, "bound", bound)
    assert torch.equal(repeated.bincount(), torch.tensor(sizes))
    for c in range(2):
        first = c * n
        mine = decoded[sum(sizes[:c]) : sum(sizes[: c + 1])]
        at = 0
        for each, count in greedy(n, factor, bound):
            part = x[first : first + count]
            if count:
                same_set(mine[at : at + count * each**2], zoom(part, each))
            first, at = first + count, at + count * each**2
        assert at == len(mine)


def test_counts_of_decoded_images():
    assert decoded_count(10, 1) == decoded_count(10, 1, "multi") == 10
    assert decoded_count(10, 2) == 40 and decoded_count(10, 3, "multi") == 10 * (1 + 4 + 9)
    assert decoded_count(20, 3, "bound") == 12 * 9 + 3 * 4 + 5
    assert decoded_count(10, 3, "bound") == 10 * 9
    assert decoded_count(0, 2, "bound") == 0
    for ipc in range(1, 140):
        for factor in (2, 3, 5):
            found = decoded_count(ipc, factor, "bound")
            assert found <= max(ipc, 128) and found >= ipc
            expected = sum(n * f * f for f, n in greedy(ipc, factor, 128)) if ipc <= 128 else ipc
            assert found == expected, (ipc, factor)


@pytest.mark.parametrize("kind", ["single", "multi", "bound"])
def test_gradient(kind):
    """Against differentiating the published decoding of each class."""
    counts, bound = [3, 0, 2], 8
    x = images(5, height=5, width=5).requires_grad_()
    labels = torch.tensor([0, 0, 0, 2, 2])
    decoded, _, sizes = decode(x, labels, 2, kind, counts, bound)
    expected = []
    for part in x.split(counts):
        if kind == "single":
            expected.append(zoom(part, 2))
        elif kind == "multi":
            expected += [part, zoom(part, 2)]
        else:
            n = greedy(len(part), 2, bound)[0][1]
            expected += [zoom(part[:n], 2), part[n:]]
    expected = torch.cat(expected)
    assert len(expected) == len(decoded) == sum(sizes) and sizes[1] == 0
    # A function of each image that does not depend on their order.
    gradients = [torch.autograd.grad((v**3).sum(), x)[0] for v in (decoded, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "multi", "bound"])
def test_factor_one_gives_back_the_very_same(kind):
    x, labels = images(3), torch.tensor([0, 1, 1])
    decoded, same_labels, sizes = decode(x, labels, 1, kind)
    assert decoded is x and same_labels is labels and sizes == [1, 2]


def test_neighbouring_classes_with_the_same_label_can_be_told_apart():
    x, labels = images(3), torch.zeros(3, dtype=torch.int64)
    assert decode(x, labels, 2)[2] == [12]
    assert decode(x, labels, 2, counts=[1, 2])[2] == [4, 8]


def test_empty_set():
    x, labels = images(3)[:0], torch.zeros(0, dtype=torch.int64)
    for kind in ("single", "multi", "bound"):
        decoded, _, sizes = decode(x, labels, 2, kind, [0, 0])
        assert decoded.shape == x.shape and sizes == [0, 0]


def test_reference_and_kernels_agree_on_any_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        x, labels = images(4, dtype=dtype), torch.tensor([0, 0, 1, 1])
        ours = decode(x, labels, 3, "bound", bound=10)[0]
        with ddfast.use_backend("reference"):
            expected = decode(x, labels, 3, "bound", bound=10)[0]
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected)


def test_wrong_arguments_are_named():
    x, labels = images(3), torch.tensor([0, 0, 1])
    for error, message, arguments in (
        (ValueError, "factor: got 0", (x, labels, 0)),
        (TypeError, "factor: got 2.0", (x, labels, 2.0)),
        (ValueError, "kind: got 'double', expected one of single", (x, labels, 2, "double")),
        (ValueError, "bound: got 0", (x, labels, 2, "bound", None, 0)),
        (ValueError, r"counts: got \[1, 1\], .* sum 3", (x, labels, 2, "single", [1, 1])),
        (ValueError, r"labels: got shape \(2,\), expected \(3,\)", (x, labels[:2], 2)),
        (ValueError, r"images: got torch.int64 .*", (x.long(), labels, 2)),
        (ValueError, r"images: got .*\(2, 6, 6\)", (x[0], labels, 2)),
    ):
        with pytest.raises(error, match=message):
            decode(*arguments)
    with pytest.raises(ValueError, match="ipc: got -1"):
        decoded_count(-1, 2)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda t: decode(t, labels, 2)[0].sum())(x)


# --- subsampling --------------------------------------------------------------------------------


def test_subsample_draws_without_replacement_in_each_large_class():
    labels = torch.arange(4).repeat_interleave(torch.tensor([5, 2, 0, 9]))
    labels[7:] = 3
    x = torch.arange(16.0).view(16, 1, 1, 1)
    few, few_labels, sizes = subsample(x, labels, [5, 2, 0, 9], 4, generator(0, "subsample"))
    assert sizes == [4, 2, 0, 4] and few_labels.tolist() == [0] * 4 + [1] * 2 + [3] * 4
    values = few.flatten().long()
    assert len(values.unique()) == 10
    assert torch.equal(labels[values], few_labels) and values[4:6].tolist() == [5, 6]
    again = subsample(x, labels, [5, 2, 0, 9], 4, generator(0, "subsample"))[0]
    other = subsample(x, labels, [5, 2, 0, 9], 4, generator(1, "subsample"))[0]
    assert torch.equal(few, again) and not torch.equal(few, other)


def test_subsample_is_uniform_and_its_gradient_reaches_only_what_was_drawn():
    x = torch.zeros(6, 1, 1, 1, requires_grad=True)
    labels, source, hits = (
        torch.zeros(6, dtype=torch.int64),
        generator(0, "uniform"),
        torch.zeros(6),
    )
    for _ in range(600):
        few, _, _ = subsample(x, labels, [6], 2, source)
        hits += torch.autograd.grad(few.sum(), x)[0].flatten()
    assert hits.sum() == 1200 and (hits - 200).abs().max() < 60  # five standard deviations


@pytest.mark.parametrize("most", [5, 100, 0, -1])
def test_subsample_leaves_small_classes_alone(most):
    x, labels, source = images(5), torch.zeros(5, dtype=torch.int64), generator(0, "none")
    state = source.get_state()
    few, few_labels, sizes = subsample(x, labels, [5], most, source)
    assert few is x and few_labels is labels and sizes == [5]
    assert torch.equal(state, source.get_state())


# --- the first images ---------------------------------------------------------------------------


def dataset(height=8, width=8, per_class=30, channels=1):
    """Two classes in turn; every image has one value, its position."""
    n = 2 * per_class
    values = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return Dataset(
        name="flat",
        train_images=values.expand(n, channels, height, width).contiguous(),
        train_labels=torch.arange(n) % 2,
        test_images=torch.zeros(1, channels, height, width, dtype=torch.uint8),
        test_labels=torch.zeros(1, dtype=torch.int64),
        class_names=("even", "odd"),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )


def test_random_is_the_first_images_unless_asked_otherwise():
    data, source = dataset(), generator(0, "init")
    state = source.get_state()
    found, labels = initialise(data, 3, "random", 1, source)
    assert torch.equal(found[:, 0, 0, 0], torch.tensor([0, 2, 4, 1, 3, 5]) / 255)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and found.dtype == torch.float32
    assert torch.equal(state, source.get_state())
    drawn, _ = initialise(data, 3, "random", 1, source, selection="random")
    positions = (drawn[:, 0, 0, 0] * 255).round().long()
    assert (positions % 2).tolist() == labels.tolist() and len(positions.unique()) == 6
    assert not torch.equal(drawn, found)


def test_mix_fills_the_cells_image_after_image():
    found, labels = initialise(dataset(channels=2), 2, "mix", 2, generator(0, "init"))
    values = (found * 255).round().long()
    # Cell k of stored image i holds image k * ipc + i of the class.
    for stored, (c, i) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        for k, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
            cell = values[stored, :, top : top + 4, left : left + 4]
            assert (cell == 2 * (2 * k + i) + c).all()
    assert labels.tolist() == [0, 0, 1, 1]


def test_mix_shrinks_by_nearest_neighbour():
    data = dataset(height=6, width=6)
    picture = torch.arange(36, dtype=torch.uint8).view(6, 6)
    data.train_images[0, 0] = picture
    found, _ = initialise(data, 1, "mix", 2, generator(0, "init"))
    assert torch.equal(found[0, 0, :3, :3], picture[::2, ::2] / 255)


@pytest.mark.parametrize(
    ("side", "factor"), [(8, 3), (9, 4), (10, 4), (7, 3), (4, 3), (8, 2), (7, 2), (5, 4), (64, 3)]
)
def test_a_crop_holds_one_image_and_grey(side, factor):
    """Decoding must not see parts of two images, for the sides where the published cells fail."""
    data = dataset(height=side, width=side)
    stored, labels = initialise(data, 1, "mix", factor, generator(0, "init"))
    published, _ = initialise(data, 1, "mix", factor, generator(0, "init"), cells="published")
    rest = side % factor
    assert torch.equal(stored, published) == (not 0 < rest < factor - 1)
    crop = -(-side // factor)
    padded = F.pad(stored, (0, factor * crop - side) * 2, value=0.5)
    for p in range(factor):
        for q in range(factor):
            cell = padded[0, 0, p * crop : (p + 1) * crop, q * crop : (q + 1) * crop]
            values = set((cell * 255).unique().tolist())
            assert values <= {2.0 * (p * factor + q), 127.5}
    decoded, _, _ = decode(stored, labels, factor)
    assert (decoded[0] - stored[0, 0, 0, 0]).abs().max() < 1e-6


def test_published_cells():
    """64 / 3: 22, 21 and 21 pixels, while crops begin at 0, 22 and 44."""
    data = dataset(height=64, width=64)
    stored, _ = initialise(data, 1, "mix", 3, generator(0, "init"), cells="published")
    row = (stored[0, 0, 0] * 255).round()
    assert [int((row == v).sum()) for v in (0, 2, 4)] == [22, 21, 21]


def test_noise():
    found, labels = initialise(dataset(channels=3), 100, "noise", 2, generator(3, "init"))
    assert found.shape == (200, 3, 8, 8) and labels.bincount().tolist() == [100, 100]
    assert found.min() == 0 and found.max() == 1
    values = found.double().flatten()
    # 38 400 numbers; 0.25 times a standard normal cut off at two standard deviations.
    assert abs(values.mean() - 0.5) < 0.0065
    assert abs(((values - 0.5).abs() < 0.25).double().mean() - 0.6827) < 0.012
    assert abs((values == 0).double().mean() - 0.02275) < 0.004
    assert not torch.equal(
        found, initialise(dataset(channels=3), 100, "noise", 2, generator(4, "init"))[0]
    )


def test_wrong_options_and_small_classes_are_named():
    data, source = dataset(), generator(0, "init")
    for message, arguments in (
        ("init must be one of random, mix, noise; got 'real'", (1, "real", 2, source)),
        ("selection must be one of first, random; got 'all'", (1, "mix", 2, source, "all")),
        ("cells must be one of crops, published; got", (1, "mix", 2, source, "first", "x")),
        ("ipc must be at least 1, got 0", (0, "noise", 2, source)),
        ("factor: got 0", (1, "noise", 0, source)),
        (r"class 0 \(even\) of flat has 30 training images, fewer than", (8, "mix", 2, source)),
        (r"class 0 \(even\) of flat has 30 .*ipc 32", (8, "mix", 2, source, "random")),
        (r"class 0 \(even\) of flat has 30 training images", (31, "random", 1, source)),
    ):
        with pytest.raises(ValueError, match=message):
            initialise(data, *arguments)


# --- IDM's quadrants ----------------------------------------------------------------------------


def test_quadrants_are_the_crops_of_factor_two_in_another_order():
    images = torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 1, 1])
    made, repeated = quadrants(images, labels)
    assert repeated.tolist() == [0, 1, 1] * 4
    cells = [images[:, :, y : y + 4, x : x + 3] for x in (0, 3) for y in (0, 4)]
    expected = torch.cat([F.interpolate(c, scale_factor=2, mode="bilinear") for c in cells])
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)

    crops, others, _ = decode(images, labels, 2)
    # Of an image: top left, top right, bottom left, bottom right.
    order = [3 * [0, 2, 1, 3].index(p) + n for n in range(3) for p in range(4)]
    assert torch.equal(made[order], crops) and torch.equal(repeated[order], others)


def test_quadrants_of_an_odd_side():
    images = torch.ones(1, 1, 5, 5)
    made, _ = quadrants(images, torch.tensor([0]))
    assert made.shape == (4, 1, 5, 5)
    assert (made[0] == 1).all() and made[3, 0, -1, -1] == 0  # continued with zeros
