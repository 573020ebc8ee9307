"""NCFM's protocol: the preset, and AdamW in the stacked training against torch's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import nets
from ddfast.augment import DSA
from ddfast.cutmix import cutmix
from ddfast.data import Dataset, generated, normalise
from ddfast.evaluate import Protocol, protocol, steps_matched, train_networks
from ddfast.random import generator

SEED = 3


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generated(classes=3, size=8, train_per_class=12, test_per_class=4)


@pytest.mark.parametrize(
    ("name", "epochs", "strategy"),
    [
        ("CIFAR10", 2000, "color_crop_flip_scale_rotate"),
        ("SVHN", 2000, "color_crop_scale_rotate"),
        ("digits", 2000, "color_crop_scale_rotate"),
        ("TinyImageNet", 300, "color_crop_flip_scale_rotate"),
    ],
)
def test_the_preset(dataset, name, epochs, strategy) -> None:
    chosen = protocol("ncfm", dataclasses.replace(dataset, name=name))
    assert (chosen.epochs, chosen.passes, chosen.batch) == (epochs, epochs, 128)
    assert (chosen.augmentation, chosen.strategy, chosen.cutmix) == ("idc", strategy, 0.5)
    assert (chosen.optimiser, chosen.lr, chosen.weight_decay) == ("adamw", 1e-3, 0.01)
    assert chosen.momentum == 0.9
    drops = {place: chosen.decay(place) for place in range(epochs) if chosen.decay(place) != 1}
    assert drops == {part * epochs // 5 - 1: 0.5 for part in range(1, 5)}
    matched = steps_matched(chosen, 10, 1400)
    assert matched.passes == (2000 // 11 + 1 if epochs == 2000 else 30)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="optimiser must be sgd or adamw, got 'adam'"):
        Protocol("mine", 2, optimiser="adam")
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1"):
        Protocol("mine", 0, schedule="fifths")


def plain_training(
    images: Tensor, labels: Tensor, model: str, dataset: Dataset, chosen: Protocol, number: int
) -> nn.Module:
    """What the protocol says, in the words of PyTorch."""

    def stream(purpose: str) -> torch.Generator:
        return generator(SEED, f"evaluate: {purpose}", 0, number)

    shape = (dataset.channels, dataset.num_classes, dataset.size)
    net = nets.build(model, *shape, generator=stream("weights")).double().train()
    optimiser = torch.optim.AdamW(net.parameters(), chosen.lr, weight_decay=chosen.weight_decay)
    milestones = [part * chosen.epochs // 5 for part in (1, 2, 3, 4)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.5)
    random, mixing, order = stream("augmentation"), stream("cutmix"), stream("order")
    dsa = DSA(chosen.strategy, mode="C")
    for _ in range(chosen.epochs):
        for where in torch.randperm(len(images), generator=order).split(chosen.batch):
            x, y = images[where], labels[where]
            x = dsa(x, dsa.draw(random, dataset.size, count=len(x)))
            x, partner, share = cutmix(x[None], [mixing], chosen.cutmix)
            logits = net(x[0])
            loss = share[0] * F.cross_entropy(logits, y)
            loss = loss + (1 - share[0]) * F.cross_entropy(logits, y[partner[0]])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        scheduler.step()
    return net


def weights(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in net.state_dict().values()])


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("ConvNetD2W4", {}),
        ("ConvNetD2W4", {"weight_decay": 0.3, "lr": 0.005}),
        ("ConvNetD2W4BN", {}),  # one by one
        ("MLP", {"epochs": 11}),
    ],
)
def test_the_training_is_a_plain_loop(dataset, model, settings) -> None:
    chosen = protocol("ncfm", dataset, epochs=12, batch=4)
    chosen = dataclasses.replace(chosen, **settings)
    images = normalise(dataset.train_images[::5], dataset.mean, dataset.std, torch.float64)
    labels = dataset.train_labels[::5]
    wanted = [plain_training(images, labels, model, dataset, chosen, k) for k in range(2)]
    for at_once in (1, 2):
        found = train_networks(
            *([(images, labels)], model, dataset, chosen, 2, SEED),
            dtype=torch.float64,
            at_once=at_once,
        )
        for net, other in zip(found[0], wanted, strict=True):
            torch.testing.assert_close(weights(net), weights(other), rtol=1e-8, atol=1e-10)
