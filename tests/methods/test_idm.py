"""IDM against the released loop, written out by hand class after class, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import data, methods, nets
from ddfast.data import normalise
from ddfast.memory import FIRST_ORDER
from ddfast.methods import Diverged, Run, idm, network_queue
from ddfast.random import generator
from ddfast.synthetic import decode
from ddfast.synthetic.multi_formation import quadrants

SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "init": "real",
    "factor": 2,
    "lr_img": 0.02,
    "lr_net": 0.05,
    "net_num": 4,
    "net_generate_interval": 2,
    "model_train_steps": 3,
    "batch_train": 6,
    "reset_interval": 3,
}


def four(s: Tensor) -> Tensor:
    """All top left quadrants, then the bottom left, top right and bottom right ones, enlarged."""
    size = s.shape[2:]
    tall, broad = (-(-side // 2) for side in size)
    padded = F.pad(s, (0, 2 * broad - size[1], 0, 2 * tall - size[0]))
    cells = [
        padded[:, :, top : top + tall, left : left + broad]
        for left in (0, broad)
        for top in (0, tall)
    ]
    return F.interpolate(torch.cat(cells), size=size, mode="bilinear", align_corners=False)


def literal(dataset, run, iterations: int) -> tuple[Tensor, list[Tensor], list[float]]:
    """The released algorithm; the random numbers are those the run will draw."""
    config, sampler, classes = run.config, run.sampler, range(dataset.num_classes)

    def random(purpose: str, *step: int) -> torch.Generator:
        return generator(config.seed, purpose, *step)

    def real(chosen: Tensor) -> Tensor:
        return normalise(dataset.train_images[chosen], dataset.mean, dataset.std, torch.float64)

    made = 0

    def fresh() -> dict[str, Any]:
        nonlocal made
        net = nets.build(config.model, dataset.channels, dataset.num_classes, dataset.size).double()
        nets.initialise(net, random("queue", made))
        made += 1
        learn = torch.optim.SGD(
            net.parameters(), config.lr_net, config.momentum_net, weight_decay=config.weight_decay
        )
        return {"net": net, "learn": learn, "seen": 0, "right": 0}

    queue = [fresh() for _ in range(3)]
    images = run.images.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([images], config.lr_img, config.momentum)
    history, trust = [], []
    for it in range(iterations):
        if it and it % config.reset_interval == 0:
            for each in queue:
                each |= {"seen": 0, "right": 0}
        if it % config.net_generate_interval == 0:
            if len(queue) == config.net_num:
                queue.pop(0)
            queue.append(fresh())
        numbers = random("choice of networks", it)
        chosen = queue[int(torch.randint(len(queue), (), generator=numbers))]
        trained = torch.randperm(len(queue), generator=numbers)[: config.fetch_net_num]

        net = chosen["net"].eval()
        percent = 100 * chosen["right"] / chosen["seen"] if chosen["seen"] else 0
        trust.append(percent)
        indices, counts = sampler.sample_all(config.batch_real, random("real images", it))
        draw = run.augment.draw(random("augmentation", it), dataset.size, len(classes), True)
        losses, joint = torch.zeros(len(classes), dtype=torch.float64), 0
        for c, members in enumerate(indices.split(counts)):
            s = four(images[c * config.ipc : (c + 1) * config.ipc])
            labels = torch.tensor([c] * config.ipc).repeat(4)
            x, s = (run.augment(y, draw[:, c : c + 1]) for y in (real(members), s))
            loss = ((net.embed(x).detach().mean(0) - net.embed(s).mean(0)) ** 2).sum()
            loss = loss + config.ce_weight * percent * F.cross_entropy(net(s), labels)
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

        for turn, place in enumerate(trained):
            each, numbers = queue[place], random("network images", it, turn)
            net = each["net"].train()
            for _ in range(config.model_train_steps):
                batch = torch.randperm(len(dataset.train_labels), generator=numbers)
                batch = batch[: config.batch_train]
                logits, labels = net(real(batch)), dataset.train_labels[batch]
                each["learn"].zero_grad()
                F.cross_entropy(logits, labels).backward()
                each["learn"].step()
                each["seen"] += len(labels)
                each["right"] += int((logits.argmax(1) == labels).sum())
    return images.detach(), history, trust


def go(run: Run, iterations: int) -> list[Tensor]:
    history = []
    for _ in range(iterations):
        history.append(idm.step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (8, 8)),
        ({"step": "joint", "momentum": 0.9}, (8, 8)),
        ({"ipc": 1, "init": "mix", "dsa_strategy": "none", "momentum_net": 0.0}, (8, 8)),
        ({"net_num": 50, "fetch_net_num": 9, "batch_train": 100}, (9, 7)),  # odd sides
        ({"factor": 2, "momentum": 0.0, "ce_weight": 0.0, "weight_decay": 0.1}, (8, 8)),
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, settings, size) -> None:
    dataset = make_dataset([7, 4, 9], size=size)
    run = make_run("idm", dataset, **SETTINGS | settings)
    start = run.images.detach().clone()
    expected, losses, trust = literal(dataset, run, 7)
    found = go(run, 7)
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run.images.detach(), expected, rtol=1e-10, atol=1e-12)
    assert (expected - start).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # every image moved
    assert max(trust) > 20 and min(trust) == 0


def test_the_decoding_is_idcs_up_to_order(make_dataset) -> None:
    for size in ((8, 8), (9, 7)):
        images = torch.rand(6, 2, *size, generator=torch.Generator(), dtype=torch.float64)
        labels = torch.tensor([0, 0, 1, 1, 2, 2])
        recipe = {"name": "multi_formation", "factor": 2, "kind": "single", "fill": 0.0}
        decoded, rows = decode(recipe, images, [2, 2, 2])
        mine, tiled = quadrants(images, labels)
        torch.testing.assert_close(mine, four(images), rtol=1e-12, atol=1e-14)
        # Of image i, quadrant (q) of ours is crop (0, 2, 1, 3)[q] of IDC's.
        places = torch.tensor([4 * i + crop for crop in (0, 2, 1, 3) for i in range(6)])
        assert torch.equal(mine, decoded[places])
        assert torch.equal(tiled, labels[rows][places])
        assert tiled.tolist() == [0, 0, 1, 1, 2, 2] * 4


def test_cross_entropy_is_off_until_a_network_was_trained(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    runs = [make_run("idm", dataset, **SETTINGS, ce_weight=w) for w in (0.0, 3.0)]
    first, second = ([idm.step(run)] for run in runs)
    assert torch.equal(first[0], second[0])
    trained = [k for k in range(4) if network_queue.accuracy(runs[0].state, k)]
    assert 1 <= len(trained) <= 2
    for run in runs:
        run.iteration = 1
        # Whichever is drawn, it was trained now.
        run.state[network_queue.ACCURACY] = torch.tensor([[8, 6]] * 4)
    difference = idm.step(runs[1]) - idm.step(runs[0])
    assert difference.min() > 3 * 75 * 0.1  # in percent, not as a fraction


def test_the_accuracy_is_in_percent() -> None:
    state = {network_queue.ACCURACY: torch.tensor([[0, 0], [8, 6], [5, 5], [4, 0]])}
    found = [network_queue.accuracy(state, number) for number in (4, 5, 6, 7)]
    assert found == [0.0, 75.0, 100.0, 0.0]


def test_first_in_first_out(make_dataset, make_run) -> None:
    config = make_run("idm", make_dataset([7, 4, 9]), **SETTINGS).config
    numbers = network_queue.numbers
    assert [numbers(config, it) for it in range(6)] == [
        *[range(4)] * 2,
        *[range(1, 5)] * 2,
        *[range(2, 6)] * 2,
    ]
    large = dataclasses.replace(config, net_num=100, net_generate_interval=30)
    assert [len(numbers(large, it)) for it in (0, 29, 30, 2879, 2880, 19999)] == [4, 4, 5, 99, 100, 100]  # noqa: E501  # fmt: skip
    one = dataclasses.replace(config, net_num=1)
    assert numbers(one, 0) == range(3, 4) and numbers(one, 2) == range(4, 5)


def test_who_joins_takes_the_place_of_the_oldest(make_dataset, make_run) -> None:
    run = make_run("idm", make_dataset([7, 4, 9]), **SETTINGS | {"fetch_net_num": 4})
    go(run, 2)
    before = dict(run.state)
    assert network_queue.ACCURACY in before
    state = network_queue.begin(run)  # iteration 2: number 4 joins in the place of 0
    changed = {name for name in state if state[name] is not before.get(name)}
    weights = {name for name in before if name.startswith("queue.0.weight.")}
    assert weights and changed == weights | {network_queue.ACCURACY}
    assert not any(name.startswith("queue.0.momentum.") for name in state)
    assert any(name.startswith("queue.1.momentum.") for name in state)
    assert state[network_queue.ACCURACY][:, 0].tolist() == [0, 36, 36, 36]
    run.iteration = 3
    assert network_queue.begin(run)[network_queue.ACCURACY].sum() == 0  # the reset


def test_a_step_writes_nothing_that_was_there(make_dataset, make_run, monkeypatch) -> None:
    """A failed step leaves the queue as it was, to the bit."""
    run = make_run("idm", make_dataset([7, 4, 9]), **SETTINGS | {"fetch_net_num": 4})
    go(run, 2)
    kept, copies = run.state, {name: t.clone() for name, t in run.state.items()}
    with monkeypatch.context() as patch:
        patch.setattr(network_queue, "cross_entropy", lambda *_: torch.full((), torch.nan))
        with pytest.raises(RuntimeError):
            idm.step(run)
    assert run.state is kept
    go(run, 3)
    assert run.state is not kept
    assert kept.keys() == copies.keys()
    assert all(torch.equal(kept[name], copies[name]) for name in kept)
    assert not all(torch.equal(run.state[name], copies[name]) for name in copies)


def test_networks_that_diverge_are_named(make_dataset, make_run) -> None:
    run = make_run("idm", make_dataset([7, 4, 9]), **SETTINGS | {"lr_net": 1e200})
    with pytest.raises(Diverged, match=r"the weights \(.*\) of network \d .* iteration 0.* lr_net"):
        go(run, 3)


@pytest.mark.parametrize("step", ["joint", "per_class"])
def test_chunks_change_nothing_beyond_rounding(make_dataset, make_run, step) -> None:
    dataset = make_dataset([7, 3, 9, 2])
    settings = SETTINGS | {"step": step}
    whole = make_run("idm", dataset, **settings)
    expected = go(whole, 4)
    run = make_run("idm", dataset, **settings)
    run.memory = int(5 * FIRST_ORDER * run.activations)
    sizes = []
    embed = run.net.embed
    run.net.embed = lambda x: (sizes.append(len(x)), embed(x))[1]
    found = go(run, 4)
    torch.testing.assert_close(run.images, whole.images, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert run.processed == whole.processed


@pytest.mark.parametrize("parametrisation", ["hallucinators", "bases"])
def test_what_classes_share_takes_joint_steps(make_dataset, make_run, parametrisation) -> None:
    dataset = make_dataset([7, 4, 9])
    settings = {k: v for k, v in SETTINGS.items() if k != "factor"} | {"ipc": 3}
    settings |= {"parametrisation": parametrisation, "shared": 2}
    run = make_run("idm", dataset, **settings)
    assert run.config.step == "joint"
    start = {name: tensor.detach().clone() for name, tensor in run.tensors.items()}
    go(run, 2)
    assert all(not torch.equal(run.tensors[name], start[name]) for name in start)
    shared = {"hallucinators": "a_bias", "bases": "images"}[parametrisation]
    with pytest.raises(ValueError, match=f"step: got 'per_class'.*{parametrisation} they share"):
        make_run("idm", dataset, **settings | {"step": "per_class"})
    assert shared in start or parametrisation == "hallucinators"


def test_what_cannot_work_is_refused(make_dataset, make_run) -> None:
    dataset = make_dataset([7, 4, 9])
    with pytest.raises(ValueError, match="model: ConvNetD2W4BN has batch normalisation"):
        make_run("idm", dataset, **SETTINGS | {"model": "ConvNetD2W4BN"})
    with pytest.raises(ValueError, match="class 0"):  # 7 images, and 2 x 4 quadrants
        make_run("idm", dataset, **SETTINGS | {"init": "mix"})
    with pytest.raises(ValueError, match="memory"):
        make_run("idm", dataset, memory=1000, **SETTINGS)
    for name, value in (("ce_weight", -1.0), ("net_num", 0), ("reset_interval", 0), ("lr_net", 0)):
        with pytest.raises(ValueError, match=f"{name}: got {value}"):
            idm.Config(ipc=1, **{name: value})


def named(make_dataset, name: str, size: int, channels: int = 2):
    made = make_dataset([2, 2], channels=channels, size=(size, size))
    return dataclasses.replace(made, name=name)


@pytest.mark.parametrize(
    ("name", "size", "ipc", "expected"),
    [
        ("CIFAR10", 32, 1, (0.5, 5000, 5, 10, 100, 100)),
        ("CIFAR10", 32, 10, (0.5, 256, 30, 10, 100, 100)),
        ("CIFAR10", 32, 50, (0.1, 256, 30, 10, 500, 100)),
        ("CIFAR100", 32, 1, (0.5, 5000, 5, 10, 100, 100)),
        ("CIFAR100", 32, 10, (0.1, 256, 30, 50, 100, 100)),
        ("CIFAR100", 32, 50, (0.1, 256, 30, 10, 500, 100)),
        ("TinyImageNet", 64, 1, (0.5, 256, 30, 10, 100, 100)),
        ("TinyImageNet", 64, 10, (0.5, 256, 30, 10, 500, 100)),
        ("TinyImageNet", 64, 50, (0.8, 256, 30, 50, 1000, 100)),
        ("imagenette", 128, 1, (3.0, 128, 50, 10, 200, 50)),
        ("imagenette", 128, 10, (3.0, 128, 50, 10, 1000, 50)),
        ("imagenette", 128, 50, (3.0, 128, 50, 10, 500, 100)),
    ],
)
def test_published_settings(make_dataset, name, size, ipc, expected) -> None:
    config = methods.resolve(idm.Config(ipc=ipc), named(make_dataset, name, size))
    assert expected == (
        *(config.ce_weight, config.batch_real, config.net_generate_interval),
        *(config.model_train_steps, config.reset_interval, config.net_num),
    )
    assert (config.iterations, config.lr_img, config.momentum) == (20001, 0.2, 0.5)
    assert (config.init, config.parametrisation, config.factor) == ("mix", "multi_formation", 2)
    assert (config.lr_net, config.momentum_net, config.weight_decay) == (0.01, 0.9, 5e-4)
    assert (config.fetch_net_num, config.step) == (2, "per_class")
    assert config.dsa_strategy == "color_crop_cutout_flip_scale_rotate"
    assert config.batch_train == (128 if name == "imagenette" else 256)
    assert config.decoder((size, size))["fill"] == 0


def test_small_images_are_not_divided(make_dataset) -> None:
    for size, factor in ((8, 1), (15, 1), (16, 2)):
        config = methods.resolve(idm.Config(ipc=1), named(make_dataset, "own", size))
        assert config.factor == factor
    given = methods.resolve(idm.Config(ipc=1, factor=2), named(make_dataset, "own", 8))
    assert given.factor == 2


def test_a_short_run_on_digits_lowers_the_loss() -> None:
    """Of one network that stays as it is: as it learns, its accuracy weighs more and more."""
    digits = data.load("digits")
    config = idm.Config(ipc=1, iterations=25, net_num=1, net_generate_interval=25, fetch_net_num=0)
    run = methods.start(methods.resolve(config, digits), digits, 1 << 30)
    idm.check(run)
    losses = [each.sum().item() for each in go(run, 25)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
