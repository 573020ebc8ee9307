from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch


def test_properties(small_dataset):
    assert small_dataset.num_classes == 3
    assert small_dataset.channels == 2
    assert small_dataset.size == (3, 4)
    assert small_dataset.test_split == "test"
    assert "16 train and 2 test images of 3 classes, 2x3x4" in repr(small_dataset)
    with pytest.raises(FrozenInstanceError):
        small_dataset.name = "other"


def test_lists_become_plain_tuples(small_dataset):
    made = replace(small_dataset, class_names=["a", "b", "c"], mean=[0, 1], std=[1, 2])
    assert made.class_names == ("a", "b", "c")
    assert made.mean == (0.0, 1.0) and isinstance(made.mean[0], float)


def test_a_class_may_be_missing_in_test_only(small_dataset):
    assert small_dataset.test_labels.tolist() == [2, 0]
    keep = small_dataset.train_labels != 1
    with pytest.raises(ValueError, match=r"train_labels has no image of class 1 \(bee\)"):
        replace(
            small_dataset,
            train_images=small_dataset.train_images[keep],
            train_labels=small_dataset.train_labels[keep],
        )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "field, change, error, message",
    [
        ("images", lambda x: x.float(), TypeError, "must be uint8.*got torch.float32"),
        ("images", lambda x: x.long(), TypeError, "must be uint8.*got torch.int64"),
        ("images", lambda x: x.numpy(), TypeError, "must be a tensor"),
        ("images", lambda x: x[0], ValueError, "must have shape"),
        ("images", lambda x: x[:, :, :0], ValueError, "is empty"),
        ("images", lambda x: x[1:], ValueError, "differ in length"),
        ("images", lambda x: x[:, :, 1:], ValueError, "differ in .channels, height, width"),
        ("labels", lambda x: x.int(), TypeError, "must be int64, got torch.int32"),
        ("labels", lambda x: x.tolist(), TypeError, "must be a tensor"),
        ("labels", lambda x: x[:, None], ValueError, r"must have shape \(N,\)"),
        ("labels", lambda x: x + 1, ValueError, "must lie in 0..2 for 3 classes, got 3 at pos"),
        ("labels", lambda x: x - 1, ValueError, "must lie in 0..2 for 3 classes, got -1 at pos"),
    ],
)
def test_wrong_tensors_are_named(small_dataset, split, field, change, error, message):
    name = f"{split}_{field}"
    with pytest.raises(error, match=message) as caught:
        replace(small_dataset, **{name: change(getattr(small_dataset, name))})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": (0.5,)}, "mean must have one number for each of 2 channels, got 1"),
        ({"std": (0.5, 0.5, 0.5)}, "std must have one number for each of 2 channels, got 3"),
        ({"std": (0.5, 0.0)}, "std must be above 0"),
        ({"mean": (0.5, float("nan"))}, "mean must be finite"),
        ({"class_names": ()}, "class_names is empty"),
        ({"class_names": ("a", "b")}, "train_labels must lie in 0..1"),
    ],
)
def test_wrong_statistics_and_names(small_dataset, change, message):
    with pytest.raises(ValueError, match=message):
        replace(small_dataset, **change)


def test_many_missing_classes_are_cut_short(small_dataset):
    with pytest.raises(ValueError, match=r"class 3 \(3\), .* and 37 more"):
        replace(small_dataset, class_names=[str(c) for c in range(50)])


def test_no_tensor_is_copied(small_dataset):
    again = replace(small_dataset, name="again")
    assert again.train_images.data_ptr() == small_dataset.train_images.data_ptr()
    assert torch.equal(again.train_labels, small_dataset.train_labels)
