from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from ddfast.data import channel_statistics, load


class Image:
    """Stands for datasets.Image: the reader knows column types by their names."""


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Value:
    pass


class Split:
    """A table that, like datasets.Dataset, is indexed by row or by the name of a column."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def picture(value, mode="RGB", size=(3, 2)):
    colour = value if mode == "L" else (value, value + 1, value + 2)
    return Pillow.new(mode, size, colour)


@pytest.fixture
def hub(monkeypatch):
    """A module ``datasets`` that serves ``hub.content`` and records what it was asked for."""
    module = ModuleType("datasets")
    features = {"img": Image(), "label": ClassLabel(["no", "yes"]), "id": Value()}
    module.content = {
        "train": Split(
            {"img": [picture(v) for v in (10, 20, 30)], "label": [1, 0, 1], "id": [5, 6, 7]},
            features,
        ),
        "validation": Split({"img": [picture(40)], "label": [0], "id": [8]}, features),
    }
    module.asked = []

    def load_dataset(path):
        module.asked.append(("load_dataset", path))
        return module.content

    def load_from_disk(path):
        module.asked.append(("load_from_disk", path))
        return module.content

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_local_folder(hub, tmp_path):
    dataset = load("hf", tmp_path)
    assert hub.asked == [("load_dataset", str(tmp_path))]
    assert dataset.class_names == ("no", "yes")
    assert dataset.train_labels.tolist() == [1, 0, 1] and dataset.test_labels.tolist() == [0]
    expected = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32]], dtype=torch.uint8)
    assert torch.equal(dataset.train_images, expected[:, :, None, None].expand(3, 3, 2, 3))
    assert dataset.test_images[0, :, 1, 1].tolist() == [40, 41, 42]
    assert (dataset.mean, dataset.std) == channel_statistics(dataset.train_images)
    assert load("hf", tmp_path, statistics="imagenet").mean == (0.485, 0.456, 0.406)


def test_a_saved_folder(hub, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    load("huggingface", tmp_path)
    assert hub.asked == [("load_from_disk", str(tmp_path))]


def test_the_hub_is_asked_only_with_consent(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder someone/images.* pass download=True"):
        load("hf", "someone/images")
    assert hub.asked == []
    assert load("hf", "someone/images", download=True, dataset_name="theirs").name == "theirs"
    assert hub.asked == [("load_dataset", "someone/images")]


def test_labels_without_classes(hub, tmp_path):
    features = {"image": Image(), "animal": Value()}
    columns = {"image": [picture(v, "L") for v in (1, 2, 3)], "animal": ["owl", "ant", "owl"]}
    hub.content = {"train": Split(columns, features), "test": Split(columns, features)}
    with pytest.raises(ValueError, match=r"label_column must be named: none of the columns image,"):
        load("hf", tmp_path)
    dataset = load("hf", tmp_path, label_column="animal", channels=1, size=2)
    assert dataset.class_names == ("ant", "owl")
    assert dataset.train_labels.tolist() == [1, 0, 1]
    assert dataset.train_images.flatten(1).tolist() == [[1] * 4, [2] * 4, [3] * 4]
    other = {"image": [picture(1)], "animal": ["cat"]}
    hub.content["test"] = Split(other, features)
    with pytest.raises(ValueError, match=r"split 'test' has labels not in 'train': \['cat'\]"):
        load("hf", tmp_path, label_column="animal")


def test_several_label_columns_must_be_chosen_from(hub, tmp_path):
    for split in hub.content.values():
        split.features = {**split.features, "coarse": ClassLabel(["all"])}
        split.columns["coarse"] = [0] * len(split)
    with pytest.raises(ValueError, match=r"label_column must be named: 2 .* fit: label, coarse"):
        load("hf", tmp_path)
    assert load("hf", tmp_path, label_column="coarse").class_names == ("all",)
    with pytest.raises(ValueError, match=r"label_column 'colour' is not among the columns img,"):
        load("hf", tmp_path, label_column="colour")


def test_splits(hub, tmp_path):
    hub.content["extra"] = hub.content["train"]
    assert len(load("hf", tmp_path, test_split="extra").test_labels) == 3
    with pytest.raises(ValueError, match=r"has no split 'dev', only train, validation, extra"):
        load("hf", tmp_path, test_split="dev")
    del hub.content["validation"]
    with pytest.raises(ValueError, match=r"has no split 'test', only train, extra"):
        load("hf", tmp_path)


def test_images_that_do_not_fit(hub, tmp_path):
    hub.content["train"].columns["img"][2] = picture(1, size=(4, 2))
    with pytest.raises(ValueError, match=r"image 2 of split 'train' has 2x4 pixels, the first 2x3"):
        load("hf", tmp_path)
    assert load("hf", tmp_path, size=2).size == (2, 2)
    hub.content["train"].columns["img"][1] = Pillow.fromarray(np.zeros((2, 3), np.uint16))
    with pytest.raises(ValueError, match=r"image 1 of split 'train' cannot be read: .* 8 bits"):
        load("hf", tmp_path)
    with pytest.raises(ValueError, match=r"channels .* must be 1 or 3, got 4"):
        load("hf", tmp_path, channels=4)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets: pip install ddfast\[hf\]"):
        load("hf", tmp_path)
    with pytest.raises(ValueError, match=r"data_path"):
        load("hf")
