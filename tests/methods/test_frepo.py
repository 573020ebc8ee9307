"""FRePo against a loop written out by hand, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import methods, nets
from ddfast.artefact import Artefact
from ddfast.distill import distill
from ddfast.methods import Diverged, frepo, network_pool
from ddfast.random import generator

SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": "FRePoNetD2W4",
    "batch_real": 7,
    "iterations": 40,
    "lr_img": 0.05,
    "lr_y": 0.02,
    "pool_size": 3,
    "max_online_updates": 6,
    "lr_net": 0.01,
    "reg": 1e-3,
}


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([5, 6, 7])


def lamb(x: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> Tensor:
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["s"] = 0.999 * state.get("s", 0) + 0.001 * g * g
    u = state["m"] / (1 - 0.9**t) / ((state["s"] / (1 - 0.999**t)).sqrt() + 1e-6)
    return x - lr * x.norm() / u.norm() * u


def literal(run, iterations: int) -> tuple[Tensor, Tensor, list[float], list[int]]:
    """Algorithm 1 with whole networks and torch's Adam, every gradient from one graph."""
    config, data = run.config, run.dataset
    shape = (config.model, data.channels, data.num_classes, data.size)

    def fresh(*random: Any):
        net = nets.build(*shape).double()
        nets.initialise(net, generator(*random))
        return net, torch.optim.Adam(net.parameters(), config.lr_net)

    pool = [fresh(0, "pool network", slot) for slot in range(3)]
    counts = [0, 2, 4]
    x = run.images.detach().clone()
    y = (F.one_hot(run.labels, 3).double() - 1 / 3) / math.sqrt(3 / 10)
    if config.learn_labels:  # the artefact's labels are float32, and so is where they begin
        y = run.tensors["label_weights"].detach().clone()
    of_x, of_y, history, restarts = {}, {}, [], []
    for it in range(iterations):
        slot = int(torch.randint(3, (), generator=generator(0, "pool", it)))
        net, adam = pool[slot]
        order = torch.randperm(18, generator=generator(0, "real images", it // 3))
        rows = order.split(7)[it % 3]
        t = data.normalised(data.train_images[rows], torch.float64)
        y_t = F.one_hot(data.train_labels[rows], 3).double() - 1 / 3
        x.requires_grad_()
        y.requires_grad_()
        sorted_ = y.sort(1).values
        margins = torch.minimum(
            sorted_[:, -1] - sorted_[:, -2], torch.tensor(1 / 3, dtype=y.dtype)
        ).mean()
        s, y_s = x, y
        if config.use_flip:
            s, y_s = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
        net.eval()
        phi, phi_t = net.embed(s), net.embed(t).detach()
        k = phi @ phi.mT
        ridge = config.reg * k.trace() / len(k) * torch.eye(len(k), dtype=torch.float64)
        p = phi_t @ phi.mT @ torch.linalg.solve(k + ridge, y_s)
        loss = ((p - y_t) ** 2 / 2).sum(1).mean() - margins
        history.append(loss.item())
        gx, gy = torch.autograd.grad(loss, [x, y])
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * it / config.iterations)) / 2
        x = lamb(x.detach(), gx, of_x, share * config.lr_img)
        y = y.detach()
        if config.learn_labels:
            y = lamb(y, gy, of_y, share * config.lr_y)
        if counts[slot] > config.max_online_updates:
            pool[slot], counts[slot] = fresh(0, "pool network", it), 0
            restarts.append(it)
        else:
            net.train()
            adam.zero_grad()
            (((net(x) - y) ** 2).sum(1) / 2).mean().backward()
            adam.step()
            counts[slot] += 1
    return x, y, history, restarts


def go(run, iterations: int) -> list[float]:
    history = []
    for _ in range(iterations):
        history.append(frepo.step(run)[0].item())
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    "changes",
    [
        {"use_flip": True},
        {"use_flip": False, "learn_labels": False},
        {"use_flip": True, "model": "FRePoNetD2W4NN"},
    ],
)
def test_equals_the_literal_loop(dataset, make_run, changes) -> None:
    run = make_run("frepo", dataset, **SETTINGS | changes)
    if run.config.learn_labels:  # so near to a tie that the margin has a gradient, and no two alike
        labels = run.tensors["label_weights"]
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            labels.mul_(0.15).add_(0.01 * torch.randn(labels.shape, generator=random))
        assert frepo.margin(labels) < 1 / 3
    x, y, losses, restarts = literal(run, 28)
    found = go(run, 28)
    assert restarts  # networks did begin anew
    torch.testing.assert_close(run.images.detach(), x, rtol=1e-9, atol=1e-9)
    if run.config.learn_labels:
        torch.testing.assert_close(run.tensors["label_weights"].detach(), y, rtol=1e-9, atol=1e-9)
    assert found == pytest.approx(losses, rel=1e-9)
    start = make_run("frepo", dataset, **SETTINGS | changes)
    assert (run.images - start.images).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_a_network_begins_anew_after_101_updates(dataset, make_run) -> None:
    run = make_run("frepo", dataset, **SETTINGS | {"pool_size": 1, "max_online_updates": 100})
    seen = []
    for _ in range(104):
        go(run, 1)
        seen.append(run.state[network_pool.COUNTS][0].tolist())
    # The count reaches 101, which is more than 100, and the next visit begins anew.
    assert seen[99:104] == [[100, 100], [101, 101], [0, 0], [1, 1], [2, 2]]


