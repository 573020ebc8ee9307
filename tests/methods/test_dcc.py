"""DCC and DSAC against a loop written out by hand, with per-layer distances, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ddfast import methods, nets
from ddfast.data import normalise
from ddfast.methods import dc, dcc, dsac
from ddfast.random import generator

SETTINGS = {
    "ipc": 2,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "outer_loop": 3,
    "inner_loop": 2,
    "outer_warmup": 1,
    "inner_warmup": 2,
    "lr_img": 0.3,
    "lr_net": 0.05,
    "batch_train": 4,
}


def distance(syn: list[Tensor], real: list[Tensor], metric: str) -> Tensor:
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
    """The published loop with all classes in one graph; random numbers as the run's."""
    config, sampler, augment = run.config, run.sampler, run.augment
    classes = range(dataset.num_classes)

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
                net(real(sampler.sample_all(16, random("batch normalisation", it, outer))[0]))
                for module in net.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.eval()
            parameters = tuple(net.parameters())
            indices, counts = sampler.sample_all(
                config.batch_real, random("real images", it, outer)
            )
            together = it >= config.outer_warmup or outer >= config.inner_warmup
            losses, mean, augmented = [], [torch.zeros_like(p) for p in parameters], []
            for c, chosen in enumerate(indices.split(counts)):
                draw = augment.draw(random("augmentation", it, outer, c), dataset.size)
                x = augment(real(chosen), draw)
                s = augment(images[c * config.ipc : (c + 1) * config.ipc], draw)
                own = torch.autograd.grad(
                    cross_entropy(net(x), torch.tensor([c] * len(x))), parameters
                )
                if together:
                    mean = [m + g / len(classes) for m, g in zip(mean, own, strict=True)]
                    augmented.append(s)
                    continue
                loss = cross_entropy(net(s), torch.tensor([c] * len(s)))
                found = torch.autograd.grad(loss, parameters, create_graph=True)
                losses.append(distance(list(found), list(own), config.dis_metric))
            if together:
                loss = cross_entropy(net(torch.cat(augmented)), labels)
                found = torch.autograd.grad(loss, parameters, create_graph=True)
                value = distance(list(found), mean, config.dis_metric)
                losses = [value / len(classes)] * len(classes)
            optimiser.zero_grad()
            torch.stack(losses).sum().backward()
            optimiser.step()
            total += torch.stack(losses).detach() * (len(classes) if together else 1)
            if outer == config.outer_loop - 1:
                break
            net.train()
            inner = torch.optim.SGD(net.parameters(), config.lr_net)
            numbers = random("network training", it, outer)
            for _ in range(config.inner_loop):
                order = torch.randperm(len(images), generator=numbers)
                for batch in order.split(config.batch_train):
                    x = images.detach()[batch]
                    x = augment(x, augment.draw(numbers, dataset.size, count=len(batch)))
                    inner.zero_grad()
                    cross_entropy(net(x), labels[batch]).backward()
                    inner.step()
        history.append(total / config.outer_loop)
    return images.detach(), history


