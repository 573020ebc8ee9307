"""What a module must be able to do to serve as a generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddfast.data import denormalise, normalise
from ddfast.generator import Generator, check_generator, frozen, normalised, signed


class Own(nn.Module):
    """A generator that somebody else might write."""

    def __init__(self, dim: int = 5, shape: tuple[int, ...] = (3, 8, 8), classes: int = 3) -> None:
        super().__init__()
        self.latent_dim, self.shape = dim, shape
        random = torch.Generator().manual_seed(0)
        pixels = torch.Size(shape).numel()
        self.weight = nn.Parameter(torch.randn(dim, pixels, generator=random))
        self.classes = nn.Parameter(torch.randn(classes, pixels, generator=random))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(latents @ self.weight + self.classes[labels]).view(-1, *self.shape)


def test_ours_and_anybodys_pass(dataset) -> None:
    check_generator(Generator(3, 3, 8, 4, 2), dataset)
    check_generator(Own(), dataset)
    check_generator(Own().double(), dataset)


def test_the_module_is_left_as_it_was(dataset) -> None:
    generator = Generator(3, 3, 8, 4, 2).train()
    generator.last.requires_grad_(False)
    generator.blocks[0].eval()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    check_generator(generator, dataset)
    assert all(torch.equal(value, before[n]) for n, value in generator.state_dict().items())
    assert [p.requires_grad for p in generator.last.parameters()] == [False, False]
    assert generator.first.parametrizations.weight.original.requires_grad
    assert generator.training
    assert generator.norm.training
    assert not generator.blocks[0].training
    assert all(parameter.grad is None for parameter in generator.parameters())


class Wrong(Own):
    def __init__(self, change) -> None:
        super().__init__()
        self.change, self.calls = change, 0

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.change(self, super().forward(latents, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, x: x[:, :1], r"images of shape \(2, 1, 8, 8\), expected \(2, 3, 8, 8\)"),
        (lambda g, x: x[:, :, ::2], r"images of shape \(2, 3, 4, 8\), expected \(2, 3, 8, 8\)"),
        (lambda g, x: (x + 1) * 127.5, r"pixels from .* to 25\d\.?\d*, expected \[-1, 1\]"),
        (lambda g, x: x / 0 * 0, "pixels that are not finite"),
        (lambda g, x: x.round().to(torch.int32), "returned torch.int32, expected a floating"),
        (lambda g, x: (x, x), "returned tuple, expected a floating"),
        (lambda g, x: x - x.mean(0, keepdim=True).clamp(0), r"from its|with the others|expected"),
        (lambda g, x: x * 0.5**g.calls, "changes with the others in its batch, or from call"),
        (lambda g, x: x.detach(), "do not depend differentiably on the latents"),
        (lambda g, x: x * 0 + 0.5, "do not depend differentiably on the latents"),
    ],
)
def test_what_is_wrong_is_said(dataset, change, message) -> None:
    with pytest.raises(ValueError, match=f"^generator: .*({message})"):
        check_generator(Wrong(change), dataset)


def test_a_generator_of_fewer_classes_or_another_call_is_refused(dataset) -> None:
    with pytest.raises(ValueError, match=r"called with latents \(2, 5\) and labels \[2, 0\] it"):
        check_generator(Own(classes=2), dataset)

    class OneArgument(Own):
        def forward(self, latents: Tensor) -> Tensor:
            return latents

    with pytest.raises(ValueError, match=r"it failed: .*positional argument"):
        check_generator(OneArgument(), dataset)


@pytest.mark.parametrize("dim", [None, 0, 2.0, True, "8"])
def test_latent_dim_must_be_there(dataset, dim) -> None:
    generator = Own()
    generator.latent_dim = dim
    with pytest.raises(TypeError, match="its attribute latent_dim is"):
        check_generator(generator, dataset)


def test_it_must_be_a_module(dataset) -> None:
    with pytest.raises(TypeError, match="got function, expected a torch"):
        check_generator(lambda latents, labels: latents, dataset)


def test_frozen_restores_after_an_error() -> None:
    generator = Own().train()
    with pytest.raises(RuntimeError), frozen(generator) as same:
        assert same is generator
        assert not generator.training
        assert not generator.weight.requires_grad
        raise RuntimeError
    assert generator.training
    assert generator.weight.requires_grad


def test_both_spaces_of_images(dataset) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    images = signed(pixels, torch.float64)
    assert images.aminmax() == (-1, 1)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    expected = normalise(pixels, mean, std, torch.float64)
    assert torch.allclose(normalised(images, mean, std), expected, rtol=0, atol=1e-12)
    assert torch.equal(denormalise(normalised(images, mean, std), mean, std), pixels)
    with pytest.raises(ValueError, match="mean: got 2 numbers, expected 3"):
        normalised(images, mean[:2], std)
    with pytest.raises(TypeError, match=r"images: got torch\.float64, expected torch\.uint8"):
        signed(images)
