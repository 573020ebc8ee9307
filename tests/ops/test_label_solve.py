"""Gates of `label_solve`: definition, what it makes of the loss, duplicates, blocks of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddfast import losses
from ddfast.reference import krr as reference


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def problem(n: int, m: int, columns: int, dtype=torch.float64) -> list[Tensor]:
    """k_ss, k_ts, y_s, y_t of a smooth kernel of random rows."""
    rows = draw(n + m, 4)
    kernel = torch.exp(-torch.cdist(rows, rows).square() / 8) + 0.01
    given = [kernel[:n, :n], kernel[n:, :n], draw(n, columns, seed=1), draw(m, columns, seed=2)]
    return [x.to(dtype).contiguous() for x in given]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 5, 3), (5, 40, 1), (9, 4, 3)])
def test_label_solve_is_the_definition(sizes):
    k_ss, k_ts, _, y_t = problem(*sizes)
    found = losses.label_solve(k_ss, k_ts, y_t, reg=1e-2)
    expected = reference.label_solve(k_ss, k_ts, y_t, 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_label_solve_makes_the_gradient_vanish():
    k_ss, k_ts, _, y_t = problem(5, 40, 3)
    labels = losses.label_solve(k_ss, k_ts, y_t, reg=1e-2).requires_grad_()
    value = losses.krr_loss(k_ss, k_ts, labels, y_t, reg=1e-2)
    assert torch.autograd.grad(value, labels)[0].abs().max() < 1e-12
    other = losses.krr_loss(k_ss, k_ts, labels + 1e-3 * draw(5, 3, seed=4), y_t, reg=1e-2)
    assert other > value


def test_label_solve_of_duplicates_is_the_shortest():
    rows = draw(6, 9)
    rows[3:] = rows[:3]
    k_ss, k_ts, y_t = rows @ rows.mT, draw(40, 9, seed=1) @ rows.mT, draw(40, 2, seed=3)
    found = losses.label_solve(k_ss, k_ts, y_t, reg=1e-3)
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-7, atol=1e-9)


def test_rows_may_be_reduced_block_by_block():
    rows = draw(50, 7)
    whole = reference.least_squares(rows, 4, 50.0)
    kept = rows[:0]
    for block in rows.split(13):
        kept = reference.triangle(torch.cat([kept, block]))
    assert len(kept) == 7
    torch.testing.assert_close(
        reference.least_squares(kept, 4, 50.0), whole, rtol=1e-12, atol=1e-14
    )