def test_counts_are_staggered(dataset, make_run) -> None:
    run = make_run("frepo", dataset, **SETTINGS | {"pool_size": 10, "max_online_updates": 100})
    state, _ = network_pool.begin(run)
    assert state[network_pool.COUNTS].tolist() == [[10 * slot, 0] for slot in range(10)]
    vectors = [state[f"pool.{slot}.weights"] for slot in range(10)]
    assert len({float(v.sum()) for v in vectors}) == 10


def test_margin() -> None:
    labels = torch.tensor([[0.5, 0.4, 0.0], [0.9, 0.0, 0.1], [0.2, 0.2, 0.1]], requires_grad=True)
    found = frepo.margin(labels)
    assert found.item() == pytest.approx((0.1 + 1 / 3 + 0.0) / 3)
    (g,) = torch.autograd.grad(found, labels)
    assert g[0].tolist() == pytest.approx([1 / 3, -1 / 3, 0])
    assert g[1].tolist() == [0, 0, 0]  # beyond 1/C
    assert sorted(g[2].tolist()) == pytest.approx([-1 / 3, 0, 1 / 3])  # a tie is pulled apart


@pytest.mark.parametrize(("classes", "scale"), [(10, 1.0), (100, 1 / 10**0.5), (1000, 0.1)])
def test_labels_begin_scaled(make_dataset, classes, scale) -> None:
    dataset = make_dataset([1] * classes)
    config = methods.resolve(frepo.Config(ipc=1), dataset)
    tensors, labels = config.starting_set(dataset, torch.Generator().manual_seed(0))
    expected = (F.one_hot(labels, classes) - 1 / classes) * scale
    torch.testing.assert_close(tensors["label_weights"], expected)


def test_labels_that_are_not_learned_are_no_parameter(dataset, make_run, tmp_path) -> None:
    run = make_run("frepo", dataset, **SETTINGS | {"learn_labels": False})
    assert set(run.tensors) == {"images"}
    config = frepo.Config(**SETTINGS | {"learn_labels": False, "iterations": 1})
    assert distill("frepo", dataset, config, tmp_path, progress=False).soft_labels is None


@pytest.mark.parametrize(
    ("name", "ipc", "flips"),
    [
        ("CIFAR10", 50, True),
        ("MNIST", 1, False),
        ("digits", 1, False),
        ("CIFAR100", 1, True),
        ("CIFAR100", 10, False),
        ("TinyImageNet", 1, True),
        ("TinyImageNet", 10, False),
        ("ImageNet1K", 1, False),
    ],
)
def test_published_settings(make_dataset, name, ipc, flips) -> None:
    size = 64 if name in ("TinyImageNet", "ImageNet1K") else 32
    data = dataclasses.replace(make_dataset([60, 60], size=(size, size)), name=name)
    config = methods.resolve(frepo.Config(ipc=ipc), data)
    assert config.use_flip == flips
    if name == "digits":
        return
    assert config.model == ("FRePoNetD4" if size == 64 else "FRePoNet")
    assert (config.iterations, config.lr_img, config.lr_y) == (500_000, 3e-4, 3e-4)
    assert (config.batch_real, config.reg, config.learn_labels) == (1024, 1e-6, True)
    assert (config.pool_size, config.max_online_updates, config.lr_net) == (10, 100, 3e-4)
    assert (config.solve_dtype, config.init) == ("float32", "real")


def test_interrupted_and_resumed_is_the_same_bits(tmp_path, dataset, same_when_resumed) -> None:
    config = frepo.Config(**SETTINGS | {"iterations": 7})
    artefact = same_when_resumed("frepo", dataset, config, 4)
    kept = Artefact.load(tmp_path / "cut" / "distilled.safetensors")
    assert torch.equal(kept.soft_labels, artefact.soft_labels)


def test_what_is_not_finite_is_named(dataset, make_run) -> None:
    run = make_run("frepo", dataset, **SETTINGS)
    with torch.no_grad():
        run.images[3] = float("nan")
    with pytest.raises(Diverged, match=r"the loss of class .* is not finite at iteration 0"):
        frepo.step(run)
    run = make_run("frepo", dataset, **SETTINGS | {"lr_net": 1e300, "pool_size": 1})
    with pytest.raises(Diverged, match="not finite at iteration 1 with network 0 of the pool"):
        go(run, 3)
    run = make_run("frepo", dataset, **SETTINGS)
    state, slot = network_pool.begin(run)
    with pytest.raises(Diverged, match=rf"weights of network {slot} .* lr_net \(now 0\.01\)"):
        network_pool.update(run, state, slot, lambda net: net(run.images).sum() * float("nan"))


def test_memory_and_classes_are_checked(make_dataset, make_run) -> None:
    with pytest.raises(ValueError, match="networks of the pool learn 6 images at once"):
        make_run("frepo", make_dataset([5, 6, 7]), memory=30_000, **SETTINGS)
    with pytest.raises(ValueError, match="one class, and a margin needs two"):
        make_run("frepo", make_dataset([5]), **SETTINGS)


def test_chunks_change_nothing_beyond_rounding(dataset, make_run) -> None:
    whole, cut = make_run("frepo", dataset, **SETTINGS), make_run("frepo", dataset, **SETTINGS)
    cut.memory = 60_000
    losses = go(whole, 5)
    assert go(cut, 5) == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(cut.images, whole.images, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parametrisation", ["multi_formation", "bases"])
def test_other_parametrisations(dataset, make_run, parametrisation) -> None:
    settings = SETTINGS | {"parametrisation": parametrisation, "shared": 3, "batch_real": 18}
    run = make_run("frepo", dataset, **settings)
    before = {name: t.detach().clone() for name, t in run.tensors.items()}
    losses = go(run, 12)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(not torch.equal(before[name], t) for name, t in run.tensors.items())
