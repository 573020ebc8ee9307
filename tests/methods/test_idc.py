"""IDC against the published loop, written out by hand class after class, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import nets
from ddfast.augment import DSA
from ddfast.cutmix import cutmix
from ddfast.data import normalise
from ddfast.methods import Run, idc
from ddfast.methods.class_steps import step_by_class
from ddfast.random import generator

SETTINGS: dict[str, Any] = {
    "ipc": 1,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "inner_loop": 3,
    "n_data": 6,
    "batch_train": 4,
    "lr_img": 0.05,
    "lr_net": 0.05,
    "metric": "mse",
    "factor": 2,
    "cutmix": 0.5,
    "aug_type": "color_crop_cutout",
}


def crops(s: Tensor, factor: int) -> Tensor:
    """All crops of every image, at full size."""
    side = s.shape[-1] // factor
    found = [
        F.interpolate(
            image[None, :, i * side : (i + 1) * side, j * side : (j + 1) * side],
            size=s.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        for image in s
        for i in range(factor)
        for j in range(factor)
    ]
    return torch.cat(found)


def distance(net, syn: list[Tensor], real: list[Tensor], metric: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, a, b in zip(net.parameters(), real, syn, strict=True):
        if p.dim() != 4:  # biases, norm layers and the classifier do not count
            continue
        if metric == "mse":
            total = total + ((a - b) ** 2).sum()
        elif metric == "l1":
            total = total + (a - b).abs().sum()
        else:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def endless(positions: Tensor, size: int, random: torch.Generator, whole: bool):
    while True:
        for piece in positions[torch.randperm(len(positions), generator=random)].split(size):
            if len(piece) == size or not whole:
                yield piece


def literal(dataset, run, iterations: int) -> tuple[Tensor, list[Tensor], list[int]]:
    """The published algorithm, with its steps class after class or one for all of them."""
    config, classes = run.config, range(dataset.num_classes)

    def random(purpose: str, *step: int) -> torch.Generator:
        return generator(config.seed, purpose, *step)

    def real(chosen: Tensor) -> Tensor:
        return normalise(dataset.train_images[chosen], dataset.mean, dataset.std, torch.float64)

    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (dataset.mean, dataset.std)
    )
    names = config.aug_type.split("_")
    matching = DSA(config.aug_type, mode="C")
    training = DSA("_".join(n for n in names if n != "cutout" or not config.cutmix), mode="C")
    images = run.images.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([images], config.lr_img, config.momentum)
    history, trained = [], []
    for it in range(iterations):
        net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size).double()
        nets.initialise(net, random("network", it))
        learn = torch.optim.SGD(
            net.parameters(),
            config.lr_net,
            config.momentum_net,
            weight_decay=config.weight_decay,
        )
        every = torch.arange(len(dataset.train_labels))
        stream = endless(every, config.batch_train, random("network images", it), False)

        def train(images: int, numbers: torch.Generator, stream=stream, net=net, learn=learn):
            seen = 0
            for _ in range(-(-len(dataset.train_labels) // config.batch_train)):
                chosen = next(stream)
                x, y = real(chosen), dataset.train_labels[chosen]
                x = training(x, training.draw(numbers, dataset.size, count=len(x)))
                x, partner, share = cutmix(x[None], [numbers], config.cutmix)
                one, other = (
                    F.cross_entropy(net(x[0]), y),
                    F.cross_entropy(net(x[0]), y[partner[0]]),
                )
                learn.zero_grad()
                (share[0] * one + (1 - share[0]) * other).backward()
                learn.step()
                seen += len(y)
                if seen >= images:
                    break
            trained.append(seen)

        for epoch in range(config.early):
            train(len(dataset.train_labels), random("early", it, epoch))
        with torch.no_grad():
            images.clamp_(0, 1)
        members = [(dataset.train_labels == c).nonzero()[:, 0] for c in classes]
        batches = [
            endless(m, min(len(m), config.batch_real), random("real images", it, c), True)
            for c, m in enumerate(members)
        ]
        total = torch.zeros(dataset.num_classes, dtype=torch.float64)
        for inner in range(config.inner_loop):
            rows = matching.draw(
                random("augmentation", it, inner), dataset.size, len(classes), True
            )
            joint = torch.zeros((), dtype=torch.float64)
            for c in classes:
                stored = images[c * config.ipc : (c + 1) * config.ipc]
                both = torch.cat(
                    [real(next(batches[c])), (crops(stored, config.factor) - mean) / std]
                )
                count = len(both) - config.ipc * config.factor**2
                both = matching(both, rows[:, c : c + 1])
                sides = []
                for x in (both[:count], both[count:]):
                    loss = F.cross_entropy(net(x), torch.tensor([c] * len(x)))
                    sides.append(torch.autograd.grad(loss, net.parameters(), create_graph=True))
                value = distance(net, sides[1], [g.detach() for g in sides[0]], config.metric)
                total[c] += value.detach()
                if config.step == "joint":
                    joint = joint + value
                else:
                    optimiser.zero_grad()
                    value.backward(inputs=[images])
                    optimiser.step()
            if config.step == "joint":
                optimiser.zero_grad()
                joint.backward(inputs=[images])
                optimiser.step()
            if inner + 1 < config.inner_loop:
                train(config.n_data, random("network training", it, inner))
        history.append(total / config.inner_loop)
    return images.detach(), history, trained


def go(run: Run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(idc.step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("idc", {}),
        ("idc", {"step": "per_class", "ipc": 2, "init": "real"}),
        ("idc", {"metric": "l1", "step": "per_class", "cutmix": 1.0}),
        ("idc", {"metric": "cos", "aug_type": "color_crop", "cutmix": 0.0}),
        ("idc", {"early": 1, "n_data": 1, "momentum": 0.0, "step": "per_class"}),
        ("idc_i", {"ipc": 3, "momentum": 0.9, "lr_img": 2.0}),
        ("idc_i", {"cutmix": 0.0, "n_data": 100, "momentum": 0.9, "step": "per_class"}),
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, method, settings) -> None:
    dataset = make_dataset([7, 4, 9])
    settings = SETTINGS | settings
    if method == "idc_i":
        del settings["factor"]
    run = make_run(method, dataset, **settings)
    start = run.images.detach().clone()
    expected, losses, trained = literal(dataset, run, 2)
    found = go(run, 2)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-9, atol=1e-11)
    assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-5  # every image moved
    # Whole batches of 4, until there are n_data, but no image twice: 6 -> 8, 1 -> 4, 100 -> 20.
    between = {6: 8, 1: 4, 100: 20}[run.config.n_data]
    assert trained == ([20] * run.config.early + [between] * 2) * 2


def displaced(make_dataset, make_run, step: str, momentum: float) -> Tensor:
    """How far each of 60 classes has gone after 3 sweeps with a gradient of 1 and lr_img 1."""
    settings = SETTINGS | {"lr_img": 1.0, "momentum": momentum, "init": "noise", "step": step}
    run = make_run("idc", make_dataset([1] * 60), **settings)
    start = run.images.detach().clone()
    for _ in range(3):
        one = partial(step_by_class, run) if step == "per_class" else None
        run.update(torch.ones_like(start), torch.zeros(60), "", one)
    moved = (run.images.detach() - start).flatten(1)
    assert (moved - moved[:, :1]).abs().max() < 1e-12
    return moved[:, 0]


def test_three_sweeps_with_a_constant_gradient(make_dataset, make_run) -> None:
    joint = displaced(make_dataset, make_run, "joint", 0.5)
    torch.testing.assert_close(joint, torch.full_like(joint, -4.25))
    steps = displaced(make_dataset, make_run, "per_class", 0.5)
    assert steps[0].item() == pytest.approx(-6, abs=1e-12)
    assert steps[-1].item() == pytest.approx(-5, abs=1e-12)  # its last momentum is still to come
    plain = displaced(make_dataset, make_run, "per_class", 0.0)
    torch.testing.assert_close(plain, torch.full_like(plain, -3))


def test_images_are_clamped_once_an_iteration(make_dataset, make_run, monkeypatch) -> None:
    run = make_run("idc", make_dataset([7, 4, 9]), **SETTINGS)
    with torch.no_grad():
        run.images.copy_(torch.linspace(-1, 2, run.images.numel()).view_as(run.images))
    ranges = []

    def match(run, net, real_images, inner):
        ranges.append((run.images.min().item(), run.images.max().item()))
        return torch.full_like(run.images, 10.0), torch.zeros(3, dtype=torch.float64)

    monkeypatch.setattr(idc, "match", match)
    monkeypatch.setattr(idc, "train", lambda *_: ranges.append(None))
    go(run, 2)
    # The network is trained between the image updates and not after the last one.
    assert [place for place, found in enumerate(ranges) if found is None] == [1, 3, 6, 8]
    ranges = [found for found in ranges if found]
    assert ranges[0] == (0, 1) and ranges[3] == (0, 0)
    assert ranges[1] == (-0.5, 0.5) and ranges[2][0] == -1.25


def test_at_most_so_many_decoded_images_are_drawn_anew(make_dataset, make_run) -> None:
    """128 a class unless told otherwise; smaller sets are taken whole and in order."""
    dataset = make_dataset([40, 40])
    settings = SETTINGS | {"ipc": 33, "init": "noise"}
    run = make_run("idc", dataset, **settings)
    assert run.config.batch_syn_max == 128
    every = crops(run.images.detach(), 2)
    found, labels, counts = idc._decoded(run, run.images, 0, 0)
    again, *_ = idc._decoded(run, run.images, 0, 1)
    assert counts == [128, 128] and labels.tolist() == [0] * 128 + [1] * 128
    for c, part in enumerate(found.split(128)):
        own = every[c * 132 : (c + 1) * 132]
        near = (part[:, None] - own[None]).flatten(2).abs().amax(2) < 1e-9
        assert near.sum(1).tolist() == [1] * 128 and near.sum(0).max() == 1
    assert not torch.equal(found, again)
    run = make_run("idc", dataset, **settings | {"ipc": 32})
    found, labels, counts = idc._decoded(run, run.images, 0, 0)
    torch.testing.assert_close(found, crops(run.images.detach(), 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", ["joint", "per_class"])
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, monkeypatch, step) -> None:
    dataset = make_dataset([7, 4, 9])
    settings = SETTINGS | {"step": step, "ipc": 2, "init": "real", "batch_syn_max": 7}
    whole = make_run("idc", dataset, **settings)
    go(whole, 2)
    run = make_run("idc", dataset, **settings)
    run.memory = 30 * run.activations
    monkeypatch.setattr(idc, "_classes_at_once", lambda *_: 2)
    go(run, 2)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "factors"),
    [("multi", [1] * 40 + [2] * 160), ("bound", [2] * 84 + [1] * 19), ("single", [2] * 160)],
)
def test_kinds_of_decoding(make_dataset, make_run, kind, factors) -> None:
    """What is matched; evaluation decodes `bound` as `single`."""
    settings = SETTINGS | {"ipc": 40, "init": "noise", "decode_type": kind}
    most = 127 if kind == "bound" else 200
    run = make_run("idc", make_dataset([1, 1]), **settings, batch_syn_max=most)
    found, labels, counts = idc._decoded(run, run.images, 0, 0)
    assert counts == [len(factors)] * 2
    assert labels.tolist() == [0] * len(factors) + [1] * len(factors)
    stored = run.images.detach()[40:]
    once, twice = stored, crops(stored, 2)
    second = found.detach().split(counts)[1]
    for image, factor in zip(second, factors, strict=True):
        known = once if factor == 1 else twice
        assert (known - image).flatten(1).abs().amax(1).min() < 1e-12
    assert run.config.decoder((8, 8))["kind"] == ("multi" if kind == "multi" else "single")


def test_what_cannot_work_is_refused(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    with pytest.raises(ValueError, match="model: ConvNetD2W4BN has batch normalisation"):
        make_run("idc", dataset, **SETTINGS | {"model": "ConvNetD2W4BN"})
    with pytest.raises(ValueError, match="factor: got 9 for images of"):
        make_run("idc", dataset, **SETTINGS | {"factor": 9, "init": "noise"})
    with pytest.raises(ValueError, match="class 0"):  # 7 images, and 2 x 4 cells
        make_run("idc", dataset, **SETTINGS | {"ipc": 2})
    with pytest.raises(ValueError, match="memory"):
        make_run("idc", dataset, memory=1000, **SETTINGS)
