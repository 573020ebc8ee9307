"""Bandwidths of `mmd` in pieces, as GPUs are given them: the definition's, without its matrix."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddfast.ops import mmd as ops
from ddfast.ops import streamed_bandwidth
from ddfast.ops.streamed_bandwidth import mean_distance, median_distance
from ddfast.reference import mmd as reference
from ddfast.testing import assert_same_bits


def whole_numbers(classes: int, n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows around a centre that is exact: distances have no rounding, whoever computes them."""
    random = torch.Generator().manual_seed(100 * n + 10 * m + d)
    rows = torch.randint(-4, 5, (classes, n + m, d), generator=random).to(dtype)
    rows[:, -1] -= rows.sum(1)
    return rows[:, :n], rows[:, n:]


@given(
    classes=st.integers(1, 3),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    piece=st.sampled_from([1, 7, 40, 1 << 20]),
)
def test_the_median_is_that_of_all_distances(classes, n, m, d, dtype, piece):
    x, y = whole_numbers(classes, n, m, d, dtype)
    pairs = torch.stack([torch.pdist(z) ** 2 for z in torch.cat([x, y], 1).double()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_bandwidth, "PIECE", piece)
        found = median_distance(x, y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), pairs.median(1).values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [1, 50, 1 << 20])
def test_both_are_the_definitions(monkeypatch, dtype, piece):
    monkeypatch.setattr(streamed_bandwidth, "PIECE", piece)
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, rows, 7, generator=random, dtype=dtype) + 5 for rows in (9, 30))
    eps = torch.finfo(dtype).eps
    for streamed, how in ((mean_distance, "mean"), (median_distance, "median")):
        expected = reference.bandwidth(x, y, how)
        torch.testing.assert_close(streamed(x, y), expected, rtol=8 * eps, atol=0)
        halves = x.half(), y.half()
        wide = reference.bandwidth(*(t.float() for t in halves), how)
        found = ops._bandwidth_cuda(None, *halves, how)
        torch.testing.assert_close(found, wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("streamed", [mean_distance, median_distance])
def test_equal_rows_and_no_classes(streamed):
    row = torch.randn(2, 1, 33, generator=torch.Generator().manual_seed(2)) + 7.3
    assert_same_bits(streamed(row.expand(2, 40, 33), row.expand(2, 9, 33)), torch.zeros(2))
    assert streamed(torch.ones(0, 3, 4), torch.ones(0, 2, 4)).shape == (0,)


def test_distances_that_are_no_number_count_as_infinite():
    x = torch.arange(6.0).view(1, 6, 1)
    y = torch.full((1, 1, 1), float("nan"))
    assert median_distance(x, y).isinf() or median_distance(x, y).isnan()
    assert mean_distance(x, y).isnan()


PEAK = """
import torch
from ddfast.memory import peak_resident
from ddfast.ops.mmd import _bandwidth_cuda

torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
x, y = (torch.randn({rows}, {d}, generator=random)[None] for _ in range(2))
if {twins}:  # two rows, each many times
    x, y = (z[:, torch.arange({rows}) % 2] for z in (x, y))
for how in ("mean", "median"):
    _bandwidth_cuda(None, x[:, :300], y[:, :300], how)
before = peak_resident()
assert _bandwidth_cuda(None, x, y, {how!r}) >= 0
print((peak_resident() - before) / 2**20)
"""


@pytest.mark.parametrize(
    ("how", "rows", "d", "twins"),
    [("mean", 4000, 2048, False), ("median", 4000, 8, False), ("median", 500, 512, True)],
)
def test_nothing_large_is_held(how, rows, d, twins):
    """131 MB in float64; 256 MB of distances; half a gigabyte of differences of equal rows."""
    code = PEAK.format(how=how, rows=rows, d=d, twins=twins)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, done.stdout
