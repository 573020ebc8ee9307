"""Inversion: it recovers the generator's own images, and comes nearer to others than it began."""

from __future__ import annotations

import math

import pytest
import torch

from ddfast import nets
from ddfast.generator import Generator, Inversion, invert


@pytest.fixture(scope="module")
def generator() -> Generator:
    """With running statistics of its own, in double precision, so that rounding plays no part."""
    made = Generator(3, 1, 8, 4, 4, torch.Generator().manual_seed(5)).double().train()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(100):
            made(torch.randn(30, 4, generator=random).double(), torch.arange(30) % 3)
    return made


@pytest.fixture(scope="module")
def own(generator) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([0, 1, 2, 2, 0, 1])
    latents = torch.randn(6, 4, generator=torch.Generator().manual_seed(7)).double()
    with torch.no_grad():
        generator.eval()
        images = generator(latents, labels)
        generator.train()
    return images, labels


def noise(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=random, dtype=torch.uint8)
    return images, torch.arange(n) % 3


def test_the_generators_own_images_are_recovered(generator, own) -> None:
    images, labels = own
    found = invert(generator, images, labels, steps=300)
    spread = (images - images.mean(0)).square().mean()
    assert found.pixel_errors.max() < 1e-3 * spread
    generator.eval()
    made = generator(found.latents, labels)
    generator.train()
    errors = (made - images).square().flatten(1).mean(1)
    assert torch.allclose(found.pixel_errors, errors.detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_error_falls_for_every_image(generator, weight) -> None:
    images, labels = noise()
    errors = []
    for steps in (0, 5, 60):
        found = invert(generator, images, labels, steps=steps, feature_weight=weight, starts=5)
        errors.append(found.pixel_errors + weight * found.feature_errors)
        assert (found.feature_errors > 0).all() == (weight > 0)
    assert (errors[1] <= errors[0]).all()
    assert (errors[2] < errors[0]).all()


def test_reached_errors_are_those_of_the_latents(generator) -> None:
    """Recomputed from the definition, with a network and a normalised space of the caller's."""
    images, labels = noise()
    net = nets.build("ConvNetD1W8", 1, 3, 8).double()
    found = invert(generator, images, labels, steps=10, net=net, mean=[0.3], std=[0.2])
    goal = images.double() / 127.5 - 1
    with torch.no_grad():
        generator.eval()
        made = generator(found.latents, labels)
        generator.train()
        features = [net.embed(((x + 1) / 2 - 0.3) / 0.2) for x in (made, goal)]
    assert torch.allclose(found.pixel_errors, (made - goal).square().mean((1, 2, 3)), atol=1e-12)
    relative = (features[0] - features[1]).square().mean(1) / features[1].square().mean()
    assert torch.allclose(found.feature_errors, relative, rtol=1e-6)


def test_the_way_is_that_of_adam_on_both_errors(generator) -> None:
    """Written out for one image after the other."""
    images, labels = noise()
    net = nets.build("ConvNetD1W8", 1, 3, 8).double()
    options = {"net": net, "feature_weight": 0.3, "starts": 3}
    start = invert(generator, images, labels, steps=0, **options)
    found = invert(generator, images, labels, steps=4, lr=0.05, **options)
    goals = images.double() / 127.5 - 1
    scale = net.embed(goals).square().mean().item()
    generator.eval()
    for i, goal in enumerate(goals):
        latents = start.latents[i : i + 1].clone().requires_grad_()
        adam = torch.optim.Adam([latents], 0.05)
        seen = []
        for step in range(5):
            made = generator(latents, labels[i : i + 1])
            features = (net.embed(made) - net.embed(goal[None])).square().mean()
            loss = (made - goal).square().mean() + 0.3 * features / scale
            seen.append((loss.item(), latents.detach().clone()))
            adam.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 4)) / 2
            latents.grad = torch.autograd.grad(loss, latents)[0]
            adam.step()
        best = min(seen, key=lambda pair: pair[0])[1]
        assert torch.allclose(found.latents[i : i + 1], best, rtol=0, atol=1e-6)
    generator.train()


