"""What a machine can do at most, and the floor of a work that follows."""

from __future__ import annotations

import pytest

from ddfast.bench.ceilings import (
    COPIES,
    DTYPES,
    Ceilings,
    copier,
    copy_rate,
    floor,
    measure_ceilings,
)

CEILINGS = Ceilings({1 << 20: 100.0, 1 << 24: 25.0}, {"float32": 50.0, "float64": 25.0})


@pytest.mark.parametrize(
    ("size", "rate"),
    [(1, 100.0), (1 << 20, 100.0), (1 << 22, 50.0), (1 << 24, 25.0), (1 << 30, 25.0)],
)
def test_rate_of_a_copy(size, rate):
    assert copy_rate(CEILINGS, size) == pytest.approx(rate)


def test_floor_is_the_larger_of_both():
    assert floor(CEILINGS, 1 << 24, 0, "float32") == (pytest.approx((1 << 24) / 25e6), "bandwidth")
    assert floor(CEILINGS, 1000, 50_000_000, "float32") == (pytest.approx(1.0), "arithmetic")
    assert floor(CEILINGS, 1000, 50_000_000, "float64") == (pytest.approx(2.0), "arithmetic")
    assert floor(CEILINGS, 1000, 50_000_000, "float16")[1] == "bandwidth"  # not measured


def test_the_fastest_call_counts():
    calls = []

    def timed(f):
        f()
        calls.append(1)
        return 2.0 if len(calls) % 3 else 1.0

    found = measure_ceilings("cpu", timed)
    assert found.copies == {size: pytest.approx(size / 1e6) for size in COPIES["cpu"]}
    # The product of matrices is the larger work, and all take as long by this clock.
    assert found.products == dict.fromkeys(DTYPES, pytest.approx(2 * 1024**3 / 1e6))


def test_a_copy_moves_what_it_says():
    target = copier(800, "cpu")()
    assert target.numel() * target.element_size() * 2 == 800
