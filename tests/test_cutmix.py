"""CutMix against the definition, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from ddfast.cutmix import box, cutmix


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def batches(count: int, images: int = 5, size: tuple[int, int] = (9, 6)) -> torch.Tensor:
    """Every pixel says which batch, image, row and column it is of."""
    height, width = size
    place = torch.arange(count * images * height * width, dtype=torch.float64)
    return place.view(count, images, 1, height, width).repeat(1, 1, 2, 1, 1)


def test_every_pixel_is_the_images_own_or_that_of_its_partner_inside_one_box() -> None:
    x = batches(40)
    kept = x.clone()
    mixed, partner, share = cutmix(x, generators(40), 1.0)
    assert torch.equal(x, kept)
    areas = set()
    for k in range(40):
        assert sorted(partner[k].tolist()) == list(range(5))
        foreign = (mixed[k] != x[k]).any(0).any(0)  # (H, W), over images and channels
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns[None])
        expected = torch.where(foreign, x[k][partner[k]], x[k])
        assert torch.equal(mixed[k], expected)
        if partner[k].tolist() != list(range(5)):
            assert share[k].item() == pytest.approx(1 - foreign.sum().item() / 54, abs=1e-12)
        areas.add(foreign.sum().item())
    assert len(areas) > 8 and 0 in areas


def test_the_box() -> None:
    # sqrt(1 - 0.75) = 0.5: half of each side, around the centre.
    assert box([0.75, 0.5, 0.5], (8, 16)) == (slice(2, 6), slice(4, 12))
    assert box([0.75, 0.0, 0.99], (8, 16)) == (slice(0, 2), slice(11, 16))  # cut at the border
    assert box([0.75, 0.5, 0.5], (7, 7)) == (slice(2, 4), slice(2, 4))  # 3 becomes 2
    assert box([0.0, 0.5, 0.5], (8, 8)) == (slice(0, 8), slice(0, 8))
    rows, columns = box([0.999, 0.5, 0.5], (8, 8))
    assert rows.start == rows.stop and columns.start == columns.stop


def test_a_box_in_the_middle_leaves_the_share_that_was_drawn() -> None:
    for keep in torch.linspace(0, 0.99, 60).tolist():
        rows, columns = box([keep, 0.5, 0.5], (512, 256))
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        assert 0 <= (1 - keep) - area / (512 * 256) < 0.013  # sides are rounded down


def test_batches_that_are_not_mixed_are_left_alone_and_use_as_many_numbers() -> None:
    x = batches(200, 9)
    used, unused = generators(200), generators(200)
    mixed, partner, share = cutmix(x, used, 0.5)
    same, still, ones = cutmix(x, unused, 0.0)
    assert same is x and torch.equal(ones, torch.ones(200, dtype=torch.float64))
    assert torch.equal(still, torch.arange(9).repeat(200, 1))
    untouched = (partner == torch.arange(9)).all(1)
    assert 70 < untouched.sum() < 130
    assert torch.equal(mixed[untouched], x[untouched])
    assert (share[untouched] == 1).all()
    for a, b in zip(used, unused, strict=True):
        assert torch.equal(a.get_state(), b.get_state())
    with pytest.raises(ValueError, match="generators: got 2, expected 3"):
        cutmix(batches(3), generators(2), 0.5)
