"""What NCFM trains: networks beforehand and the sampling network meanwhile; whole runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import data, methods, nets
from ddfast.augment import DSA
from ddfast.cutmix import cutmix
from ddfast.data import normalise
from ddfast.distill import distill
from ddfast.methods import Interrupted, Run, characteristic, ncfm
from ddfast.methods.pretrained import FINAL, INITIAL, between, flattened, set_weights
from ddfast.nets.sampling import released_frequencies, sampled_frequencies, sampling_weights
from ddfast.random import generator

SETTINGS: dict[str, Any] = {
    "ipc": 1,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "num_freqs": 40,
    "num_premodel": 3,
    "pretrain_epochs": 6,
    "batch_train": 6,
    "iterations": 4,
}


# --- networks trained beforehand ------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [0.0, 0.5])
def test_the_training_is_a_plain_loop(make_dataset, make_run, mixed) -> None:
    dataset = make_dataset([9, 4, 12])
    run = make_run("ncfm", dataset, **SETTINGS, cutmix=mixed)
    lines = list(ncfm.prepare(run))
    assert len(lines) == 3 and lines[0].startswith("network 1 of 3: ")
    for number, line in enumerate(lines):
        net = nets.build(run.config.model, dataset.channels, 3, dataset.size).double()
        nets.initialise(net, generator(0, "pretrained network", number))
        assert torch.equal(run.state[INITIAL.format(number)], flattened(net))
        optimiser = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4)
        random = generator(0, "pretraining", number)
        augment = DSA("color_crop" if mixed else "color_crop_cutout", mode="C")
        for epoch in range(6):
            for group in optimiser.param_groups:
                group["lr"] = 0.01 * (1 if epoch < 4 else 0.2 if epoch < 5 else 0.04)
            for where in torch.randperm(25, generator=random).split(6):
                x = normalise(dataset.train_images[where], dataset.mean, dataset.std, torch.float64)
                x = augment(x, augment.draw(random, dataset.size, count=len(x)))
                x, partner, share = cutmix(x[None], [random], mixed)
                y, logits = dataset.train_labels[where], net(x[0])
                loss = share[0] * F.cross_entropy(logits, y)
                loss = loss + (1 - share[0]) * F.cross_entropy(logits, y[partner[0]])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        expected = flattened(net)
        torch.testing.assert_close(run.state[FINAL.format(number)], expected, rtol=1e-9, atol=1e-11)
        images = normalise(dataset.train_images, dataset.mean, dataset.std, torch.float64)
        right = (net(images).argmax(1) == dataset.train_labels).double().mean().item()
        assert line.endswith(f": {100 * right:.1f} % of the training images right")
    assert not torch.equal(run.state[INITIAL.format(0)], run.state[INITIAL.format(1)])


def test_preparing_begins_with_what_is_missing(make_dataset, make_run) -> None:
    dataset = make_dataset([9, 4, 12])
    whole, part = (make_run("ncfm", dataset, **SETTINGS) for _ in range(2))
    assert len(list(ncfm.prepare(whole))) == 3
    lines = ncfm.prepare(part)
    next(lines)
    kept = part.state
    part.stop = True
    with pytest.raises(Interrupted):
        next(lines)
    assert part.state is kept and FINAL.format(1) not in kept
    part.stop = False
    assert [line.split(":")[0] for line in ncfm.prepare(part)] == [
        "network 2 of 3", "network 3 of 3"
    ]  # fmt: skip
    assert part.state.keys() == whole.state.keys()
    assert all(torch.equal(part.state[name], whole.state[name]) for name in whole.state)
    assert list(ncfm.prepare(part)) == []


def test_weights_on_the_line_between_two_networks(make_dataset, make_run) -> None:
    run = make_run("ncfm", make_dataset([9, 4, 12]), **SETTINGS | {"num_premodel": 1})
    list(ncfm.prepare(run))
    before, after = run.state[INITIAL.format(0)], run.state[FINAL.format(0)]
    assert torch.equal(between(run, 0, 1.0), before)
    assert torch.equal(between(run, 0, 0.0), after)
    quarter = between(run, 0, 0.25)
    torch.testing.assert_close(quarter, after + 0.25 * (before - after))
    net = set_weights(run.net, quarter)
    assert torch.equal(flattened(net), quarter) and net.training
    assert not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        next(net.parameters()).zero_()  # weights of its own
    assert torch.equal(between(run, 0, 0.25), quarter)


# --- the sampling network -------------------------------------------------------------------------


def test_frequencies_are_a_scale_mixture_of_normals() -> None:
    weights = sampling_weights(200, torch.Generator().manual_seed(1))
    assert weights["2.weight"].shape == (200, 128)
    t = sampled_frequencies(weights, 4099, torch.Generator().manual_seed(2))
    assert t.shape == (4099, 200)
    assert abs(t.mean().item()) < 0.01
    assert 0.9 < t.std().item() < 1.2
    strong = {name: 30 * value for name, value in weights.items()}
    t = sampled_frequencies(strong, 4096, torch.Generator().manual_seed(2)).double()
    # 16 in a row have one scale for each feature: their mean square tells it, between e^-2 and e^2.
    squares = (t.view(256, 16, 200) ** 2).mean(1)
    assert squares.quantile(0.1) < 0.3 and squares.quantile(0.9) > 3
    assert sampled_frequencies(weights, 1, torch.Generator()).shape == (1, 200)


def test_the_released_network_makes_four_frequencies() -> None:
    weights = sampling_weights(30, torch.Generator().manual_seed(1), released=True)
    assert {tuple(value.shape) for value in weights.values()} == {(30, 30), (30,)}
    t = released_frequencies(weights, torch.Generator().manual_seed(2))
    layers = []
    for k in range(3):
        linear = torch.nn.utils.skip_init(torch.nn.Linear, 30, 30)
        linear.load_state_dict({name: weights[f"{k}.{name}"] for name in ("weight", "bias")})
        activation = torch.nn.Tanh() if k == 2 else torch.nn.LeakyReLU(0.2)
        layers += [linear, torch.nn.BatchNorm1d(30), activation]
    noise = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(t, torch.nn.Sequential(*layers)(noise).detach())


def distance_now(run: Run) -> Tensor:
    """The loss for the same images, network and random numbers, without a step."""
    config = run.config
    kind, count = config.sampling_net, config.num_freqs
    sampling = characteristic.Sampling(run, kind, count, config.lr_sampling_net, 0.5)
    images = run.images.detach().clone()
    update = ncfm.update(
        run, run.fresh_net().requires_grad_(False), ncfm.real_batch(run),
        lambda group: characteristic.distances(group, sampling, 0.5, 0.5), "",
    )  # fmt: skip
    with torch.no_grad():
        run.images.copy_(images)
    return update.sum()


def test_the_sampling_network_learns_to_make_the_distance_large(make_dataset, make_run) -> None:
    """The released one never changed. Here the images stay where they are."""
    settings = SETTINGS | {"lr_img": 1e-12, "weight_decay": 0.0, "calib_weight": 0.0}
    run = make_run("ncfm", make_dataset([9, 4, 12]), **settings, sampling_net="learned")
    list(ncfm.prepare(run))
    start = run.state
    before = distance_now(run)
    for _ in range(30):
        ncfm.step(run)
        if run.iteration == 0:
            names = [name for name in start if name.startswith(characteristic.WEIGHTS)]
            assert len(names) == 6
            assert not any(torch.equal(start[name], run.state[name]) for name in names)
        run.iteration += 1
    run.iteration = 0
    assert distance_now(run) > 1.01 * before


@pytest.mark.parametrize("kind", ["none", "released"])
def test_without_learning_nothing_of_the_networks_changes(make_dataset, make_run, kind) -> None:
    run = make_run("ncfm", make_dataset([9, 4, 12]), **SETTINGS, sampling_net=kind)
    list(ncfm.prepare(run))
    start = run.state
    ncfm.step(run)
    assert run.state.keys() - start.keys() == {ncfm.PLATEAU}
    assert all(torch.equal(start[name], run.state[name]) for name in start)
    assert len([name for name in start if "sampling" in name]) == (6 if kind == "released" else 0)


# --- a whole run ----------------------------------------------------------------------------------


def small(**settings: Any) -> ncfm.Config:
    return ncfm.Config(**SETTINGS | {"model": "ConvNetD1W4", "lr_img": 0.02} | settings)


@pytest.mark.parametrize(
    ("settings", "update"),
    [
        ({"sampling_net": "learned"}, 0),
        ({"sampling_net": "learned", "step": "per_class"}, 13),
        ({}, 5),
        ({"parametrisation": "hallucinators"}, 4),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path, monkeypatch, settings, update
) -> None:
    """In the optimiser, the fall of the learning rate, and the sampling network, too."""
    monkeypatch.setattr(ncfm, "PATIENCE", 0)
    monkeypatch.setattr(ncfm, "THRESHOLD", 0.5)  # so that it falls in every iteration
    dataset = data.generated(classes=3, size=8, train_per_class=6, test_per_class=2)
    whole = distill("ncfm", dataset, small(**settings), tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        done, calls = Run.update, []

        def interrupted(run: Run, *arguments: Any) -> None:
            done(run, *arguments)
            calls.append(1)
            if len(calls) == update + 1:
                raise KeyboardInterrupt

        patch.setattr(Run, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill("ncfm", dataset, small(**settings), tmp_path / "part", progress=False)
    part = distill("ncfm", dataset, small(**settings), tmp_path / "part", progress=False)
    assert torch.equal(part.images, whole.images)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("part", "whole")]
    losses = [
        [line.split('"loss": ')[1].split(",")[0] for line in log.splitlines()] for log in logs
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_interrupted_while_preparing_resumes_to_the_same_bits(tmp_path, monkeypatch) -> None:
    dataset = data.generated(classes=3, size=8, train_per_class=6, test_per_class=2)
    whole = distill("ncfm", dataset, small(), tmp_path / "whole", progress=False)
    real, calls = Run.real, []

    def stopping(run: Run, indices: Tensor) -> Tensor:
        calls.append(1)
        run.stop = run.stop or len(calls) == 30  # in the second network
        return real(run, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "real", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill("ncfm", dataset, small(), tmp_path / "part", progress=False)
    assert len(calls) == 30
    found = distill("ncfm", dataset, small(), tmp_path / "part", progress=False)
    assert torch.equal(found.images, whole.images)


def test_a_short_run_lowers_the_loss_on_the_digits() -> None:
    dataset = data.load("digits")
    short = {"num_premodel": 2, "pretrain_epochs": 4, "iterations": 30, "lr_img": 0.02}
    config = ncfm.Config(ipc=1, model="ConvNetD2W8", batch_real=50, num_freqs=256, **short)
    run = methods.start(methods.resolve(config, dataset), dataset, 1 << 30)
    list(ncfm.prepare(run))
    losses = []
    for run.iteration in range(30):
        losses.append(ncfm.step(run).mean())
    assert torch.stack(losses[-5:]).mean() < 0.9 * torch.stack(losses[:5]).mean()


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("CIFAR10", 32, {"factor": 2, "pretrain_epochs": 60, "model": "ConvNet", "lr_img": 1e-3}),
        ("TinyImageNet", 64, {"model": "ConvNetD4", "pretrain_epochs": 60}),
        ("digits", 8, {"iterations": 300, "num_freqs": 1024, "lr_img": 0.01, "num_premodel": 10}),
        ("own", 128, {"model": "ConvNetD5", "pretrain_epochs": 80}),
        ("own", 12, {"factor": 1, "init": "mix", "parametrisation": "multi_formation"}),
    ],
)
def test_published_settings(make_dataset, name, size, expected) -> None:
    dataset = dataclasses.replace(make_dataset([2, 2], 3, (size, size)), name=name)
    config = methods.resolve(ncfm.Config(ipc=10), dataset)
    expected = {
        "iterations": 20000, "batch_real": 1024, "num_freqs": 4096, "num_premodel": 20,
        "weight_decay": 5e-4, "calib_weight": 1.0, "aug_type": "color_crop_cutout",
        "batch_train": 128, "lr_net": 0.01, **expected,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    plain = methods.resolve(ncfm.Config(ipc=1, parametrisation="pixels"), dataset)
    assert plain.init == "real" and plain.decoder(dataset.size) is None
