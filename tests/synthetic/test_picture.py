from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddfast.data import denormalise, load, normalise
from ddfast.random import generator
from ddfast.synthetic import grid, pixels, write_png

MEAN, STD = (0.25, 0.5, 0.75), (0.5, 0.25, 1.0)


def read(path):
    """Pillow checks signature, lengths and check sums on the way."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.mode, np.asarray(image)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_png_round_trip(tmp_path_factory, height, width, colour):
    shape = (height, width, 3) if colour else (height, width)
    values = torch.randint(256, shape, generator=generator(0, "png", height, width))
    expected = values.numpy().astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / "round.png"
    assert write_png(path, expected) == path
    mode, got = read(path)
    assert mode == ("RGB" if colour else "L")
    assert np.array_equal(got, expected)


def test_png_of_a_view(tmp_path):
    values = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(3, 4, 5).transpose(1, 2, 0)[::-1]
    _, got = read(write_png(tmp_path / "a.png", values))
    assert np.array_equal(got, values)


def test_png_errors(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(TypeError, match=r"uint8, got float64"):
        write_png(path, np.zeros((2, 2)))
    for shape in ((2,), (2, 2, 4), (0, 2), (2, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"must have shape"):
            write_png(path, np.zeros(shape, np.uint8))
    assert not path.exists()


def uint8_images(number, channels, height, width):
    shape = (number, channels, height, width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator(0, "grid", *shape))


def test_a_row_for_each_class_in_label_order(tmp_path):
    original = uint8_images(6, 3, 50, 60)
    labels = torch.tensor([4, 1, 4, 1, 4, 9])
    images = normalise(original, MEAN, STD)
    kept = images.clone()
    path = grid(images, labels, MEAN, STD, tmp_path / "grid.png")
    mode, picture = read(path)
    assert mode == "RGB"
    # Two pixels of white before, between and after; three rows of up to three images.
    assert picture.shape == (3 * 52 + 2, 3 * 62 + 2, 3)
    rest = np.ones(picture.shape, bool)
    for row, members in enumerate([[1, 3], [0, 2, 4], [5]]):
        for column, member in enumerate(members):
            area = slice(row * 52 + 2, row * 52 + 52), slice(column * 62 + 2, column * 62 + 62)
            assert np.array_equal(picture[area], original[member].permute(1, 2, 0).numpy())
            rest[area] = False
    assert (picture[rest] == 255).all()
    assert torch.equal(images, kept)


def test_small_grey_images_are_enlarged_pixel_by_pixel(tmp_path):
    original = uint8_images(2, 1, 8, 10)
    images = normalise(original, (0.3,), (0.4,))
    path = grid(images, torch.tensor([1, 0]), (0.3,), (0.4,), tmp_path / "grid.png")
    mode, picture = read(path)
    assert mode == "L"
    assert picture.shape == (2 * 50 + 2, 62 + 2)
    for row, member in enumerate((1, 0)):
        area = picture[row * 50 + 2 : row * 50 + 50, 2:62]
        for y in range(48):
            for x in range(0, 60, 7):
                assert area[y, x] == original[member, 0, y // 6, x // 6]


def test_other_channels_show_their_mean(tmp_path):
    original = uint8_images(1, 2, 64, 64)
    images = normalise(original, (0.5, 0.5), (0.5, 0.25))
    path = grid(images, torch.tensor([0]), (0.5, 0.5), (0.5, 0.25), tmp_path / "grid.png")
    mode, picture = read(path)
    assert mode == "L"
    expected = original[0].double().mean(dim=0).round().numpy()
    assert np.array_equal(picture[2:66, 2:66], expected)


def test_limits_and_clamping(tmp_path):
    images = torch.full((40, 3, 48, 48), 9.0, requires_grad=True)
    labels = torch.arange(4).repeat_interleave(10)
    path = grid(images, labels, MEAN, STD, tmp_path / "grid.png", per_row=3, rows=2)
    _, picture = read(path)
    assert picture.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    assert (picture == 255).all()


def test_the_synthetic_set_of_digits(tmp_path):
    digits = load("digits")
    images, labels = pixels(digits, 3, "real", generator(0, "init"))
    path = grid(images, labels, digits.mean, digits.std, tmp_path / "grid.png")
    _, picture = read(path)
    assert picture.shape == (502, 152)
    # Ten rows of three, each pixel six wide, in the grey levels of digits.
    originals = denormalise(images, digits.mean, digits.std)[:, 0].numpy()
    for place, original in enumerate(originals):
        top, left = 50 * (place // 3) + 2, 50 * (place % 3) + 2
        for offset in (0, 5):
            rows, columns = slice(top + offset, top + 48, 6), slice(left + offset, left + 48, 6)
            assert np.array_equal(picture[rows, columns], original)


def test_a_failed_picture_keeps_the_old_one(tmp_path):
    path = tmp_path / "grid.png"
    images = torch.zeros(2, 3, 48, 48)
    labels = torch.tensor([0, 1])
    grid(images, labels, MEAN, STD, path)
    before = path.read_bytes()
    images[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"NaN"):
        grid(images, labels, MEAN, STD, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_arguments(tmp_path):
    images, labels, path = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), tmp_path / "grid.png"
    with pytest.raises(ValueError, match=r"images must have shape"):
        grid(images[0], labels, MEAN, STD, path)
    with pytest.raises(ValueError, match=r"not be empty"):
        grid(images[:0], labels[:0], MEAN, STD, path)
    with pytest.raises(ValueError, match=r"labels must be 2 integers"):
        grid(images, labels[:1], MEAN, STD, path)
    with pytest.raises(ValueError, match=r"labels must be 2 integers"):
        grid(images, labels.float(), MEAN, STD, path)
    with pytest.raises(ValueError, match=r"mean must have one number for each of 3"):
        grid(images, labels, MEAN[:1], STD, path)
    with pytest.raises(ValueError, match=r"per_row must be at least 1, got 0"):
        grid(images, labels, MEAN, STD, path, per_row=0)
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere of grid.png does not exist"):
        grid(images, labels, MEAN, STD, tmp_path / "nowhere" / "grid.png")
    assert list(tmp_path.iterdir()) == []
