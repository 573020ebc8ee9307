"""CAFE against the released algorithm, written out by hand in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import methods, nets
from ddfast.data import load, normalise
from ddfast.methods import Run, cafe, dc
from ddfast.random import generator
from ddfast.synthetic import decode

SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "batch_train": 4,
    "lr_img": 0.05,
    "lr_net": 0.05,
    "outer_most": 3,
    "inner_most": 3,
}
WEIGHTS = {1: [1.0], 2: [0.1, 1.0], 3: [0.1, 0.1, 1.0]}


def layers(net: nets.Network, x: Tensor) -> list[Tensor]:
    """f_1, ..., f_D before pooling, and the last map after it."""
    found = []
    for layer in net.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            found.append(x)
    return [*found, x]


def loss_of(net, real: list[Tensor], syn: list[Tensor]) -> Tensor:
    """Of each class, from its augmented images."""
    ours, theirs = [layers(net, s) for s in syn], [layers(net, x) for x in real]
    centres = torch.stack([maps[-1].flatten(1).mean(0) for maps in ours])
    losses = []
    for c, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        value = torch.zeros((), dtype=torch.float64)
        for weight, f, g in zip([*WEIGHTS[len(a) - 1], 1.0], a, b, strict=True):
            value = value + weight * ((f.mean(0) - g.mean(0)) ** 2).sum()
        features = b[-1].flatten(1)
        value = value + ((features.mean(0) - centres[c]) ** 2).sum()
        labels = torch.full((len(features),), c)
        losses.append(value + 0.01 * F.cross_entropy(features @ centres.T, labels, reduction="sum"))
    return torch.stack(losses)


def real_of(dataset, chosen: Tensor) -> Tensor:
    return normalise(dataset.train_images[chosen], dataset.mean, dataset.std, torch.float64)


def batches(dataset, run, *moment: int) -> tuple[list[Tensor], Tensor, Callable]:
    """Real images of every class, what tells augmentations, and the augmentation."""
    seed = run.config.seed
    indices, counts = run.sampler.sample_all(
        run.config.batch_real, generator(seed, "real images", *moment)
    )
    draw = run.augment.draw(
        generator(seed, "augmentation", *moment),
        dataset.size,
        count=dataset.num_classes,
        independent=True,
    )

    def augment(x: Tensor, c: int) -> Tensor:
        return run.augment(x, draw[:, c : c + 1]) if run.config.dsa_strategy != "none" else x

    real = [augment(real_of(dataset, each), c) for c, each in enumerate(indices.split(counts))]
    return real, draw, augment


def accuracy_of(dataset, run, net, *moment: int) -> float:
    indices, counts = run.sampler.sample_all(128, generator(run.config.seed, "accuracy", *moment))
    of_class = []
    for c, chosen in enumerate(indices.split(counts)):
        with torch.no_grad():
            found = net(real_of(dataset, chosen)).argmax(1)
        of_class.append((found == c).double().mean().item())
    return sum(of_class) / len(of_class)


class Watcher:
    """The released window, with its accumulator if it is not set back."""

    def __init__(self, classes: int, released: bool) -> None:
        self.classes, self.released = classes, released
        self.window: list[float] = []
        self.sum = 0.0

    def settled(self, accuracy: float) -> float | None:
        """What the ten last values differ by, once there are as many; the oldest is dropped."""
        self.sum = (self.sum + accuracy * self.classes) / self.classes
        self.window.append(self.sum)
        if not self.released:
            self.sum = 0.0
        if len(self.window) < 10:
            return None
        spread = max(self.window) - min(self.window)
        self.window.pop(0)
        return spread


def literal(dataset, run, iterations: int) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """Images, losses of each iteration, and epochs of training after each image update."""
    config, classes = run.config, dataset.num_classes
    released = config.accumulate == "released"
    images = run.images.detach().clone().requires_grad_()
    labels = torch.arange(classes).repeat_interleave(config.ipc)
    velocity, history, trained = None, [], []
    for it in range(iterations):
        net = nets.build(config.model, dataset.channels, classes, dataset.size).double()
        nets.initialise(net, generator(config.seed, "network", it))
        net.train()
        learn = torch.optim.SGD(net.parameters(), config.lr_net)
        outer_watch, totals, epochs = Watcher(classes, released), [], []
        while True:
            outer = len(totals)
            real, _, augment = batches(dataset, run, it, outer)
            syn = [augment(s, c) for c, s in enumerate(images.split(config.ipc))]
            losses = loss_of(net, real, syn)
            (gradient,) = torch.autograd.grad(losses.sum(), images)
            velocity = gradient if velocity is None else config.momentum * velocity + gradient
            with torch.no_grad():
                images -= config.lr_img * velocity
            totals.append(losses.detach())
            spread = outer_watch.settled(accuracy_of(dataset, run, net, it, outer))
            if spread is not None and spread < config.lambda_1:
                break
            if len(totals) == config.outer_most:
                break
            random = generator(config.seed, "network training", it, outer)
            inner_watch, count = Watcher(classes, released), 0
            while True:
                order = torch.randperm(len(images), generator=random)
                for batch in order.split(config.batch_train):
                    x = images.detach()[batch]
                    if config.dsa_strategy != "none":
                        x = run.augment(x, run.augment.draw(random, dataset.size, len(batch)))
                    learn.zero_grad()
                    F.cross_entropy(net(x), labels[batch]).backward()
                    learn.step()
                count += 1
                accuracy = accuracy_of(dataset, run, net, it, outer, count - 1)
                spread = inner_watch.settled(accuracy)
                if spread is not None and spread > config.lambda_2:
                    break
                if count == config.inner_most:
                    break
            epochs.append(count)
        history.append(torch.stack(totals).mean(0))
        trained.append(epochs)
    return images.detach(), history, trained


@pytest.fixture
def epochs(monkeypatch) -> list[list[int]]:
    """Of every iteration, how many epochs followed each image update."""
    counted: list[list[int]] = []
    train, epoch, fresh = cafe.train, dc.epoch, Run.fresh_net

    def iteration(run):
        counted.append([])
        return fresh(run)

    def counting(*arguments):
        counted[-1].append(0)
        train(*arguments)

    def once(*arguments):
        counted[-1][-1] += 1
        epoch(*arguments)

    monkeypatch.setattr(Run, "fresh_net", iteration)
    monkeypatch.setattr(cafe, "train", counting)
    monkeypatch.setattr(dc, "epoch", once)
    return counted


def go(run: Run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(cafe.step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    ("counts", "shape", "settings"),
    [
        ([7, 3, 9], (2, (8, 8)), {}),
        ([7, 3, 9], (2, (8, 8)), {"dsa_strategy": "color_crop_cutout_flip_scale_rotate"}),
        ([7, 9], (3, (9, 8)), {"model": "ConvNetD3W4", "init": "real", "ipc": 1}),
        ([4] * 12, (1, (8, 8)), {"model": "ConvNetD1W4", "ipc": 1}),
        ([5], (2, (8, 8)), {}),  # nothing to tell apart
        ([3, 4], (1, (28, 28)), {"model": "ConvNetD3W4", "ipc": 1}),
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, epochs, counts, shape, settings):
    dataset = make_dataset(counts, *shape)
    run = make_run("cafe", dataset, **SETTINGS | settings)
    start = run.images.detach().clone()
    expected, losses, trained = literal(dataset, run, 3)
    found = go(run, 3)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-10, atol=1e-11)
    assert epochs == trained == [[3, 3]] * 3
    assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # every image moved


@pytest.mark.parametrize("accumulate", ["reset", "released"])
def test_both_loops_end_as_in_the_literal_one(make_dataset, make_run, epochs, accumulate):
    dataset = make_dataset([7, 6, 9])
    settings = {"outer_most": 12, "inner_most": 12, "lambda_1": 0.3, "lambda_2": 0.06}
    settings |= {"accumulate": accumulate, "lr_net": 0.02, "ipc": 1, "model": "ConvNetD1W4"}
    run = make_run("cafe", dataset, **SETTINGS | settings)
    expected, _, trained = literal(dataset, run, 1)
    go(run, 1)
    assert epochs == trained
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-9, atol=1e-10)
    # Without the reset the values jump from the first to the second: training ends at once.
    assert set(trained[0]) == ({10, 12} if accumulate == "reset" else {10})


def scripted(monkeypatch, values: Callable[[int], float]) -> None:
    """Let the accuracies of either loop follow a rule, by their number in it."""

    def accuracy(run, net, *moment):
        return values(moment[-1])

    monkeypatch.setattr(cafe, "accuracy", accuracy)


@pytest.mark.parametrize(
    ("accumulate", "values", "updates", "inner"),
    [
        ("reset", lambda n: 1.0, 10, 15),  # settled at once; the network never moves
        ("reset", lambda n: 0.9 * (n % 2), 25, 10),  # and never settled
        ("reset", lambda n: 0.0 if n < 3 else 0.5, 13, 10),  # settled after the third is gone
        ("reset", lambda n: 0.5 if n < 11 else 0.6, 10, 12),  # moves with the twelfth epoch
        # 3 classes: 0.5, 0.667, 0.722, 0.741, ...; the rest lies within 0.04 without the first two
        ("released", lambda n: 0.5, 12, 10),
    ],
)
def test_windows_and_bounds(
    make_dataset, make_run, monkeypatch, epochs, accumulate, values, updates, inner
):
    scripted(monkeypatch, values)
    settings = {"outer_most": 25, "inner_most": 15, "ipc": 1, "accumulate": accumulate}
    run = make_run("cafe", make_dataset([4, 4, 4]), **SETTINGS | settings)
    go(run, 2)
    assert epochs == [[inner] * (updates - 1)] * 2


def test_accuracy_is_that_of_classes(make_dataset, make_run) -> None:
    """On 128 images of each class, drawn anew; a class with fewer counts as much as the others."""
    dataset = make_dataset([300, 200, 9])
    run = make_run("cafe", dataset, **SETTINGS)
    net = run.fresh_net()
    found = [cafe.accuracy(run, net, 4, inner) for inner in range(4)]
    expected = [accuracy_of(dataset, run, net, 0, 4, inner) for inner in range(4)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(found)) > 1
    before = run.processed
    cafe.accuracy(run, net)
    assert run.processed - before == 128 + 128 + 9


@pytest.mark.parametrize("images_at_once", [2, 3, 5, 9])
def test_chunks_change_nothing_beyond_rounding(
    make_dataset, make_run, monkeypatch, images_at_once
) -> None:
    dataset = make_dataset([9, 13, 9, 2])
    settings = SETTINGS | {"ipc": 3, "dsa_strategy": "color_crop", "batch_real": 12}
    whole = make_run("cafe", dataset, **settings)
    go(whole, 2)
    run = make_run("cafe", dataset, **settings)
    run.memory = int(images_at_once * 9e3)
    sizes: list[int] = []
    groups: set[tuple[int, int]] = set()
    features, passed = cafe.features, cafe._passed

    def seen(net, images, counts=None, **options):
        if options.get("layers") and images.any():  # not the one that measures the maps
            sizes.append(len(images))
        return features(net, images, counts, **options)

    def group(run, net, real, first, end, layers=True):
        groups.add((first, end))
        return passed(run, net, real, first, end, layers)

    monkeypatch.setattr(cafe, "features", seen)
    monkeypatch.setattr(cafe, "_passed", group)
    go(run, 2)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-10, atol=1e-11)
    assert len(groups) == (2 if images_at_once == 9 else 4)
    # All real images go through once in each of the updates, some at a time.
    assert sum(sizes) == 2 * 3 * (9 + 12 + 9 + 2)
    assert max(sizes) < 20


@pytest.mark.parametrize("parametrisation", ["multi_formation", "hallucinators", "bases"])
@pytest.mark.parametrize("memory", [1 << 30, 60_000])
def test_gradients_of_what_images_are_made_of(make_dataset, make_run, parametrisation, memory):
    dataset = make_dataset([7, 3, 9])
    settings = SETTINGS | {"parametrisation": parametrisation, "dsa_strategy": "color_crop"}
    run = make_run("cafe", dataset, memory, **settings)
    found, losses = cafe.match(run, run.net, 1)
    real, _, augment = batches(dataset, run, 0, 1)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in run.tensors.items()}
    others = {name: t for name, t in leaves.items() if name != "images"}
    made, _ = decode(run.decoder, leaves["images"], [run.rows_per_class] * 3, others)
    syn = [augment(s, c) for c, s in enumerate(made.split(len(made) // 3))]
    expected = loss_of(run.net, real, syn)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=1e-11)
    for name, gradient in zip(
        leaves, torch.autograd.grad(expected.sum(), list(leaves.values())), strict=True
    ):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("iteration", "part"),
    [(0, 1), (1199, 1), (1200, 0.5), (1600, 0.25), (1799, 0.25), (1800, 0.125), (2000, 0.125)],
)
def test_learning_rates_follow_the_iteration(make_dataset, make_run, iteration, part) -> None:
    settings = {"parametrisation": "hallucinators", "lr_decoder": 0.3, "outer_most": 1}
    run = make_run("cafe", make_dataset([4, 4]), **SETTINGS | settings)
    run.iteration = iteration
    for _ in range(2):  # setting it twice halves it once
        before = run.images.detach().clone()
        run.optimiser.state.clear()
        gradients, _ = cafe.match(run, run.fresh_net(), 0)
        cafe.step(run)
        expected = before - part * run.config.lr_img * gradients["images"]
        torch.testing.assert_close(run.images.detach(), expected, rtol=1e-12, atol=1e-14)
        assert [g["lr"] for g in run.optimiser.param_groups] == [part * 0.05, part * 0.3]


def test_settings(make_dataset) -> None:
    config = methods.resolve(cafe.Config(ipc=10), make_dataset([4, 4], size=(32, 32)))
    assert (config.model, config.iterations, config.init, config.dsa_strategy) == (
        "ConvNet", 2001, "noise", "none"
    )  # fmt: skip
    assert (config.lr_img, config.momentum, config.batch_real) == (0.1, 0.5, 256)
    assert (config.lr_net, config.batch_train) == (0.01, 256)
    assert (config.lambda_1, config.lambda_2, config.inner_weight) == (0.04, 0.03, 0.01)
    assert (config.first_weight, config.second_weight, config.third_weight) == (1, 1, 0.1)


def test_the_digits_have_settings_of_their_own() -> None:
    config = methods.resolve(cafe.Config(ipc=1), load("digits"))
    assert (config.model, config.iterations, config.lr_img) == ("ConvNetD2W32", 12, 1.0)
    assert (config.init, config.dsa_strategy) == ("noise", "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ResNet18"}, "model: ResNet18 has no blocks"),
        ({"model": "MLP"}, "model: MLP has no blocks"),
        ({"model": "ConvNetD2W4BN"}, "model: ConvNetD2W4BN has batch normalisation"),
        ({"memory": 9000}, "memory: .* 9000 bytes"),
        ({"outer_most": 0}, "outer_most: got 0"),
        ({"inner_most": 0}, "inner_most: got 0"),
        ({"lambda_1": -0.1}, "lambda_1: got -0.1"),
        ({"lambda_2": float("nan")}, "lambda_2: got nan"),
        ({"inner_weight": -1.0}, "inner_weight: got -1"),
        ({"accumulate": "never"}, "accumulate: got 'never', expected 'reset' or 'released'"),
        ({"dsa_strategy": "crop_spin"}, "spin"),
    ],
)
def test_what_cannot_work_is_refused(make_dataset, make_run, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_run("cafe", make_dataset([7, 4, 9]), **SETTINGS | settings)


def test_the_loss_of_the_digits_falls(make_run) -> None:
    settings = {"ipc": 1, "model": "ConvNetD2W8", "batch_real": 30, "lr_img": 0.1}
    run = make_run("cafe", load("digits"), outer_most=10, inner_most=1, **settings)
    losses = [each.sum().item() for each in go(run, 3)]
    assert losses[-1] < 0.5 * losses[0]
