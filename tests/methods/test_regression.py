"""What RFAD and FRePo share: which images are whitened as published."""

from __future__ import annotations

import pytest
import torch

from ddfast import methods
from ddfast.data import Dataset, generated
from ddfast.methods import frepo, rfad


def named(name: str, channels: int, side: int) -> Dataset:
    images = torch.randint(
        0, 256, (10, channels, side, side), generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    labels = torch.arange(10) % 2
    constants = ((0.5,) * channels, (0.5,) * channels)
    return Dataset(name, images, labels, images, labels, ("a", "b"), *constants)


@pytest.mark.parametrize(
    ("dataset", "of_rfad", "of_frepo"),
    [
        (named("CIFAR10", 3, 32), "rfad", "frepo"),
        (named("SVHN", 3, 32), "rfad", "frepo"),
        (named("MNIST", 1, 28), "none", "none"),
        (named("TinyImageNet", 3, 64), "rfad", "frepo"),
        (named("of one's own", 3, 128), "none", "frepo"),  # in blocks of 64
        (named("of one's own", 3, 96), "none", "none"),
        (generated(classes=2, size=16, train_per_class=3, test_per_class=2), "none", "none"),
    ],
)
def test_colour_images_are_whitened_as_published(dataset, of_rfad, of_frepo) -> None:
    for method, wanted in ((rfad, of_rfad), (frepo, of_frepo)):
        config = methods.resolve(method.Config(ipc=1), dataset)
        assert config.zca == wanted
        stored = methods.resolve(method.Config(ipc=1, parametrisation="bases"), dataset)
        assert stored.zca == "none"
