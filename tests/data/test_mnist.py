from __future__ import annotations

import gzip
import struct

import pytest
import torch

from ddfast.data import load
from ddfast.random import generator

STEMS = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]


def idx(values):
    head = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return head + values.numpy().tobytes()


@pytest.fixture
def arrays():
    def images(number, purpose):
        return torch.randint(
            256, (number, 28, 28), dtype=torch.uint8, generator=generator(0, purpose)
        )

    labels = torch.arange(20, dtype=torch.uint8) % 10
    return [images(20, "train"), labels, images(5, "test"), labels[2:7]]


def write(folder, arrays, ending="-ubyte", compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, values in zip(STEMS, arrays, strict=True):
        content = idx(values)
        if compress:
            (folder / f"{stem}{ending}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{stem}{ending}").write_bytes(content)


@pytest.mark.parametrize("name, mean", [("MNIST", 0.1307), ("FashionMNIST", 0.2861)])
@pytest.mark.parametrize("place", ["", "raw", "{name}/raw", "{name}"])
@pytest.mark.parametrize("compress", [False, True])
def test_layouts(tmp_path, arrays, name, mean, place, compress):
    write(tmp_path / place.format(name=name), arrays, compress=compress)
    dataset = load(name, tmp_path)
    assert torch.equal(dataset.train_images, arrays[0][:, None])
    assert dataset.train_labels.tolist() == [place % 10 for place in range(20)]
    assert torch.equal(dataset.test_images, arrays[2][:, None])
    assert dataset.test_labels.tolist() == [2, 3, 4, 5, 6]
    assert dataset.mean == (mean,) and dataset.name == name


def test_the_two_are_not_mixed_up(tmp_path, arrays):
    write(tmp_path / "MNIST" / "raw", arrays)
    write(tmp_path / "FashionMNIST" / "raw", [255 - arrays[0], arrays[1], *arrays[2:]])
    digits, fashion = load("MNIST", tmp_path), load("fashion", tmp_path)
    assert torch.equal(digits.train_images, 255 - fashion.train_images)
    assert fashion.class_names[9] == "Ankle boot" and digits.class_names[9] == "9"


def test_dotted_names(tmp_path, arrays):
    write(tmp_path, arrays)
    for stem in STEMS:
        (tmp_path / f"{stem}-ubyte").rename(tmp_path / f"{stem.replace('-idx', '.idx')}-ubyte")
    assert torch.equal(load("MNIST", tmp_path).test_images, arrays[2][:, None])


def test_missing_file(tmp_path, arrays):
    write(tmp_path, arrays)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load("MNIST", tmp_path)
    missing = f"missing in {tmp_path}: t10k-labels-idx1-ubyte or t10k-labels.idx1-ubyte or "
    assert missing in str(caught.value)


@pytest.mark.parametrize("compress", [False, True])
def test_cut_short(tmp_path, arrays, compress):
    write(tmp_path, arrays, compress=compress)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if compress else ""))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.* damaged or cut short"):
        load("MNIST", tmp_path)


def test_wrong_kind_of_file(tmp_path, arrays):
    write(tmp_path, arrays)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(arrays[1]))
    with pytest.raises(ValueError, match=r"with 3 dimensions: it starts with 00 00 08 01"):
        load("MNIST", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it starts with nothing"):
        load("MNIST", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"damaged"):
        load("MNIST", tmp_path)