def test_more_starts_begin_nearer(generator) -> None:
    images, labels = noise(6)
    one, many = (invert(generator, images, labels, steps=0, starts=n) for n in (1, 200))
    assert (many.pixel_errors <= one.pixel_errors).all()
    assert many.pixel_errors.mean() < one.pixel_errors.mean()


def test_the_same_bits_again_and_other_chunks_change_rounding_only(generator) -> None:
    images, labels = noise(5)
    first = invert(generator, images, labels, steps=15)
    again = invert(generator, images, labels, steps=15)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for options in ({"chunk": 2}, {"memory": "300KiB"}):
        other = invert(generator, images, labels, steps=15, **options)
        assert torch.allclose(first.latents, other.latents, atol=1e-9)
    seeded = invert(generator, images, labels, steps=15, seed=1)
    assert not torch.allclose(first.latents, seeded.latents, atol=1e-3)


def test_the_memory_sets_the_chunk(generator, monkeypatch) -> None:
    images, labels = noise(12)
    sizes: list[int] = []
    handle = generator.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])))
    try:
        invert(generator, images, labels, steps=1, starts=1, memory="2MiB")
        whole = max(sizes)
        sizes.clear()
        invert(generator, images, labels, steps=1, starts=1, memory="500KiB")
        assert 3 < max(sizes) < whole
        with pytest.raises(ValueError, match=r"memory: the budget of 1024 bytes is too small, one"):
            invert(generator, images, labels, memory="1KiB")
    finally:
        handle.remove()


def test_the_generator_is_left_as_it_was(generator) -> None:
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    invert(generator, *noise(), steps=2)
    assert generator.training
    assert all(parameter.requires_grad for parameter in generator.parameters())
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(torch.equal(before[n], value) for n, value in generator.state_dict().items())


def test_float_images_and_none(generator) -> None:
    images, labels = noise()
    expected = invert(generator, images, labels, steps=3)
    found = invert(generator, images.double() / 127.5 - 1, labels, steps=3)
    assert torch.allclose(found.latents, expected.latents)
    empty = invert(generator, images[:0], labels[:0])
    assert isinstance(empty, Inversion)
    assert [tuple(value.shape) for value in empty] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [1]}, TypeError, "images: got list, expected uint8 or floating"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.int64)}, TypeError, r"got torch\.int64"),
        ({"images": torch.zeros(4, 8, 8)}, ValueError, r"images: got shape \(4, 8, 8\)"),
        (
            {"images": torch.full((4, 1, 8, 8), 1.5)},
            ValueError,
            r"pixels from 1\.5 to 1\.5, expected \[-1",
        ),
        ({"images": torch.full((4, 1, 8, 8), torch.nan)}, ValueError, r"from nan to nan, expected"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels: expected 4 integers"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be int64"),
        ({"labels": torch.full((4,), -1)}, ValueError, "labels must lie in"),
        ({"steps": -1}, ValueError, "steps: got -1, expected an integer of at least 0"),
        ({"starts": 0}, ValueError, "starts: got 0"),
        ({"chunk": 2.5}, ValueError, "chunk: got 2.5"),
        ({"lr": 0.0}, ValueError, "lr: got 0.0, expected more than 0"),
        ({"feature_weight": -1.0}, ValueError, "feature_weight: got -1.0"),
        ({"memory": "much"}, ValueError, "memory: got 'much'"),
        ({"mean": [0.5, 0.5]}, ValueError, "mean: got 2 numbers, expected 1"),
    ],
)
def test_wrong_arguments_are_named(generator, change, error, message) -> None:
    images, labels = noise()
    arguments = {"images": images, "labels": labels, "steps": 1, **change}
    with pytest.raises(error, match=message):
        invert(generator, **arguments)


def test_an_error_that_is_not_finite_is_said(generator) -> None:
    class Broken(torch.nn.Module):
        latent_dim = 4

        def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return generator(latents.double(), labels) / 0

    images, labels = noise()
    with pytest.raises(FloatingPointError, match="an error is not finite at step 0"):
        invert(Broken(), images, labels, steps=3)
