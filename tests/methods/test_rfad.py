"""RFAD against a loop written out by hand, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import methods, nets
from ddfast.distill import distill
from ddfast.methods import Diverged, rfad
from ddfast.random import generator

SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": "ConvNetD2W4NN",
    "batch_real": 11,
    "iterations": 100,
    "lr_img": 0.02,
    "n_models": 3,
}


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([5, 6, 7])


def belief(x: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> Tensor:
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = m = 0.9 * state.get("m", 0) + 0.1 * g
    state["s"] = 0.999 * state.get("s", 0) + 0.001 * (g - m) ** 2 + 1e-16
    root = (state["s"] / (1 - 0.999**t)).sqrt() + 1e-16
    return x - lr * m / (1 - 0.9**t) / root


def loss_of(run, x: Tensor, y: Tensor, k: Tensor | None, rows: Tensor, networks) -> Tensor:
    """One graph of all networks side by side."""
    data = run.dataset
    t = data.normalised(data.train_images[rows], torch.float64)
    phi = torch.cat([net.embed(x) for net in networks], 1)
    phi_t = torch.cat([net.embed(t) for net in networks], 1).detach()
    kernel, to = (2 * p @ phi.mT / phi.shape[1] + 0.01 for p in (phi, phi_t))
    ridge = run.config.reg * kernel.trace() / len(x) * torch.eye(len(x), dtype=torch.float64)
    p = to @ torch.linalg.solve(kernel + ridge, y)
    labels = data.train_labels[rows]
    if k is not None:
        return F.cross_entropy(k.exp() * p, labels)
    return ((p - (F.one_hot(labels, 3).double() - 1 / 3)) ** 2).mean() / 2


def networks_of(run, count: int, *random: Any) -> list[nets.Network]:
    found = []
    data = run.dataset
    for number in range(count):
        net = nets.build(run.config.model, data.channels, data.num_classes, data.size).double()
        draw = generator(0, *random, number)
        with torch.no_grad():
            nets.initialise(net, draw)
            for layer in net.modules():
                if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                    fan_in = layer.weight[0].numel()
                    weight = torch.empty(layer.weight.shape, dtype=torch.float64)
                    layer.weight.copy_(weight.normal_(0, math.sqrt(2 / fan_in), generator=draw))
                    bias = torch.empty(layer.bias.shape, dtype=torch.float64)
                    layer.bias.copy_(bias.normal_(0, 0.1, generator=draw))
        found.append(net)
    return found


def literal(run, iterations: int) -> tuple[dict[str, Tensor], list[float]]:
    config = run.config
    x = {name: t.detach().clone().requires_grad_() for name, t in run.tensors.items()}
    rates = {"images": config.lr_img, "label_weights": config.lr_img}
    rates |= {"transform": config.lr_transform, "platt": config.lr_platt}
    states: dict[str, dict[str, Any]] = {name: {} for name in x}
    history = []
    for it in range(iterations):
        random = generator(0, "real images", it)
        rows = torch.randperm(18, generator=random)[: config.batch_real]
        images = x["images"]
        if "transform" in x:
            images = (images.flatten(1) @ x["transform"]).view_as(images)
        y = x.get("label_weights", F.one_hot(run.labels, 3).double() - 1 / 3)
        networks = networks_of(run, config.n_models, "random network", it)
        loss = loss_of(run, images, y, x.get("platt"), rows, networks)
        history.append(loss.item())
        found = torch.autograd.grad(loss, list(x.values()))
        x = {
            name: belief(t.detach(), g, states[name], rates[name]).requires_grad_()
            for (name, t), g in zip(x.items(), found, strict=True)
        }
    return x, history


def go(run, iterations: int) -> list[float]:
    history = []
    for _ in range(iterations):
        history.append(rfad.step(run)[0].item())
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "mse", "transform": False},
        {"learn_labels": True, "lr_transform": 1e-3, "batch_real": 5120},
    ],
)
def test_equals_the_literal_loop(dataset, make_run, changes) -> None:
    run = make_run("rfad", dataset, **SETTINGS | changes)
    expected, losses = literal(run, 6)
    assert go(run, 6) == pytest.approx(losses, rel=1e-9)
    assert set(run.tensors) == set(expected)
    start = make_run("rfad", dataset, **SETTINGS | changes)
    for name, tensor in run.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-8, atol=1e-9, msg=name)
        assert not torch.equal(tensor, start.tensors[name])


def test_networks_are_fresh_in_every_iteration_and_the_measuring_ones_are_not(
    dataset, make_run
) -> None:
    run = make_run("rfad", dataset, **SETTINGS)
    vectors = [
        torch.nn.utils.parameters_to_vector(rfad.random_networks(run.net, 0, *step)(n).parameters())
        for step, n in (((0,), 0), ((0,), 1), ((1,), 0), ((0,), 0))
    ]
    assert torch.equal(vectors[0], vectors[3])
    assert not torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


def test_what_is_kept_is_the_best_of_what_was_measured(dataset, make_run, monkeypatch) -> None:
    monkeypatch.setattr(rfad, "EVERY", 2)
    run = make_run("rfad", dataset, **SETTINGS | {"iterations": 9, "lr_img": 0.3, "zca": "none"})
    rows = torch.cat([torch.where(dataset.train_labels == c)[0] for c in range(3)])
    judges = networks_of(run, 16, "measuring network")
    best, record = None, (math.inf, 0)
    for done in range(10):
        if done % 2 == 0 or done == 9:
            t = run.tensors
            x = rfad.transformed(run.images, t["transform"])
            y = F.one_hot(run.labels, 3).double() - 1 / 3
            with torch.no_grad():
                loss = loss_of(run, x, y, t["platt"], rows, judges).item()
            if loss < record[0]:
                best, record = x.detach().clone(), (loss, done)
        if done < 9:
            go(run, 1)
    assert 0 < record[1] < 9  # neither the first nor the last
    found = run.state["best"].tolist()
    assert found == pytest.approx(record, rel=1e-9)
    kept = run.config.distilled(run.tensors, run.state)
    torch.testing.assert_close(kept["images"], best.float(), rtol=1e-6, atol=1e-6)
    assert "soft_labels" not in kept and "decoder_tensors" in kept and not kept["decoder_tensors"]


def test_patience_ends_the_run(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rfad, "EVERY", 2)
    monkeypatch.setattr(rfad, "JUDGES", 1)
    settings = SETTINGS | {"patience": 3, "lr_img": 20.0, "iterations": 300, "lr_platt": 1e-9}
    config = rfad.Config(**settings)
    artefact = distill("rfad", dataset, config, tmp_path, progress=False, device="cpu")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) < 300
    # A finished run is read, not begun anew.
    again = distill("rfad", dataset, config, tmp_path, progress=False, device="cpu")
    assert torch.equal(again.images, artefact.images)


@pytest.mark.parametrize("cut", [3, 5])
def test_interrupted_and_resumed_is_the_same_bits(
    dataset, monkeypatch, cut, same_when_resumed
) -> None:
    monkeypatch.setattr(rfad, "EVERY", 2)
    config = rfad.Config(**SETTINGS | {"iterations": 7, "learn_labels": True})
    assert same_when_resumed("rfad", dataset, config, cut).soft_labels is not None


def test_the_scale_is_float64(make_dataset) -> None:
    dataset = make_dataset([5, 6, 7])
    config = methods.resolve(rfad.Config(**SETTINGS), dataset)
    run = methods.start(config, dataset, 1 << 30)
    assert {name: t.dtype for name, t in run.tensors.items()} == {
        "images": torch.float32,
        "transform": torch.float32,
        "platt": torch.float64,
    }
    rfad.step(run)
    assert run.tensors["platt"].dtype == torch.float64 and run.tensors["platt"] != 0


@pytest.mark.parametrize(
    ("size", "model"), [(32, "ConvNetW256NN"), (28, "ConvNetW256NN"), (64, "ConvNetD4W256NN")]
)
def test_published_settings(make_dataset, size, model) -> None:
    dataset = dataclasses.replace(make_dataset([3, 3], size=(size, size)), name="CIFAR10")
    config = methods.resolve(rfad.Config(ipc=1), dataset)
    assert config.model == model
    assert (config.iterations, config.batch_real, config.n_models) == (100_000, 5120, 8)
    assert (config.lr_img, config.lr_transform, config.lr_platt) == (1e-3, 5e-5, 1e-2)
    assert (config.reg, config.patience, config.loss) == (5e-3, 1000, "platt")
    assert (config.transform, config.learn_labels, config.init) == (True, False, "real")


def test_what_is_not_finite_is_named(dataset, make_run) -> None:
    run = make_run("rfad", dataset, **SETTINGS)
    run.iteration = 1
    with torch.no_grad():
        run.images[3] = float("nan")
    with pytest.raises(Diverged, match=r"the loss of class .* is not finite at iteration 1"):
        rfad.step(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ConvNetD2W4BN"}, "batch normalisation"),
        ({"parametrisation": "multi_formation", "transform": True}, "transform: got true"),
        ({"memory": 3000}, "memory"),
    ],
)
def test_what_cannot_work_is_refused(dataset, make_run, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_run("rfad", dataset, **SETTINGS | changes)


def test_chunks_change_nothing_beyond_rounding(dataset, make_run) -> None:
    whole, cut = make_run("rfad", dataset, **SETTINGS), make_run("rfad", dataset, **SETTINGS)
    cut.memory = 40_000
    assert go(cut, 4) == pytest.approx(go(whole, 4), rel=1e-9)
    torch.testing.assert_close(cut.images, whole.images, rtol=1e-8, atol=1e-9)


def test_other_parametrisations(dataset, make_run) -> None:
    settings = SETTINGS | {"parametrisation": "multi_formation", "batch_real": 18}
    run = make_run("rfad", dataset, **settings)
    assert not run.config.transform
    before = run.images.detach().clone()
    assert all(math.isfinite(loss) for loss in go(run, 8))
    assert not torch.equal(before, run.images)
    kept = run.config.distilled(run.tensors, run.state)["images"]
    assert kept.shape == before.shape
