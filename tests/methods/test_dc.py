"""DC and DSA against a loop written out by hand, with per-layer distances, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.data import normalise
from ddfast.engine import gradients
from ddfast.memory import FIRST_ORDER, SECOND_ORDER
from ddfast.methods import dc, dsa
from ddfast.random import generator

SETTINGS = {
    "ipc": 3,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "outer_loop": 3,
    "inner_loop": 2,
    "lr_img": 0.3,
    "lr_net": 0.05,
    "batch_train": 4,
}


def distance(syn: tuple[Tensor, ...], real: tuple[Tensor, ...], metric: str) -> Tensor:
    if metric == "ours":
        total = torch.zeros((), dtype=torch.float64)
        for b, a in zip(syn, real, strict=True):
            if a.dim() < 2:
                continue
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
        return total
    a, b = (torch.cat([t.flatten() for t in side]) for side in (real, syn))
    if metric == "mse":
        return ((a - b) ** 2).sum()
    return 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-6)


def literal(dataset, run, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 1 of the paper with all classes in one graph; random numbers as the run's."""
    config, sampler, augment = run.config, run.sampler, run.augment
    classes = range(dataset.num_classes)
    augmented = getattr(config, "dsa_strategy", "none") != "none"

    def random(purpose: str, *step: int) -> torch.Generator:
        return generator(config.seed, purpose, *step)

    def real(chosen: Tensor) -> Tensor:
        return normalise(dataset.train_images[chosen], dataset.mean, dataset.std, torch.float64)

    images = run.images.detach().clone().requires_grad_()
    labels = torch.tensor([c for c in classes for _ in range(config.ipc)])
    optimiser = torch.optim.SGD([images], config.lr_img, config.momentum)
    history = []
    for it in range(iterations):
        net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size).double()
        nets.initialise(net, random("network", it))
        total = torch.zeros(dataset.num_classes, dtype=torch.float64)
        for outer in range(config.outer_loop):
            net.train()
            if "BN" in config.model:
                indices, _ = sampler.sample_all(16, random("batch normalisation", it, outer))
                net(real(indices))
                for module in net.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.eval()
            parameters = tuple(net.parameters())
            indices, counts = sampler.sample_all(
                config.batch_real, random("real images", it, outer)
            )
            losses = []
            for c, chosen in enumerate(indices.split(counts)):
                x, s = real(chosen), images[c * config.ipc : (c + 1) * config.ipc]
                if augmented:
                    draw = augment.draw(random("augmentation", it, outer, c), dataset.size)
                    x, s = augment(x, draw), augment(s, draw)
                grads = []
                for batch in (x, s):
                    loss = cross_entropy(net(batch), torch.tensor([c] * len(batch)))
                    grads.append(torch.autograd.grad(loss, parameters, create_graph=batch is s))
                losses.append(distance(grads[1], grads[0], config.dis_metric))
            stacked = torch.stack(losses)
            optimiser.zero_grad()
            stacked.sum().backward()
            optimiser.step()
            total += stacked.detach()
            if outer == config.outer_loop - 1:
                break
            net.train()
            inner = torch.optim.SGD(net.parameters(), config.lr_net)
            numbers = random("network training", it, outer)
            for _ in range(config.inner_loop):
                for batch in torch.randperm(len(images), generator=numbers).split(
                    config.batch_train
                ):
                    x = images.detach()[batch]
                    if augmented:
                        x = augment(x, augment.draw(numbers, dataset.size, count=len(batch)))
                    inner.zero_grad()
                    cross_entropy(net(x), labels[batch]).backward()
                    inner.step()
        history.append(total / config.outer_loop)
    return images.detach(), history


def go(run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(dc.step(run))
        run.iteration += 1
    return history


def compare(dataset, make_run, method: str, iterations: int = 2, **settings: Any) -> Tensor:
    run = make_run(method, dataset, **settings)
    start = run.images.detach().clone()
    expected, losses = literal(dataset, run, iterations)
    found = go(run, iterations)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-9, atol=1e-11)
    assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-5  # every image moved
    return expected


