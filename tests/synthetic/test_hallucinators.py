"""HaBa's hallucinators: their formula, sizes, storage and errors."""

from __future__ import annotations

import pytest
import torch

from ddfast.random import generator
from ddfast.synthetic import decode, hallucinators


def made(number: int = 2, channels: int = 3, size: tuple[int, int] = (5, 6), **options):
    found = hallucinators.start(number, channels, size, generator(0, "test"), **options)
    random = torch.Generator().manual_seed(1)
    return {
        name: (t + 0.1 * torch.randn(t.shape, generator=random)).double()
        for name, t in found.items()
    }


def literal(base: torch.Tensor, tensors: dict[str, torch.Tensor], j: int) -> torch.Tensor:
    """One base through hallucinator j, pixel by pixel."""
    inner, outer = tensors["inner.weight"][j], tensors["outer.weight"][j]
    channels, height, width = len(inner), *base.shape[1:]
    middle = torch.zeros(channels, height - 2, width - 2, dtype=base.dtype)
    for c in range(channels):
        for y in range(height - 2):
            for x in range(width - 2):
                window = base[:, y : y + 3, x : x + 3]
                value = (inner[c] * window).sum() + tensors["inner.bias"][j, c]
                middle[c, y, x] = value * tensors["scale"][j, c, y, x]
                middle[c, y, x] += tensors["shift"][j, c, y, x]
    out = tensors["outer.bias"][j].view(-1, 1, 1).repeat(1, height, width).clone()
    for c in range(channels):
        for y in range(height - 2):
            for x in range(width - 2):
                out[:, y : y + 3, x : x + 3] += middle[c, y, x] * outer[c]
    return out


@pytest.mark.parametrize("options", [{}, {"number": 1}, {"base_channels": 1}, {"channels": 1}])
def test_the_formula(options):
    tensors = made(**options)
    channels = tensors["inner.weight"].shape[2]
    bases = torch.randn(
        2, channels, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    found = hallucinators.hallucinate(bases, tensors)
    number = len(tensors["scale"])
    expected = [literal(base, tensors, j) for base in bases for j in range(number)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert found.shape[2:] == bases.shape[2:]


def test_the_published_size():
    tensors = hallucinators.start(5, 3, (32, 32), generator(0, "test"))
    assert sum(t.numel() for t in tensors.values()) == 27840  # 9.06 images of CIFAR-10
    assert (tensors["scale"] == 1).all() and (tensors["shift"] == 0).all()
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert not torch.equal(tensors["inner.weight"][0], tensors["inner.weight"][1])


def test_decoding_keeps_classes_together():
    tensors = made(3)
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64, generator=torch.Generator())
    decoded, sources = decode({"name": "hallucinators"}, images, [2, 2], tensors)
    assert sources.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    torch.testing.assert_close(decoded[4], hallucinators.hallucinate(images[1:2], tensors)[1])


@pytest.mark.uses_global_random_state  # gradcheck does
def test_derivatives():
    tensors = {name: t.requires_grad_() for name, t in made(2, 1, (3, 4)).items()}
    bases = torch.randn(1, 1, 3, 4, dtype=torch.float64).requires_grad_()

    def f(b, *values):
        return hallucinators.hallucinate(b, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(f, (bases, *tensors.values()))


def test_errors():
    with pytest.raises(ValueError, match="hallucinators: got 0"):
        hallucinators.start(0, 3, (8, 8), generator(0, "test"))
    with pytest.raises(ValueError, match="size: got 2x8"):
        hallucinators.start(1, 3, (2, 8), generator(0, "test"))
    tensors = made()
    with pytest.raises(ValueError, match="5x6 pixels, the bases have 6x6"):
        hallucinators.hallucinate(torch.zeros(1, 3, 6, 6, dtype=torch.float64), tensors)
    with pytest.raises(ValueError, match="bases: got shape"):
        hallucinators.hallucinate(torch.zeros(1, 1, 5, 6, dtype=torch.float64), tensors)
    del tensors["shift"]
    with pytest.raises(ValueError, match="lack shift"):
        hallucinators.hallucinate(torch.zeros(1, 3, 5, 6, dtype=torch.float64), tensors)
