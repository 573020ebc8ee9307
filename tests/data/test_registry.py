from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ddfast.data import canonical_name, load, names


@pytest.mark.parametrize(
    "name, canonical",
    [
        ("digits", "digits"),
        ("Generated", "generated"),
        ("cifar10", "CIFAR10"),
        ("CIFAR-10", "CIFAR10"),
        ("cifar_100", "CIFAR100"),
        ("mnist", "MNIST"),
        ("fashion", "FashionMNIST"),
        ("fashion_mnist", "FashionMNIST"),
        ("svhn", "SVHN"),
        ("Tiny", "TinyImageNet"),
        ("tinyimagenet", "TinyImageNet"),
        ("tiny_imagenet", "TinyImageNet"),
        ("image folder", "ImageFolder"),
        ("HuggingFace", "hf"),
    ],
)
def test_aliases(name, canonical):
    assert canonical_name(name) == canonical
    assert canonical in names() and canonical_name(canonical) == canonical


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'CIFAR1' \(did you mean CIFAR10\?\); known are digits,"):
        load("CIFAR1")
    with pytest.raises(ValueError, match=r"unknown data set 'xyzzy'; known are .*TinyImageNet"):
        load("xyzzy")
    with pytest.raises(TypeError, match=r"must be a string, got 10"):
        load(10)


def test_options():
    dataset = load("generated", classes=2, size=8, train_per_class=3, test_per_class=1, channels=1)
    assert (dataset.num_classes, dataset.size, dataset.channels) == (2, (8, 8), 1)
    assert len(dataset.train_labels) == 6
    with pytest.raises(ValueError, match=r"generated has no option width; it has classes, size,"):
        load("generated", width=8)
    with pytest.raises(ValueError, match=r"CIFAR10 has no option size; it has statistics, unsafe"):
        load("CIFAR10", "somewhere", size=8)


@pytest.mark.parametrize("name", [n for n in names() if n not in ("digits", "generated", "hf")])
def test_missing_data(name, tmp_path):
    with pytest.raises(ValueError, match=r"data_path"):
        load(name)
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert name in message and str(tmp_path) in message and "Expected the files" in message


def test_data_path_is_ignored_where_no_files_are_needed(tmp_path):
    assert torch.equal(load("digits", tmp_path).train_images, load("digits").train_images)


def test_import_needs_no_extra():
    """Pillow, scikit-learn, SciPy and datasets are imported when used, never before."""
    code = (
        "import sys, ddfast.data, ddfast.synthetic; "
        "print([m for m in ('PIL', 'sklearn', 'scipy', 'datasets', 'matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
