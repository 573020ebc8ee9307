from __future__ import annotations

import pytest
import torch

from ddfast.data import denormalise, normalise, random_selection
from ddfast.random import generator
from ddfast.synthetic import pixels


def test_real_images_of_each_class(small_dataset):
    images, labels = pixels(small_dataset, 4, init="real", generator=generator(1, "init"))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    original = denormalise(images, small_dataset.mean, small_dataset.std)
    # A pixel value is the position in the training set (see the fixture).
    positions = original[:, 0, 0, 0].long()
    assert len(set(positions.tolist())) == 12
    assert torch.equal(small_dataset.train_labels[positions], labels)
    real = small_dataset.train_images[positions]
    assert torch.equal(images, normalise(real, small_dataset.mean, small_dataset.std))
    selection, _ = random_selection(small_dataset, 4, generator(1, "init"))
    assert torch.equal(selection, original)


def test_noise_is_standard_normal(small_dataset):
    images, labels = pixels(small_dataset, 500, init="noise", generator=generator(1, "init"))
    assert images.shape == (1500, 2, 3, 4) and images.dtype == torch.float32
    assert labels.tolist() == [0] * 500 + [1] * 500 + [2] * 500
    values = images.double().flatten()
    # 36 000 numbers: five standard deviations of mean, variance and the part within one sigma.
    assert abs(values.mean()) < 0.027
    assert abs(values.var() - 1) < 0.038
    assert abs((values.abs() < 1).double().mean() - 0.6827) < 0.0123


@pytest.mark.parametrize("init", ["real", "noise"])
def test_the_generator_decides(small_dataset, init):
    first, _ = pixels(small_dataset, 2, init, generator(0, "init"))
    assert torch.equal(first, pixels(small_dataset, 2, init, generator(0, "init"))[0])
    assert not torch.equal(first, pixels(small_dataset, 2, init, generator(1, "init"))[0])


def test_noise_needs_no_images(small_dataset):
    assert pixels(small_dataset, 50, "noise", generator(0, "init"))[0].shape[0] == 150
    with pytest.raises(ValueError, match=r"class 2 \(cat\) of small has 4 .*fewer than ipc 5"):
        pixels(small_dataset, 5, "real", generator(0, "init"))


@pytest.mark.parametrize("init", ["real", "noise"])
def test_wrong_ipc(small_dataset, init):
    with pytest.raises(ValueError, match=r"ipc must be at least 1, got 0"):
        pixels(small_dataset, 0, init, generator(0, "init"))


def test_wrong_init(small_dataset):
    with pytest.raises(ValueError, match=r"init must be one of real, noise; got 'zeros'"):
        pixels(small_dataset, 1, "zeros", generator(0, "init"))
