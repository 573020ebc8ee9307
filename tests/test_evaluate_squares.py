"""The protocols of FRePo, RFAD and KIP: their presets, and trainings against literal loops."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import nets
from ddfast.data import Dataset, normalise
from ddfast.evaluate import (
    Protocol,
    accuracy,
    largest_rate,
    protocol,
    squares,
    steps_matched,
    train_networks,
)
from ddfast.evaluate.side_by_side import SideBySide
from ddfast.random import generator

SEED = 3


def named(name: str, classes: int = 10, size: int = 8) -> Dataset:
    images = torch.zeros(classes, 1, size, size, dtype=torch.uint8)
    labels = torch.arange(classes)
    names = tuple(map(str, range(classes)))
    return Dataset(name, images, labels, images, labels, names, (0.5,), (0.5,))


@pytest.fixture
def dataset() -> Dataset:
    random = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (12, 2, 8, 8), generator=random, dtype=torch.uint8)
    labels = torch.arange(12) % 3
    return Dataset("small", images, labels, images, labels, ("a", "b", "c"), (0.4, 0.5), (0.2, 0.3))


@pytest.mark.parametrize(
    ("ipc", "steps", "batch"),
    [(1, 1000, 10), (10, 2000, 100), (20, 20_000, 200), (50, 5000, 500), (100, 10_000, 500)],
)
def test_preset_of_frepo(ipc, steps, batch) -> None:
    chosen = protocol("frepo", named("CIFAR10"), ipc=ipc)
    assert (chosen.steps(10 * ipc), chosen.batch) == (steps, batch)
    assert (chosen.optimiser, chosen.lr, chosen.weight_decay) == ("adamw", 3e-4, 0)
    assert (chosen.schedule, chosen.loss, chosen.label_scale) == ("warmed_cosine", "squares", 1)
    assert (chosen.augmentation, "flip" in chosen.strategy) == ("dsa", True)
    assert "flip" not in protocol("frepo", named("digits"), ipc=ipc).strategy
    assert protocol("frepo", named("CIFAR10"), dsa_strategy="none").augmentation == "none"
    assert not chosen.from_start


@pytest.mark.parametrize(
    ("name", "ipc", "lr", "scale", "decay"),
    [
        ("MNIST", 1, 1e-3, 8, 1e-3),
        ("FashionMNIST", 10, 1e-2, 8, 1e-3),
        ("SVHN", 1, 1e-3, 16, 0),
        ("CIFAR10", 1, 1e-3, 8, 0),
        ("CIFAR10", 10, 1e-3, 2, 0),
        ("CIFAR10", 50, 1e-2, 2, 0),
        ("something of 10", 50, 1e-2, 2, 0),
    ],
)
def test_preset_of_rfad(name, ipc, lr, scale, decay) -> None:
    chosen = protocol("rfad", named(name), ipc=ipc)
    assert (chosen.lr, chosen.label_scale, chosen.weight_decay) == (lr, scale, decay)
    assert (chosen.momentum, chosen.schedule, chosen.from_start) == (0.9, "constant", True)
    assert (chosen.augmentation, chosen.weights, chosen.loss) == ("none", "wide", "squares")
    assert chosen.steps(10 * ipc) == 1000 and chosen.batch == min(10 * ipc, 513)


def test_preset_of_kip() -> None:
    for ipc in (1, 10, 50):
        chosen = protocol("kip", named("CIFAR10"), ipc=ipc)
        assert chosen.steps(10 * ipc) == 5000 and chosen.batch == min(10 * ipc, 100)
    assert (chosen.lr, chosen.of_largest, chosen.momentum) == (1, True, 0.9)
    assert (chosen.weight_decay, chosen.schedule, chosen.loss) == (1e-3, "cosine", "mean_squares")
    assert (chosen.augmentation, chosen.weights, chosen.from_start) == ("none", "wide", False)
    assert protocol("kip", named("CIFAR10"), lr=0.5).lr == 0.5
    assert [chosen.share(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert chosen.decay(0) == 1


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="dsa_strategy has no meaning for protocol 'rfad'"):
        protocol("rfad", named("CIFAR10"), dsa_strategy="crop")
    with pytest.raises(ValueError, match="dsa_strategy has no meaning for protocol 'kip'"):
        protocol("kip", named("CIFAR10"), dsa_strategy="crop")
    with pytest.raises(ValueError, match=r"loss must be one of .*, mean_squares, got 'mse'"):
        Protocol("dc", 1, loss="mse")


def test_warmed_cosine() -> None:
    assert squares.warmed_cosine(0, 1000) == 0 and squares.warmed_cosine(250, 1000) == 0.5
    assert squares.warmed_cosine(500, 1000) == 1
    assert squares.warmed_cosine(750, 1000) == pytest.approx(0.01 + 0.99 / 2)
    assert squares.warmed_cosine(1000, 1000) == pytest.approx(0.01)
    assert squares.warmed_cosine(499, 300) == 499 / 500
    assert squares.warmed_cosine(600, 300) == pytest.approx(0.01)


def test_full_data_have_as_many_steps() -> None:
    chosen = protocol("frepo", named("CIFAR10"), ipc=10)
    assert steps_matched(chosen, 100, 10_000).steps(10_000) == 3000  # 30 passes at least


def literal_kernel(net: nn.Module, images: Tensor) -> Tensor:
    """(n, n): the tangent kernel of the outputs' sum over sqrt(C), from the whole Jacobian."""

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(net, parameters, (images,))
        return logits.sum(1) / math.sqrt(logits.shape[1])

    parameters = {name: value.detach() for name, value in net.named_parameters()}
    jacobian = torch.func.jacrev(outputs)(parameters)
    rows = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    return rows @ rows.mT


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_tangent_kernels_in_blocks(dataset, at_once, monkeypatch) -> None:
    group = [nets.build("ConvNetD2W4", 2, 3, 8, generator(0, "net", i)) for i in range(2)]
    group = [net.double() for net in group]
    weights = SideBySide(group, stacked=True)
    monkeypatch.setattr(largest_rate, "BLOCK_BYTES", at_once * weights.flat.numel() * 8)
    images = dataset.normalised(dataset.train_images, torch.float64)
    found = largest_rate.tangent_kernels(weights, images)
    for net, kernel in zip(group, found, strict=True):
        torch.testing.assert_close(kernel, literal_kernel(net, images), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_step_at_the_largest_rate_turns_the_largest_error_round(dataset, share) -> None:
    """An error along the kernel's largest eigenvector is multiplied by 1 - 2 * share of the rate.

    One class, for which the mean over classes leaves nothing out.
    """
    zero = torch.zeros(12, dtype=torch.int64)
    one = dataclasses.replace(dataset, train_labels=zero, test_labels=zero, class_names=("a",))
    net = nets.build("ConvNetD2W4NN", 2, 1, 8).double()
    weights = SideBySide([net], stacked=False)
    x = dataset.normalised(dataset.train_images, torch.float64)[None]
    direction = torch.linalg.eigh(largest_rate.tangent_kernels(weights, x[0]))[1][0, :, -1]
    error = 1e-6 * direction
    wanted = weights.logits(x).detach()[0, :, 0] - error
    rate = share * largest_rate.largest_rates(weights, one, SEED)
    loss = (weights.logits(x)[:, :, 0] - wanted).square().mean(1) / 2
    with torch.enable_grad():
        gradient = weights.gradient(loss)
    with torch.no_grad():
        weights.flat.sub_(rate * gradient)
    after = weights.logits(x).detach()[0, :, 0] - wanted
    torch.testing.assert_close(after, (1 - 2 * share) * error, rtol=1e-3, atol=1e-10)


def literal(
    images: Tensor, labels: Tensor, dataset: Dataset, chosen: Protocol, number: int
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A training written out by hand, in float64: the network, and as it was at first."""
    net = nets.build("ConvNetD2W4NN", 2, 3, 8)
    random = generator(SEED, "evaluate: weights", 0, number)
    (nets.initialise if chosen.name == "frepo" else nets.initialise_wide)(net, random)
    net = net.double()
    begun = copy.deepcopy(net)
    if labels.dtype == torch.int64:
        y = F.one_hot(labels, 3).double() - 1 / 3
        y = y / math.sqrt(3 / 10) if chosen.name == "frepo" else y
    else:
        y = labels.double()
    order = generator(SEED, "evaluate: order", 0, number)
    rate = chosen.lr
    if chosen.from_start:
        optimiser: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), chosen.lr, 0.9)
    elif chosen.of_largest:
        kernel = literal_kernel(net, images)
        rate *= 2 * len(images) * 3 / float(torch.linalg.eigvalsh(kernel)[-1])
        optimiser = torch.optim.SGD(net.parameters(), rate, 0.9, weight_decay=chosen.weight_decay)
    else:
        optimiser = torch.optim.Adam(net.parameters(), chosen.lr)
    step, steps = 0, chosen.steps(len(images))
    for _ in range(chosen.epochs):
        for rows in torch.randperm(len(images), generator=order).split(chosen.batch):
            out = net(images[rows])
            if chosen.from_start:
                out = out - begun(images[rows]).detach()
                loss = ((out - chosen.label_scale * y[rows]) ** 2).mean() / chosen.label_scale**2
                for p, q in zip(net.parameters(), begun.parameters(), strict=True):
                    loss = loss + chosen.weight_decay * ((p - q.detach()) ** 2).sum()
            elif chosen.of_largest:
                loss = ((out - y[rows]) ** 2).mean() / 2
            else:
                loss = ((out - y[rows]) ** 2).sum(1).mean() / 2
            optimiser.param_groups[0]["lr"] = rate * chosen.share(step, steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
    return net, begun


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("name", ["frepo", "rfad", "kip"])
def test_training_is_the_literal_loop(dataset, name, at_once, soft, monkeypatch) -> None:
    monkeypatch.setattr(squares, "WARM_UP", 3)
    chosen = Protocol(
        name,
        4,
        batch=5,
        lr=0.02,
        weight_decay=0.0 if name == "frepo" else 1e-2,
        schedule={"frepo": "warmed_cosine", "rfad": "constant", "kip": "cosine"}[name],
        optimiser="adamw" if name == "frepo" else "sgd",
        loss="mean_squares" if name == "kip" else "squares",
        of_largest=name == "kip",
        label_scale=4.0 if name == "rfad" else 1.0,
        from_start=name == "rfad",
        weights="default" if name == "frepo" else "wide",
    )
    labels = dataset.train_labels
    if soft:
        random = torch.Generator().manual_seed(1)
        labels = torch.randn(12, 3, generator=random)
    pair = [(dataset.train_images, labels)]
    # Weights are drawn in float32, as the literal loop draws them, and then made float64.
    trained = train_networks(
        pair, "ConvNetD2W4NN", dataset, chosen, 2, SEED, dtype=torch.float64, at_once=at_once
    )[0]
    x = normalise(dataset.train_images, dataset.mean, dataset.std, torch.float64)
    for number, found in enumerate(trained):
        net, begun = literal(x, labels, dataset, chosen, number)
        expected = net(x) - begun(x) if name == "rfad" else net(x)
        torch.testing.assert_close(found(x), expected, rtol=1e-9, atol=1e-10)
        assert 0 <= accuracy(found, dataset) <= 1
        torch.testing.assert_close(found.embed(x), net.embed(x), rtol=1e-9, atol=1e-10)
