from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddfast.data import ClassSampler, Dataset, hold_out, random_selection
from ddfast.random import generator


def test_indices_and_counts(small_dataset):
    sampler = ClassSampler(small_dataset.train_labels, 3)
    assert sampler.counts == (7, 5, 4)
    assert sampler.indices(0).tolist() == [1, 3, 4, 7, 10, 14, 15]
    assert sampler.indices(1).tolist() == [2, 6, 8, 11, 13]
    assert sampler.indices(2).tolist() == [0, 5, 9, 12]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 50),
    st.integers(0, 2**32),
)
def test_draws_are_distinct_members_of_the_class(labels, n, seed):
    labels = torch.tensor([*labels, 0, 1, 2, 3, 4])
    sampler = ClassSampler(labels, 5)
    random = generator(seed, "test")
    for c in range(5):
        drawn = sampler.sample(c, n, random)
        assert drawn.dtype == torch.int64
        assert len(drawn) == min(n, int((labels == c).sum())) == len(set(drawn.tolist()))
        assert (labels[drawn] == c).all()


def test_every_image_is_reachable_and_equally_likely(small_dataset):
    sampler = ClassSampler(small_dataset.train_labels, 3)
    random = generator(0, "test")
    draws = 6000
    drawn = Counter(i for _ in range(draws) for i in sampler.sample(0, 3, random).tolist())
    assert sorted(drawn) == sampler.indices(0).tolist()
    # Each of 7 images in 3/7 of the draws; five standard deviations of that are 0.032.
    assert max(abs(count / draws - 3 / 7) for count in drawn.values()) < 0.032


def test_first_and_last_are_drawn_in_random_order(small_dataset):
    sampler = ClassSampler(small_dataset.train_labels, 3)
    random = generator(0, "test")
    firsts = {int(sampler.sample(2, 4, random)[0]) for _ in range(100)}
    assert firsts == {0, 5, 9, 12}


def test_sample_all_is_class_major_and_follows_the_generator(small_dataset):
    sampler = ClassSampler(small_dataset.train_labels, 3)
    indices, counts = sampler.sample_all(5, generator(0, "a"))
    assert counts == [5, 5, 4]
    assert small_dataset.train_labels[indices].tolist() == [0] * 5 + [1] * 5 + [2] * 4
    assert torch.equal(indices, sampler.sample_all(5, generator(0, "a"))[0])
    assert not torch.equal(indices, sampler.sample_all(5, generator(0, "b"))[0])
    random = generator(0, "a")
    apart = torch.cat([sampler.sample(c, 5, random) for c in range(3)])
    assert torch.equal(indices, apart)


def test_sampler_errors(small_dataset):
    labels = small_dataset.train_labels
    with pytest.raises(ValueError, match=r"no image of class 3, 4"):
        ClassSampler(labels, 5)
    with pytest.raises(ValueError, match=r"must lie in 0..1 .* got 2 at position 0"):
        ClassSampler(labels, 2)
    with pytest.raises(TypeError, match=r"int64"):
        ClassSampler(labels.float(), 3)
    with pytest.raises(ValueError, match=r"num_classes"):
        ClassSampler(labels, 0)
    sampler = ClassSampler(labels, 3)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=r"class must lie in 0..2"):
            sampler.indices(wrong)
        with pytest.raises(ValueError, match=r"class must lie in 0..2"):
            sampler.sample(wrong, 1, generator(0, "a"))
    with pytest.raises(ValueError, match=r"n must be at least 1, got 0"):
        sampler.sample(0, 0, generator(0, "a"))


def test_random_selection(small_dataset):
    images, labels = random_selection(small_dataset, 4, generator(3, "baseline"))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.dtype == torch.uint8
    # A pixel value is the position in the training set (see the fixture).
    positions = images[:, 0, 0, 0].long()
    assert len(set(positions.tolist())) == 12
    assert torch.equal(small_dataset.train_labels[positions], labels)
    assert torch.equal(images, small_dataset.train_images[positions])
    other, _ = random_selection(small_dataset, 4, generator(4, "baseline"))
    assert not torch.equal(images, other)


def test_random_selection_errors(small_dataset):
    with pytest.raises(ValueError, match=r"class 2 \(cat\) of small has 4 .* fewer than ipc 5"):
        random_selection(small_dataset, 5, generator(0, "a"))
    with pytest.raises(ValueError, match=r"ipc must be at least 1, got 0"):
        random_selection(small_dataset, 0, generator(0, "a"))


@given(st.floats(0.01, 0.99), st.integers(0, 100))
def test_hold_out_splits_each_class(fraction, seed):
    # Its own copy of the fixture's data: hypothesis runs many examples on one fixture.
    labels = torch.tensor([0] * 10 + [1] * 6 + [2] * 2)
    images = torch.arange(18, dtype=torch.uint8).view(18, 1, 1, 1)
    full = Dataset("d", images, labels, images + 100, labels, ("a", "b", "c"), (0.5,), (0.5,))
    part = hold_out(full, fraction, seed)
    train, held = part.train_images.flatten().tolist(), part.test_images.flatten().tolist()
    assert sorted(train + held) == list(range(18))
    assert torch.equal(labels[train], part.train_labels)
    assert torch.equal(labels[held], part.test_labels)
    for c, size in enumerate((10, 6, 2)):
        number = int((part.test_labels == c).sum())
        assert abs(number - fraction * size) <= 1 and 1 <= number < size


def test_hold_out_never_shows_the_test_set_and_keeps_the_rest(small_dataset):
    part = hold_out(small_dataset, 0.25, 0)
    assert part.test_images.max() < 100  # the fixture's test images are above
    assert part.test_split == "validation"
    assert (part.name, part.mean, part.std) == ("small", small_dataset.mean, small_dataset.std)
    again, other = hold_out(small_dataset, 0.25, 0), hold_out(small_dataset, 0.25, 1)
    assert torch.equal(part.test_images, again.test_images)
    assert not torch.equal(part.test_images, other.test_images)


def test_hold_out_errors(small_dataset):
    for fraction in (0, 1, -0.5, 2, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie between 0 and 1"):
            hold_out(small_dataset, fraction, 0)
    lonely = replace(
        small_dataset,
        train_images=small_dataset.train_images[:4],
        train_labels=torch.tensor([0, 0, 1, 2]),
    )
    with pytest.raises(ValueError, match=r"class 1 \(bee\) of small has one training image"):
        hold_out(lonely, 0.5, 0)
