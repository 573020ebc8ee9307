"""Generator and discriminator: shapes, conditioning, weights from one generator alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ddfast.generator import Discriminator, Generator
from ddfast.generator.network import default_latent_dim, default_width, folded


def latents(n: int, dim: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


SIZES = [4, 7, 8, 12, 16, 28, 32, 64, (5, 9), (10, 13), (13, 30), (33, 8)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_size_and_what_the_discriminator_says(size, channels) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    generator = Generator(4, channels, size, latent_dim=3, width=2)
    labels = torch.tensor([3, 0, 1])
    images = generator(latents(3), labels)
    assert images.shape == (3, channels, height, width)
    assert images.abs().max() <= 1
    assert images.std() > 0.01
    assert len({image.detach().numpy().tobytes() for image in images}) == 3
    scores = Discriminator(4, channels, size, width=2)(images, labels)
    assert scores.shape == (3,)
    gradients = torch.autograd.grad(scores.sum(), list(generator.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    ("size", "latent_dim", "width", "blocks"),
    [(8, 32, 32, 1), (16, 64, 16, 2), (28, 128, 64, 2), (32, 128, 64, 3), (64, 128, 64, 4)],
)
def test_defaults_by_size(size, latent_dim, width, blocks) -> None:
    assert default_latent_dim((size, size)) == latent_dim
    assert default_width((size, size)) == width
    assert len(Generator(2, 1, size, 3, 2).blocks) == blocks
    if size == 8:
        generator = Generator(2, 1, size)
        assert (generator.latent_dim, generator.last.in_channels) == (latent_dim, width)


def test_in_evaluation_mode_an_image_depends_on_its_latent_and_label_alone() -> None:
    generator = Generator(3, 1, 8, 3, 4).train()
    for seed in range(5):  # running statistics that are not those of a new network
        generator(latents(6, seed=seed), torch.arange(6) % 3)
    generator.eval()
    labels = torch.tensor([0, 1, 2, 0])
    images = generator(latents(4), labels)
    for i in range(4):
        alone = generator(latents(4)[i : i + 1], labels[i : i + 1])
        assert torch.allclose(images[i : i + 1], alone, atol=1e-6)
    other = generator(latents(4), (labels + 1) % 3)
    assert ((images - other).abs().amax((1, 2, 3)) > 1e-3).all()


def test_batch_normalisation_is_scaled_and_shifted_by_the_condition() -> None:
    norm = Generator(3, 1, 8, 3, 4).blocks[0].norm1
    condition, x = latents(5, 6), latents(5, 8 * 16).view(5, 8, 4, 4)
    scale, shift = (condition @ norm.scale_shift.weight.T)[:, :, None, None].split(8, 1)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), False, keepdim=True)
    norm.scale_shift.eval()  # no further step of the power method
    expected = (x - mean) / (variance + norm.norm.eps).sqrt() * (1 + scale) + shift
    assert torch.allclose(norm(x, condition), expected, rtol=1e-4, atol=1e-5)


def test_the_discriminators_score_depends_on_the_label() -> None:
    images = latents(2, 64).view(2, 1, 8, 8)
    net = Discriminator(3, 1, 8, 4)
    scores = [net(images, torch.tensor([c, c])) for c in range(3)]
    assert (scores[0] - scores[1]).abs().min() > 1e-4


@pytest.mark.parametrize("net", [Generator, Discriminator])
def test_weights_follow_from_the_generator_alone(net) -> None:
    def made(seed: int) -> nn.Module:
        return net(3, 1, 8, width=4, generator=torch.Generator().manual_seed(seed))

    first, again, other = (made(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.isfinite(value).all() for value in first.values())
    drawn = [name for name in first if first[name].numel() > 1 and name.endswith("original")]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_every_weight_has_spectral_norm_one_after_training_steps() -> None:
    generator = Generator(3, 1, 8, 3, 4).train()
    net = Discriminator(3, 1, 8, 4).train()
    for seed in range(20):
        net(generator(latents(4, seed=seed), torch.tensor([0, 1, 2, 0])), torch.tensor([0] * 4))
    checked = 0
    for module in [*generator.modules(), *net.modules()]:
        if parametrize.is_parametrized(module, "weight"):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2).item()
            assert largest == pytest.approx(1, abs=0.02)
            checked += 1
        else:
            assert not isinstance(module, (nn.Conv2d, nn.Linear))
    assert checked == 7 + 8


def test_folded_weights_make_the_same_images() -> None:
    generator = Generator(3, 1, 8, 3, 4).train()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(1.7)  # now normalisation has something to do
    for seed in range(20):
        generator(latents(6, seed=seed), torch.arange(6) % 3)
    before = copy.deepcopy(generator.state_dict())
    plain = folded(generator.eval())
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    labels = torch.tensor([0, 1, 2])
    images = generator(latents(3), labels)
    assert torch.allclose(plain(latents(3), labels), images, atol=1e-4)
    # and the generator is as it was, still normalised
    after = generator.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1, 8), ValueError, "classes: got 0, expected at least 1"),
        ((2, 1.5, 8), TypeError, "channels: got 1.5, expected an integer"),
        ((2, 1, 3), ValueError, "size: got 3x3, expected at least 4 pixels a side"),
        ((2, 1, (8, 8, 8)), ValueError, "size: got .8, 8, 8., expected one integer or"),
        ((2, 1, 8, 0), ValueError, "latent_dim: got 0"),
        ((2, 1, 8, 4, 0), ValueError, "width: got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        Generator(*arguments)


def test_wrong_inputs_are_named() -> None:
    generator = Generator(3, 1, 8, 3, 4)
    with pytest.raises(ValueError, match=r"latents: got shape \(2, 4\), expected \(N, 3\)"):
        generator(latents(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\), expected 2"):
        generator(latents(2), torch.tensor([0, 1, 2]))
