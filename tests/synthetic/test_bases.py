"""LinBa's shared bases: budget, formula, fit and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from ddfast.random import generator
from ddfast.synthetic import bases, decode


def test_the_published_budget():
    """CIFAR-10, ipc 1, 16 bases of half the size: 115 images of each class (methods notes)."""
    assert bases.per_class(1, 10, 3, (32, 32), 16, 2) == 115
    rows = bases.per_class(2, 4, 1, (7, 9), 3, 2)
    taken = 3 * 4 * 5 + 4 * rows * 3
    assert taken <= 4 * 2 * 63 < taken + 4 * 3


def test_no_room():
    with pytest.raises(ValueError, match="leave no room"):
        bases.per_class(1, 2, 1, (8, 8), 8, 1)
    with pytest.raises(ValueError, match="base_scale: got 9"):
        bases.per_class(1, 2, 1, (8, 8), 8, 9)
    with pytest.raises(ValueError, match="bases: got 0"):
        bases.per_class(1, 2, 1, (8, 8), 0, 1)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_formula(size, scale):
    b, a = (t.double() for t in bases.noise(3, 4, 2, size, scale, torch.Generator().manual_seed(0)))
    small = sum(a[:, k].view(-1, 1, 1, 1) * b[k] for k in range(3))
    expected = small if scale == 1 else interpolate(small, size, mode="bilinear")
    found, sources = decode(
        {"name": "bases", "height": size[0], "width": size[1]}, b, [2, 2], {"coefficients": a}
    )
    torch.testing.assert_close(found, expected)
    assert sources.tolist() == [0, 1, 2, 3] and found.shape == (4, 2, *size)


def test_fitted_bases_span_the_images():
    """Images of rank 3 come back exactly from 3 bases; with more bases the rest is zero."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 3, generator=random)
    images = (mixing @ torch.randn(3, 64, generator=random)).view(6, 1, 8, 8)
    for number in (3, 5):
        b, a = bases.fitted(images, number, 1)
        assert b.shape == (number, 1, 8, 8) and a.shape == (6, number)
        torch.testing.assert_close(bases.combine(b, a, (8, 8)), images, rtol=1e-4, atol=1e-4)
    assert b[3:].abs().max() < 1e-2 and (a[:, 3:] != 0).all()
    b, a = bases.fitted(images[:2], 5, 1)  # fewer images than bases
    torch.testing.assert_close(bases.combine(b, a, (8, 8)), images[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.uses_global_random_state  # gradcheck does
def test_derivatives():
    b, a = bases.noise(2, 3, 1, (5, 4), 2, generator(0, "test"))
    leaves = (b.double().requires_grad_(), a.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: bases.combine(x, y, (5, 4)), leaves)


def test_errors():
    b, a = bases.noise(2, 3, 1, (8, 8), 2, generator(0, "test"))
    with pytest.raises(ValueError, match="coefficients: got shape"):
        bases.combine(b, a[:, :1], (8, 8))
    with pytest.raises(ValueError, match="bases lack coefficients"):
        decode({"name": "bases", "height": 8, "width": 8}, b, [3])
    with pytest.raises(ValueError, match="got height 3"):
        decode({"name": "bases", "height": 3, "width": 8}, b, [3], {"coefficients": a})
