from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ddfast.data import channel_statistics, denormalise, normalise
from ddfast.data.normalisation import PUBLISHED, statistics_of


def every_value(channels):
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_of_every_value(name, dtype):
    mean, std = PUBLISHED[name]
    images = every_value(len(mean))
    assert torch.equal(denormalise(normalise(images, mean, std, dtype), mean, std), images)


def test_published_constants():
    # methods/gradient-matching.md, section 1.2.
    assert PUBLISHED["mnist"] == ((0.1307,), (0.3081,))
    assert PUBLISHED["fashionmnist"] == ((0.2861,), (0.3530,))
    assert PUBLISHED["svhn"] == ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    assert PUBLISHED["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert PUBLISHED["cifar100"] == ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
    assert PUBLISHED["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_float32_has_the_bits_of_the_usual_transforms():
    mean, std = PUBLISHED["cifar10"]
    images = every_value(3)
    # ToTensor divides by 255 in float32; Normalize subtracts and divides float32 constants.
    usual = images.numpy().astype(np.float32) / np.float32(255)
    usual = usual - np.array(mean, np.float32).reshape(3, 1, 1)
    usual = usual / np.array(std, np.float32).reshape(3, 1, 1)
    assert np.array_equal(normalise(images, mean, std).numpy(), usual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    mean, std = PUBLISHED["svhn"]
    images = every_value(3)
    half = normalise(images, mean, std, dtype)
    assert half.dtype == dtype
    assert torch.equal(half, normalise(images, mean, std).to(dtype))


def test_normalise_takes_one_image_and_leaves_it_alone():
    images = every_value(3)
    before = images.clone()
    one = normalise(images[1], *PUBLISHED["imagenet"])
    assert torch.equal(one, normalise(images, *PUBLISHED["imagenet"])[1])
    assert torch.equal(images, before)


def test_denormalise_rounds_and_clamps():
    pixels = torch.tensor([-3.0, -0.4, 0.4, 0.6, 100.49, 100.51, 254.6, 255.4, 9e9, float("inf")])
    images = (pixels / 255).view(1, 1, 2, 5)
    expected = [0, 0, 0, 1, 100, 101, 255, 255, 255, 255]
    assert denormalise(images, (0.0,), (1.0,)).flatten().tolist() == expected
    shifted = (images - 0.25) / 0.5
    kept = shifted.clone()
    assert denormalise(shifted, (0.25,), (0.5,)).flatten().tolist() == expected
    assert torch.equal(shifted, kept)


def test_denormalise_works_under_autograd():
    images = torch.zeros(1, 1, 2, 2, requires_grad=True)
    assert denormalise(images, (0.5,), (1.0,)).flatten().tolist() == [128] * 4


@given(arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_statistics_against_float64(values):
    images = torch.from_numpy(values)
    spread = values.transpose(1, 0, 2, 3).reshape(values.shape[1], -1).astype(np.float64) / 255
    if (spread == spread[:, :1]).all(axis=1).any():
        with pytest.raises(ValueError, match=r"same value in every pixel"):
            channel_statistics(images)
        return
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, spread.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(std, spread.std(axis=1), rtol=1e-9)


@given(st.permutations(range(6)))
def test_statistics_do_not_depend_on_order(order):
    images = torch.arange(6 * 12, dtype=torch.uint8).view(6, 3, 2, 2) * 3
    assert channel_statistics(images[list(order)]) == channel_statistics(images)


def test_statistics_by_name():
    images = every_value(3)
    assert statistics_of(images, "cifar10") == PUBLISHED["cifar10"]
    assert statistics_of(images, "computed") == channel_statistics(images)
    with pytest.raises(ValueError, match=r"must be one of computed, mnist.*got 'cifar'"):
        statistics_of(images, "cifar")
    with pytest.raises(ValueError, match=r"'mnist' are for 1 channels, the images have 3"):
        statistics_of(images, "mnist")


def test_wrong_arguments():
    images = every_value(3)
    mean, std = PUBLISHED["imagenet"]
    with pytest.raises(TypeError, match=r"uint8"):
        normalise(images.float(), mean, std)
    with pytest.raises(TypeError, match=r"dtype must be a floating-point type"):
        normalise(images, mean, std, torch.int32)
    with pytest.raises(ValueError, match=r"mean must have one number for each of 3 channels"):
        normalise(images, mean[:1], std)
    with pytest.raises(ValueError, match=r"std must have one number for each of 3 channels"):
        denormalise(images.float(), mean, std[:2])
    with pytest.raises(ValueError, match=r"must have shape"):
        normalise(images[0, 0], mean, std)
    with pytest.raises(TypeError, match=r"floating-point"):
        denormalise(images, mean, std)
    with pytest.raises(TypeError, match=r"uint8"):
        channel_statistics(images.float())
    broken = normalise(images, mean, std)
    broken[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"NaN"):
        denormalise(broken, mean, std)