def go(run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(dcc.step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    ("method", "counts", "settings"),
    [
        ("dcc", [7, 4, 9], {}),  # batches of 5, 4 and 5
        ("dcc", [7, 5, 9], {"dis_metric": "mse"}),
        ("dcc", [7, 4, 9], {"dis_metric": "cos", "ipc": 1}),
        ("dcc", [20, 17, 18], {"model": "ConvNetD2W4BN"}),
        ("dsac", [7, 4, 9], {"dsa_strategy": "color_crop_cutout_flip_scale_rotate"}),
        ("dsac", [7, 4, 9], {"dsa_strategy": "none"}),
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, method, counts, settings) -> None:
    """Class by class, then together from update 2 on, and in iteration 1 from the start."""
    dataset = make_dataset(counts)
    run = make_run(method, dataset, **SETTINGS | settings)
    start = run.images.detach().clone()
    expected, losses = literal(dataset, run, 2)
    found = go(run, 2)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-9, atol=1e-11)
    assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-5  # every image moved


@pytest.mark.parametrize(("counts", "same"), [([7, 5, 9], True), ([7, 4, 9], False)])
def test_the_real_gradient_is_a_mean_of_means(make_dataset, make_run, counts, same) -> None:
    """Only with equal batches is it that of the mean loss over all real images."""
    dataset = make_dataset(counts)
    run = make_run("dcc", dataset, **SETTINGS | {"outer_warmup": 0})
    net = run.fresh_net()
    indices, sizes = run.sampler.sample_all(5, run.generator("real images", 0))
    labels = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    parameters = tuple(net.parameters())
    real = torch.autograd.grad(cross_entropy(net(run.real(indices)), labels), parameters)
    syn = torch.autograd.grad(cross_entropy(net(run.images), run.labels), parameters)
    joint = distance(list(syn), list(real), "ours")
    _, losses = dcc.match_together(run, net, 0)
    assert (losses == losses[0]).all() and len(losses) == 3
    assert (abs(losses[0].item() - joint.item()) < 1e-9) == same


@pytest.mark.parametrize(
    ("iteration", "ipc", "together_from"),
    [(0, 1, 10), (249, 10, 10), (249, 50, 10), (250, 50, 0), (250, 1, 0), (999, 10, 0)],
)
def test_the_published_switch(
    make_dataset, make_run, monkeypatch, iteration, ipc, together_from
) -> None:
    """Class by class before iteration 250, but only for the first ten image updates of each."""
    dataset = dataclasses.replace(make_dataset([60, 60]), name="CIFAR10")
    run = make_run("dcc", dataset, ipc=ipc, model="ConvNetD1W4", lr_img=0.1)
    events = []
    for module, name in ((dc, "match"), (dcc, "match_together")):
        monkeypatch.setattr(
            module,
            name,
            lambda run, net, outer, name=name: (
                events.append(name),
                (torch.zeros_like(run.images), torch.zeros(2, dtype=torch.float64)),
            )[1],
        )
    monkeypatch.setattr(dc, "train", lambda *_: events.append("train"))
    run.iteration = iteration
    dcc.step(run)
    updates = dcc.LOOPS[ipc][0]
    kinds = ["match" if i < together_from else "match_together" for i in range(updates)]
    expected = [event for kind in kinds for event in (kind, "train")][:-1]
    assert events == expected  # at ipc 1, too, the network is trained


@pytest.mark.parametrize("method", ["dcc", "dsac"])
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, monkeypatch, method) -> None:
    dataset = make_dataset([7, 4, 9])
    whole = make_run(method, dataset, **SETTINGS)
    go(whole, 2)
    run = make_run(method, dataset, **SETTINGS)
    run.memory = 30 * run.activations
    monkeypatch.setattr(dc, "class_groups", lambda *_: iter([(0, 1), (1, 3)]))
    go(run, 2)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("ipc", "loops"),
    [(1, (10, 5)), (10, (10, 50)), (20, (20, 25)), (30, (30, 20)), (40, (40, 15)), (50, (50, 10)),
     (2, (10, 10)), (5, (10, 25)), (100, (100, 5))],
)  # fmt: skip
def test_published_settings(make_dataset, ipc, loops) -> None:
    dataset = dataclasses.replace(make_dataset([3, 3], size=(32, 32)), name="CIFAR10")
    for method in (dcc, dsac):
        config = methods.resolve(method.Config(ipc=ipc), dataset)
        assert (config.outer_loop, config.inner_loop) == loops
        assert (config.iterations, config.outer_warmup, config.inner_warmup) == (1000, 250, 10)
        assert (config.init, config.lr_img, config.momentum) == ("real", 0.1, 0.5)
        assert (config.lr_net, config.batch_real, config.batch_train) == (0.01, 256, 256)
        assert (config.dis_metric, config.model) == ("ours", "ConvNet")
    assert config.dsa_strategy == "color_crop_cutout_flip_scale_rotate"
    shorter = methods.resolve(dcc.Config(ipc=ipc, iterations=100), dataset)
    assert shorter.outer_warmup == 25
    with pytest.raises(ValueError, match="outer_warmup: got -1"):
        dcc.Config(ipc=1, outer_warmup=-1)
