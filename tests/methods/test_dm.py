"""DM against a loop written out by hand, class by class, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddfast import nets
from ddfast.data import normalise
from ddfast.memory import FIRST_ORDER, FORWARD
from ddfast.methods import dm, feature_matching
from ddfast.random import generator

SETTINGS = {"ipc": 2, "model": "ConvNetD2W4", "batch_real": 5, "lr_img": 0.7, "momentum": 0.5}


def literal(dataset, run, iterations: int, batchnorm: bool = False) -> tuple[Tensor, list[Tensor]]:
    """DM as the paper states it; the random numbers are those the run will draw."""
    config, sampler = run.config, run.sampler
    images = run.images.detach().clone().requires_grad_()
    velocity = None
    history = []
    for it in range(iterations):
        net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size).double()
        nets.initialise(net, generator(config.seed, "network", it))
        net.train()
        indices, counts = sampler.sample_all(
            config.batch_real, generator(config.seed, "real images", it)
        )
        draw = run.augment.draw(
            generator(config.seed, "augmentation", it),
            dataset.size,
            count=dataset.num_classes,
            independent=True,
        )
        real, syn = [], []
        for c, chosen in enumerate(indices.split(counts)):
            assert (dataset.train_labels[chosen] == c).all()
            x = normalise(dataset.train_images[chosen], dataset.mean, dataset.std, torch.float64)
            s = images[c * config.ipc : (c + 1) * config.ipc]
            if config.dsa_strategy != "none":
                x, s = (run.augment(y, draw[:, c : c + 1]) for y in (x, s))
            real.append(x)
            syn.append(s)
        if batchnorm:
            real = list(net.embed(torch.cat(real)).split(counts))
            syn = list(net.embed(torch.cat(syn)).split(config.ipc))
        else:
            real, syn = [net.embed(x) for x in real], [net.embed(s) for s in syn]
        losses = torch.stack(
            [((r.mean(0) - s.mean(0)) ** 2).sum() for r, s in zip(real, syn, strict=True)]
        )
        history.append(losses.detach())
        (gradient,) = torch.autograd.grad(losses.sum(), images)
        velocity = gradient if velocity is None else config.momentum * velocity + gradient
        with torch.no_grad():
            images -= config.lr_img * velocity
    return images.detach(), history


def go(run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(dm.step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize("strategy", ["none", "color_crop_cutout_flip_scale_rotate"])
@pytest.mark.parametrize("init", ["real", "noise"])
def test_equals_the_literal_loop(make_dataset, make_run, strategy, init) -> None:
    dataset = make_dataset([7, 3, 9])  # the second has fewer images than the batch
    run = make_run("dm", dataset, dsa_strategy=strategy, init=init, **SETTINGS)
    expected, losses = literal(dataset, run, 4)
    found = go(run, 4)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-10, atol=1e-12)
    start = make_run("dm", dataset, dsa_strategy=strategy, init=init, **SETTINGS).images
    assert (run.images - start).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # every image moved


@pytest.mark.parametrize(("counts", "ipc"), [([7, 4], 1), ([5], 2), ([1, 6], 1), ([4] * 12, 1)])
def test_one_image_one_class_and_many(make_dataset, make_run, counts, ipc) -> None:
    dataset = make_dataset(counts)
    run = make_run("dm", dataset, **SETTINGS | {"ipc": ipc})
    expected, losses = literal(dataset, run, 3)
    found = go(run, 3)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-10, atol=1e-12)


def test_a_class_without_images_is_named(make_dataset, make_run) -> None:
    with pytest.raises(ValueError, match="no image of class 1"):
        make_run("dm", make_dataset([7, 0, 9]), **SETTINGS)


def test_with_batch_normalisation_all_classes_share_one_batch(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 6, 9])
    settings = SETTINGS | {"model": "ConvNetD2W4BN", "dsa_strategy": "color_flip"}
    run = make_run("dm", dataset, **settings)
    expected, _ = literal(dataset, run, 3, batchnorm=True)
    go(run, 3)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-10, atol=1e-12)
    alone, _ = literal(dataset, make_run("dm", dataset, **settings), 3, batchnorm=False)
    assert (alone - expected).abs().max() > 1e-3  # it does matter


@pytest.mark.parametrize("images_at_once", [2, 3, 4, 7])
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, images_at_once) -> None:
    dataset = make_dataset([7, 3, 9, 2])
    whole = make_run("dm", dataset, **SETTINGS)
    go(whole, 3)
    run = make_run("dm", dataset, **SETTINGS)
    each = run.activations
    run.memory = int(images_at_once * FIRST_ORDER * each) + 1
    sizes = []
    embed = run.net.embed
    run.net.embed = lambda x: (sizes.append(len(x)), embed(x))[1]
    go(run, 3)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-10, atol=1e-12)
    assert max(sizes) <= run.memory / (FORWARD * each)
    assert len(sizes) > 6  # more than one real and one synthetic pass per iteration


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7), st.integers(1, 9))
def test_pieces_cover_every_image_once_with_its_class(counts: list[int], most: int) -> None:
    classes = [c for c, count in enumerate(counts) for _ in range(count)]
    covered = []
    for piece, first, within in feature_matching.pieces_of(counts, most):
        assert 0 < sum(within) == piece.stop - piece.start <= most
        assert min(within) > 0
        assert piece.start == len(covered)
        covered += [first + c for c, count in enumerate(within) for _ in range(count)]
    assert covered == classes


def test_both_sides_see_the_same_augmentation(make_dataset, make_run) -> None:
    """Where the synthetic images are the real ones, only different draws tell them apart."""
    dataset = make_dataset([4, 4, 4])
    run = make_run("dm", dataset, ipc=4, model="ConvNetD2W4", init="real", iterations=20)
    assert run.augment.strategy == "color_crop_cutout_flip_scale_rotate"
    for losses in go(run, 20):
        assert losses.max() < 1e-12  # the images are rounded to float32, once


def test_unequal_batches_with_batch_normalisation_are_refused(make_dataset, make_run) -> None:
    with pytest.raises(ValueError, match=r"batch_real: class 1 \(name1\) has 3 of 5 images"):
        make_run("dm", make_dataset([7, 3, 9]), **SETTINGS | {"model": "ConvNetD2W4BN"})


@pytest.mark.parametrize("model", ["ConvNetD2W4", "ConvNetD2W4BN"])
def test_too_small_a_budget_is_refused(make_dataset, make_run, model) -> None:
    with pytest.raises(ValueError, match=r"memory: .* 9000 bytes"):
        make_run("dm", make_dataset([7, 7, 9]), memory=9000, **SETTINGS | {"model": model})


def test_one_joint_step_with_momentum_across_iterations(make_dataset, make_run) -> None:
    """Stepping per class would apply the momentum once per class and change every image."""
    dataset = make_dataset([7, 7, 9])
    run = make_run("dm", dataset, **SETTINGS)
    steps = []
    step = run.optimiser.step
    run.optimiser.step = lambda: (steps.append(run.images.grad.clone()), step())[1]
    start = run.images.detach().clone()
    go(run, 2)
    assert len(steps) == 2
    expected = start - 0.7 * steps[0] - 0.7 * (0.5 * steps[0] + steps[1])
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-12, atol=1e-14)