@pytest.mark.parametrize("metric", ["ours", "cos", "mse"])
def test_dc_equals_the_literal_loop(make_dataset, make_run, metric) -> None:
    compare(make_dataset([7, 4, 9]), make_run, "dc", **SETTINGS, dis_metric=metric)


def test_dc_with_batch_normalisation_equals_the_literal_loop(make_dataset, make_run) -> None:
    compare(make_dataset([20, 17, 18]), make_run, "dc", **SETTINGS | {"model": "ConvNetD2W4BN"})


@pytest.mark.parametrize("strategy", ["color_crop_cutout_flip_scale_rotate", "none"])
def test_dsa_equals_the_literal_loop(make_dataset, make_run, strategy) -> None:
    dataset = make_dataset([7, 4, 9])
    compare(dataset, make_run, "dsa", **SETTINGS, dsa_strategy=strategy)


def test_dsa_is_dc_with_augmentation_and_nothing_else(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    plain = make_run("dc", dataset, **SETTINGS, init="real")
    none = make_run("dsa", dataset, **SETTINGS, dsa_strategy="none")
    some = make_run("dsa", dataset, **SETTINGS)
    for run in (plain, none, some):
        go(run, 2)
    assert torch.equal(plain.images, none.images)
    assert (plain.images - some.images).abs().max() > 1e-3
    assert dsa.step is dc.step


def test_at_ipc_1_the_network_is_never_trained(make_dataset, make_run, monkeypatch) -> None:
    monkeypatch.setattr(dc, "train", lambda *_: pytest.fail("the network was trained"))
    run = make_run("dc", make_dataset([7, 4, 9]), ipc=1, model="ConvNetD2W4", batch_real=5)
    assert (run.config.outer_loop, run.config.inner_loop) == (1, 1)
    go(run, 2)


def test_network_training_happens_between_image_updates_only(
    make_dataset, make_run, monkeypatch
) -> None:
    events = []
    train = dc.train
    monkeypatch.setattr(dc, "train", lambda *a: (events.append("train"), train(*a)))
    run = make_run("dc", make_dataset([7, 4, 9]), **SETTINGS)
    update = run.update
    run.update = lambda *a: (events.append("update"), update(*a))
    go(run, 1)
    assert events == ["update", "train", "update", "train", "update"]


@pytest.mark.parametrize("method", ["dc", "dsa"])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, method, at_once) -> None:
    dataset = make_dataset([7, 4, 9])
    settings = SETTINGS | {"outer_loop": 2}
    whole = make_run(method, dataset, **settings)
    go(whole, 2)
    run = make_run(method, dataset, **settings)
    run.memory = 2 * int(at_once * SECOND_ORDER * run.activations) + 2
    sizes = []
    # A hook counts, and makes the engine take its path for any network.
    run.net.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    go(run, 2)
    most = int(at_once * SECOND_ORDER / FIRST_ORDER)
    assert at_once <= max(sizes) <= max(most, settings["batch_train"])
    torch.testing.assert_close(run.images, whole.images, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_the_fused_engine_equals_autograd(make_dataset, make_run, method, monkeypatch) -> None:
    dataset = make_dataset([7, 4, 9])
    fused = make_run(method, dataset, **SETTINGS)
    go(fused, 2)
    monkeypatch.setattr(gradients, "recognise", lambda _: None)
    general = make_run(method, dataset, **SETTINGS)
    go(general, 2)
    torch.testing.assert_close(fused.images, general.images, rtol=1e-9, atol=1e-11)


def test_too_small_a_budget_is_refused(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    run = make_run("dc", dataset, **SETTINGS)
    enough = int(2 * SECOND_ORDER * run.activations) + 1
    make_run("dc", dataset, memory=enough, **SETTINGS)
    with pytest.raises(ValueError, match=r"memory: .* is too small, one image needs"):
        make_run("dc", dataset, memory=enough - 10, **SETTINGS)


def test_the_networks_weights_are_not_touched_by_an_image_update(make_dataset, make_run) -> None:
    run = make_run("dc", make_dataset([7, 4, 9]), **SETTINGS)
    net = run.fresh_net()
    before = [p.detach().clone() for p in net.parameters()]
    dc.match(run, net, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())
