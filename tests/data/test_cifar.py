from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from ddfast.data import load
from ddfast.random import generator


def some_images(number, purpose):
    return torch.randint(
        256, (number, 3, 32, 32), dtype=torch.uint8, generator=generator(0, purpose)
    )


def record(labels, images):
    """The layout the official page describes: labels, then 1024 red, green and blue bytes."""
    return b"".join(
        bytes(label) + image.numpy().tobytes() for label, image in zip(labels, images, strict=True)
    )


@pytest.fixture
def cifar10_images():
    """Five batches of four images and one of three; every class occurs."""
    return [some_images(4, f"batch {batch}") for batch in range(5)] + [some_images(3, "test")]


def cifar10_labels(batch, number):
    return [(4 * batch + place) % 10 for place in range(number)]


@pytest.fixture
def binary10(tmp_path, cifar10_images):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for batch, images in enumerate(cifar10_images):
        name = "test_batch.bin" if batch == 5 else f"data_batch_{batch + 1}.bin"
        labels = [(label,) for label in cifar10_labels(batch, len(images))]
        (folder / name).write_bytes(record(labels, images))
    return folder


@pytest.fixture
def pickled10(tmp_path, cifar10_images):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for batch, images in enumerate(cifar10_images):
        name = "test_batch" if batch == 5 else f"data_batch_{batch + 1}"
        content = {
            "batch_label": name,
            "labels": cifar10_labels(batch, len(images)),
            "data": images.reshape(len(images), -1).numpy(),
            "filenames": [f"{place}.png" for place in range(len(images))],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def check_cifar10(dataset, images):
    assert torch.equal(dataset.train_images, torch.cat(images[:5]))
    assert dataset.train_labels.tolist() == [place % 10 for place in range(20)]
    assert torch.equal(dataset.test_images, images[5])
    assert dataset.test_labels.tolist() == [0, 1, 2]
    assert dataset.class_names[0] == "airplane" and dataset.class_names[9] == "truck"
    assert dataset.mean == (0.4914, 0.4822, 0.4465) and dataset.std == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_binary(binary10, cifar10_images, inside):
    check_cifar10(load("cifar-10", binary10 if inside else binary10.parent), cifar10_images)


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10_pickled_only_when_told(pickled10, cifar10_images, protocol):
    for path in pickled10.iterdir():
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    for place in (pickled10, pickled10.parent):
        with pytest.raises(ValueError, match=r"pickled.*binary version.*unsafe=True"):
            load("CIFAR10", place)
    check_cifar10(load("CIFAR10", pickled10.parent, unsafe=True), cifar10_images)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_runs_nothing(pickled10, tmp_path):
    (pickled10 / "data_batch_1").write_bytes(pickle.dumps({"data": Malicious(tmp_path / "owned")}))
    with pytest.raises(ValueError, match=r"unsafe"):
        load("CIFAR10", pickled10)
    with pytest.raises(pickle.UnpicklingError, match=r"no need of \w+\.mkdir"):
        load("CIFAR10", pickled10, unsafe=True)
    assert not (tmp_path / "owned").exists()


def test_cifar10_missing_files_are_listed(binary10, tmp_path):
    (binary10 / "data_batch_3.bin").unlink()
    (binary10 / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load("CIFAR10", tmp_path)
    message = str(caught.value)
    assert "missing in " + str(binary10) + ": data_batch_3.bin, test_batch.bin." in message
    assert "cifar-10-binary.tar.gz" in message
    assert "data_batch_1.bin, data_batch_2.bin, data_batch_3.bin" in message


def test_cifar10_cut_short(binary10):
    path = binary10 / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2.bin is damaged or cut short: 12291 bytes"):
        load("CIFAR10", binary10)


def test_cifar10_wrong_label(binary10):
    path = binary10 / "data_batch_1.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"must lie in 0..9 .* got 10 at position 0"):
        load("CIFAR10", binary10)


@pytest.fixture
def cifar100_images():
    return some_images(100, "train"), some_images(5, "test")


NAMES = [f"fine {label:02d}" for label in range(100)]


@pytest.fixture
def binary100(tmp_path, cifar100_images):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name, images in zip(("train.bin", "test.bin"), cifar100_images, strict=True):
        # The coarse label comes first and is not the one wanted.
        labels = [(7, 99 - place) for place in range(len(images))]
        (folder / name).write_bytes(record(labels, images))
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


@pytest.fixture
def pickled100(tmp_path, cifar100_images):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, images in zip(("train", "test"), cifar100_images, strict=True):
        content = {
            "coarse_labels": [7] * len(images),
            "fine_labels": [99 - place for place in range(len(images))],
            "data": images.reshape(len(images), -1).numpy(),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES}, protocol=2))
    return folder


@pytest.mark.parametrize("kind", ["binary100", "pickled100"])
def test_cifar100(kind, request, tmp_path, cifar100_images):
    request.getfixturevalue(kind)
    if kind == "pickled100":
        with pytest.raises(ValueError, match=r"unsafe=True"):
            load("CIFAR100", tmp_path)
    dataset = load("CIFAR100", tmp_path, unsafe=kind == "pickled100")
    assert torch.equal(dataset.train_images, cifar100_images[0])
    assert torch.equal(dataset.test_images, cifar100_images[1])
    assert dataset.train_labels.tolist() == list(range(99, -1, -1))
    assert dataset.test_labels.tolist() == [99, 98, 97, 96, 95]
    assert dataset.class_names == tuple(NAMES)
    assert dataset.mean == (0.5071, 0.4866, 0.4409) and dataset.std == (0.2673, 0.2564, 0.2762)


def test_cifar100_conventions(binary100):
    dataset = load("CIFAR100", binary100, statistics="cifar10")
    assert dataset.mean == (0.4914, 0.4822, 0.4465) and dataset.std == (0.2023, 0.1994, 0.2010)
    computed = load("CIFAR100", binary100, statistics="computed")
    pixels = computed.train_images.numpy() / 255
    np.testing.assert_allclose(computed.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-10)


def test_cifar100_wrong_number_of_names(binary100):
    (binary100 / "fine_label_names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"must name 100 classes, got 2"):
        load("CIFAR100", binary100)
