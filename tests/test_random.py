from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddfast.random import generator, seed_of


def test_seeds_are_pinned():
    # Literals: if these change, every run changes. Computed once with hashlib alone:
    # int.from_bytes(sha256(b"0:init").digest()[:8], "big") >> 1, and so on.
    assert seed_of(0, "init") == 3598610026517748695
    assert seed_of(0, "real batch", 3, 7) == 4184146875297183384
    assert seed_of(-5, "größe", 2**70) == 3519176878995037156
    assert generator(0, "init").initial_seed() == 3598610026517748695


def test_same_input_same_stream_and_no_shared_state():
    first, second = generator(1, "net", 4), generator(1, "net", 4)
    expected = torch.rand(100, generator=first)
    torch.rand(100, generator=generator(1, "net", 5))
    assert torch.equal(torch.rand(100, generator=second), expected)
    assert not torch.equal(torch.rand(100, generator=second), expected)
    assert first.device == torch.device("cpu")


def test_nearby_inputs_give_different_seeds():
    seeds = {seed_of(s, p, *step) for s in range(20) for p in ("a", "b", "1,2:a")
             for step in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0))}  # fmt: skip
    assert len(seeds) == 20 * 3 * 8
    # Digits do not run into one another.
    assert seed_of(1, "a", 23) != seed_of(12, "a", 3)
    assert seed_of(1, "a", 2, 3) != seed_of(1, "a", 23)


@given(st.integers(), st.text(min_size=1), st.lists(st.integers(), max_size=3))
def test_seeds_are_63_bits(seed, purpose, step):
    assert 0 <= seed_of(seed, purpose, *step) < 2**63


def test_seeds_fill_63_bits():
    seeds = np.array([seed_of(0, "fill", index) for index in range(2000)])
    bits = (seeds[:, None] >> np.arange(63)) & 1
    # 2000 fair coins: five standard deviations are 0.056.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.056


def test_numpy_integers_are_integers():
    assert seed_of(np.int64(3), "a", np.uint8(7)) == seed_of(3, "a", 7)


@pytest.mark.parametrize("seed", [1.0, "1", None, True, torch.tensor(1.5)])
def test_seed_of_wrong_type(seed):
    with pytest.raises(TypeError, match=r"seed|integer"):
        seed_of(seed, "a")


def test_other_wrong_arguments():
    with pytest.raises(TypeError, match=r"step 1 must be an integer, got 0.5"):
        seed_of(0, "a", 1, 0.5)
    with pytest.raises(TypeError, match=r"purpose must be a string, got 3"):
        generator(0, 3)
    with pytest.raises(ValueError, match=r"purpose"):
        seed_of(0, "")


def test_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    torch.rand(10, generator=generator(0, "a"))
    assert torch.equal(torch.random.get_rng_state(), before)
