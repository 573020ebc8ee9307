"""M3D against its loop written out by hand, class after class with whole kernel matrices."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import data, methods, nets
from ddfast.augment import DSA
from ddfast.data import normalise
from ddfast.memory import FIRST_ORDER
from ddfast.methods import Run, dm, m3d
from ddfast.random import generator

SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "init": "real",
    "factor": 2,
    "lr_img": 0.5,
    "ipm": 3,
}


def kernel_matrix(z: Tensor, kernel: str, detached: bool = True) -> Tensor:
    n = len(z)
    distances = torch.stack([((z - row) ** 2).sum(1) for row in z])
    if kernel == "gaussian":
        width = distances.sum() / (n**2 - n)
        if detached:
            width = width.detach()
        return sum(torch.exp(-distances / (width * f)) for f in (0.25, 0.5, 1, 2, 4))
    if kernel == "linear":
        return z @ z.T
    if kernel == "polynomial":
        return (z @ z.T + 1) ** 2
    return sum(torch.exp(-g * distances) for g in (0.1, 1, 5))


def crops(s: Tensor, factor: int) -> Tensor:
    side = s.shape[-1] // factor
    found = [
        image[None, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
        for image in s
        for i in range(factor)
        for j in range(factor)
    ]
    return F.interpolate(torch.cat(found), size=s.shape[-2:], mode="bilinear")


def literal(
    dataset, run, iterations: int, detached: bool = True
) -> tuple[Tensor, list[Tensor], int]:
    """The loop; the random numbers are those the run will draw. Also how often it clamped."""
    config, sampler, classes = run.config, run.sampler, range(dataset.num_classes)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (dataset.mean, dataset.std)
    )
    augment = DSA(config.aug_type, mode="C")
    images = run.images.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([images], config.lr_img, config.momentum)
    history, clamped, nets_drawn = [], 0, 0
    for it in range(iterations):
        if it % config.ipm == 0:
            net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size)
            net = net.double()
            nets.initialise(net, generator(config.seed, "network", nets_drawn))
            nets_drawn += 1
        with torch.no_grad():
            clamped += int(((images < 0) | (images > 1)).sum())
            images.clamp_(0, 1)
        indices, counts = sampler.sample_all(
            config.batch_real, generator(config.seed, "real images", it)
        )
        draw = augment.draw(
            generator(config.seed, "augmentation", it), dataset.size, len(classes), True
        )
        losses, joint = torch.zeros(len(classes), dtype=torch.float64), 0
        for c, members in enumerate(indices.split(counts)):
            x = normalise(dataset.train_images[members], dataset.mean, dataset.std, torch.float64)
            s = (crops(images[c * config.ipc : (c + 1) * config.ipc], config.factor) - mean) / std
            if len(s) > config.batch_syn_max:
                random = generator(config.seed, "subset of the decoded", it, c)
                s = s[torch.randperm(len(s), generator=random)[: config.batch_syn_max]]
            both = augment(torch.cat([s, x]), draw[:, c : c + 1])
            features = net.embed(both)
            n = len(s)
            z = torch.cat([features[:n], features[n:].detach()])
            k = kernel_matrix(z, config.kernel, detached)
            loss = k[:n, :n].mean() - 2 * k[:n, n:].mean() + k[n:, n:].mean()
            losses[c] = loss.detach()
            joint = joint + loss
            if config.step == "per_class":
                optimiser.zero_grad()
                loss.backward(inputs=[images])
                optimiser.step()
        if config.step == "joint":
            optimiser.zero_grad()
            joint.backward(inputs=[images])
            optimiser.step()
        history.append(losses)
    return images.detach(), history, clamped


def go(run: Run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(m3d.step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step": "joint", "momentum": 0.9},
        {"kernel": "linear", "lr_img": 0.01, "init": "noise"},
        {"kernel": "polynomial", "lr_img": 1e-5},
        {"kernel": "laplace", "aug_type": "none", "factor": 1, "ipc": 3},
        {"ipc": 1, "factor": 1, "lr_img": 50.0, "init": "noise"},  # one image, and clamping
        {"batch_syn_max": 3, "lr_img": 5.0},
        {"batch_real": 1, "ipc": 1, "init": "mix", "momentum": 0.0},
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, settings) -> None:
    dataset = make_dataset([7, 4, 9])  # the second has fewer images than the batch
    run = make_run("m3d", dataset, **SETTINGS | settings)
    start = run.images.detach().clone()
    expected, losses, clamped = literal(dataset, run, 7)
    found = go(run, 7)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-9, atol=1e-11)
    if settings.get("kernel") != "laplace":  # its values vanish at distances like these
        assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-5  # every image moved
    if settings.get("lr_img") == 50.0:
        assert clamped > 10


def test_the_bandwidth_is_a_constant(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    run = make_run("m3d", dataset, **SETTINGS)
    other, _, _ = literal(dataset, run, 2, detached=False)
    go(run, 2)
    assert (run.images.detach() - other).abs().max() > 1e-5


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("step", ["joint", "per_class"])
def test_with_the_linear_kernel_it_is_dm(make_dataset, make_run, factor, step) -> None:
    """Whole steps: the same images and losses, in a space that both of them share."""
    dataset = make_dataset([7, 4, 9])
    dataset = dataclasses.replace(dataset, mean=(0.0, 0.0), std=(1.0, 1.0))
    settings = SETTINGS | {"factor": factor, "lr_img": 1e-3, "ipc": 3 if factor == 1 else 2}
    del settings["ipm"]
    run = make_run("m3d", dataset, kernel="linear", ipm=1, step=step, **settings)
    plain = make_run("dm", dataset, parametrisation="multi_formation", **settings)
    plain.augment = run.augment
    inside = 0.4 + 0.2 * torch.rand(run.images.shape, generator=torch.Generator().manual_seed(1))
    for each in (run, plain):
        with torch.no_grad():
            each.images.copy_(inside)
    if step == "joint":
        expected = [dm.step(plain)]
        plain.iteration = 1
        expected += [dm.step(plain)]
    else:  # class after class, as DM's code does where memory is short
        expected = by_class(plain, 2)
    found = go(run, 2)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(run.images, plain.images, rtol=1e-12, atol=1e-13)
    assert (run.images - inside).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def by_class(run: Run, iterations: int) -> list[Tensor]:
    """DM with an optimiser step after each class."""
    history = []
    for _ in range(iterations):
        net = run.fresh_net().requires_grad_(False)
        losses = []
        for c in range(run.dataset.num_classes):
            gradients, loss = dm.sweep(
                run, net, dm.real_batch(run), dm.mean_features, classes=(c, c + 1)
            )
            run.images.grad = gradients["images"]
            run.optimiser.step()
            losses.append(loss)
        history.append(torch.cat(losses))
        run.iteration += 1
    return history


def test_dm_on_decoded_images_with_factor_1_is_dm(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    settings = {"ipc": 2, "model": "ConvNetD2W4", "batch_real": 5, "init": "real"}
    plain = make_run("dm", dataset, **settings)
    decoded = make_run("dm", dataset, parametrisation="multi_formation", factor=1, **settings)
    for _ in range(3):
        assert torch.equal(dm.step(plain), dm.step(decoded))
        plain.iteration += 1
        decoded.iteration += 1
    assert torch.equal(plain.images, decoded.images)


def test_identical_sets_have_no_discrepancy(make_dataset, make_run) -> None:
    """One image on either side, the same: the bandwidth is 0, and nothing is NaN."""
    settings = SETTINGS | {"factor": 1, "lr_img": 10.0}
    for each in (1, 3):
        dataset = make_dataset([each] * 3)
        dataset = dataclasses.replace(dataset, mean=(0.0, 0.0), std=(1.0, 1.0))
        run = make_run("m3d", dataset, **settings | {"ipc": each})
        order = torch.cat([run.sampler.indices(c) for c in range(3)])
        same = normalise(dataset.train_images[order], dataset.mean, dataset.std, torch.float64)
        with torch.no_grad():
            run.images.copy_(same)
        for losses in go(run, 3):
            assert losses.abs().max() < 1e-12
        torch.testing.assert_close(run.images.detach(), same, rtol=0, atol=1e-7)


def test_duplicates_do_no_harm_and_values_are_not_negative(make_dataset, make_run) -> None:
    dataset = make_dataset([6, 4, 9])
    images = dataset.train_images[dataset.train_labels == 0][:1]
    copies = dataset.train_images.clone()
    copies[dataset.train_labels == 0] = images
    run = make_run("m3d", dataclasses.replace(dataset, train_images=copies), **SETTINGS)
    for losses in go(run, 6):
        assert torch.isfinite(losses).all() and losses.min() > -1e-12


def test_a_network_serves_so_many_iterations(make_dataset, make_run) -> None:
    run = make_run("m3d", make_dataset([7, 4, 9]), **SETTINGS)
    weights = []
    for _ in range(7):
        go(run, 1)
        weights.append(run.net.classifier.weight.detach().clone())
    same = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert same == [True, True, False, True, True, False]


@pytest.mark.parametrize("step", ["joint", "per_class"])
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, step) -> None:
    dataset = make_dataset([7, 3, 9, 2])
    settings = SETTINGS | {"step": step, "batch_syn_max": 7}
    whole = make_run("m3d", dataset, **settings)
    expected = go(whole, 4)
    run = make_run("m3d", dataset, **settings)
    run.memory = int(5 * FIRST_ORDER * run.activations)
    found = go(run, 4)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parametrisation", ["hallucinators", "bases"])
def test_what_classes_share_takes_joint_steps(make_dataset, make_run, parametrisation) -> None:
    dataset = make_dataset([7, 4, 9])
    settings = {k: v for k, v in SETTINGS.items() if k != "factor"} | {"ipc": 3}
    settings |= {"parametrisation": parametrisation, "shared": 2}
    run = make_run("m3d", dataset, **settings)
    assert run.config.step == "joint"
    start = {name: tensor.detach().clone() for name, tensor in run.tensors.items()}
    go(run, 2)
    assert all(not torch.equal(run.tensors[name], start[name]) for name in start)
    with pytest.raises(ValueError, match=f"step: got 'per_class'.*{parametrisation} they share"):
        make_run("m3d", dataset, **settings | {"step": "per_class"})


def test_what_cannot_work_is_refused(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    with pytest.raises(ValueError, match="model: ConvNetD2W4BN has batch normalisation"):
        make_run("m3d", dataset, **SETTINGS | {"model": "ConvNetD2W4BN"})
    with pytest.raises(ValueError, match="class 0"):  # 7 images, and 2 x 4 cells
        make_run("m3d", dataset, **SETTINGS | {"init": "mix"})
    with pytest.raises(ValueError, match="memory"):
        make_run("m3d", dataset, memory=1000, **SETTINGS)
    for settings, message in (
        ({"kernel": "cosine"}, "kernel: got 'cosine'"),
        ({"ipm": 0}, "ipm: got 0"),
        ({"aug_type": "color_spin"}, "spin"),
        ({"batch_syn_max": 0}, "batch_syn_max: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            m3d.Config(ipc=1, **settings)


@pytest.mark.parametrize(("size", "factor"), [(8, 1), (16, 2), (32, 2)])
def test_published_settings(make_dataset, size, factor) -> None:
    dataset = make_dataset([9, 9], size=(size, size))
    config = methods.resolve(m3d.Config(ipc=1), dataset)
    assert (config.iterations, config.batch_real, config.batch_syn_max) == (10000, 64, 200)
    assert (config.lr_img, config.momentum, config.ipm, config.step) == (10, 0.5, 5, "per_class")
    assert (config.kernel, config.aug_type) == ("gaussian", "color_crop_cutout")
    assert (config.init, config.factor) == ("mix", factor)
    assert config.augmentation().mode == "C" and config.space == "pixel"
    images, _ = config.starting_set(dataset, torch.Generator())
    first = dataset.train_images[dataset.train_labels == 0].double() / 255
    cell = size // factor  # of the first image of the class, shrunk by nearest neighbour
    assert torch.allclose(images["images"][0, :, :cell, :cell].double(), first[0, :, ::factor, ::factor])  # noqa: E501  # fmt: skip


def test_a_short_run_on_digits_lowers_the_loss() -> None:
    """Of one network, for others have other losses."""
    digits = data.load("digits")
    config = methods.resolve(m3d.Config(ipc=1, iterations=25, ipm=25), digits)
    run = methods.start(config, digits, 1 << 30)
    m3d.check(run)
    losses = [each.sum().item() for each in go(run, 25)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
