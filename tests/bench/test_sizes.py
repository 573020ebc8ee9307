"""The named sizes, and what is left out where one does not fit."""

from __future__ import annotations

import pytest

from ddfast.bench import SIZES, fitted
from ddfast.bench.sizes import find

IMAGENET = SIZES["imagenet-1k"]


def test_what_fits_stays():
    assert fitted(IMAGENET, 1000, 1) == (IMAGENET, "")


def test_classes_are_left_out_first():
    size, note = fitted(IMAGENET, 40 << 20, 1 << 20)
    assert (size.classes, size.batch_real, note) == (40, 256, "40 of 1000 classes")
    assert (size.name, size.side, size.depth) == ("imagenet-1k", 64, 4)


def test_then_images_of_the_last_one():
    size, note = fitted(IMAGENET, 1 << 20, 4 << 20)
    assert (size.classes, size.batch_real) == (1, 64)
    assert note == "1 of 1000 classes, 64 of 256 real images a class"
    assert fitted(IMAGENET, 1, 1 << 40)[0].batch_real == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="memory_bytes: got 0"):
        fitted(IMAGENET, 0, 1)
    with pytest.raises(ValueError, match="bytes_per_class: got -1"):
        fitted(IMAGENET, 1, -1)
    with pytest.raises(ValueError, match="sizes: got 'mnist', expected one of cifar10, "):
        find("mnist")
