"""Training networks: against a plain PyTorch loop, stacked against one by one, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddfast import nets
from ddfast.augment import DSA
from ddfast.data import Dataset, normalise
from ddfast.evaluate import NotFinite, Protocol, accuracy, train_networks
from ddfast.evaluate import train as train_module
from ddfast.evaluate.dc_augmentation import dc_augment
from ddfast.random import generator

SEED = 11


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_dataset(channels: int = 1, side: int = 8, classes: int = 3, name: str = "toy") -> Dataset:
    g = torch.Generator().manual_seed(5)
    labels = torch.arange(classes).repeat_interleave(6)
    pixels = torch.randint(0, 256, (len(labels), channels, side, side), generator=g)
    return Dataset(
        name=name,
        train_images=pixels.to(torch.uint8),
        train_labels=labels,
        test_images=pixels.flip(0).to(torch.uint8),
        test_labels=labels.flip(0),
        class_names=tuple("abcdefghij"[:classes]),
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
    )


def some_set(dataset: Dataset, count: int, seed: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(
        (count, dataset.channels, *dataset.size), generator=g, dtype=torch.float64
    ).to(dtype)
    return images, torch.randint(0, dataset.num_classes, (count,), generator=g)


class Shuffled(torch.utils.data.Sampler):
    """The order of a DataLoader with shuffle=True and this generator, epoch after epoch."""

    def __init__(self, count: int, random: torch.Generator) -> None:
        self.count, self.random = count, random

    def __iter__(self):
        return iter(torch.randperm(self.count, generator=self.random).tolist())

    def __len__(self) -> int:
        return self.count


def plain_training(images, labels, model, dataset, protocol, place, number):
    """What the protocol says, in the words of PyTorch."""

    def stream(purpose: str) -> torch.Generator:
        return generator(SEED, f"evaluate: {purpose}", place, number)

    shape = (dataset.channels, dataset.num_classes, dataset.size)
    net = nets.build(model, *shape, generator=stream("weights")).double().train()
    if images.dtype == torch.uint8:
        images = normalise(images, dataset.mean, dataset.std, torch.float64)
    random = stream("augmentation")
    dsa = DSA(protocol.strategy)

    def optimiser(lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    lr = protocol.lr
    steps = optimiser(lr)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels),
        batch_size=protocol.batch,
        sampler=Shuffled(len(images), stream("order")),
        generator=torch.Generator().manual_seed(0),  # or it would touch the global one
    )
    criterion = nn.CrossEntropyLoss()
    for epoch in range(protocol.epochs + 1):
        for x, y in loader:
            if protocol.augmentation == "dsa":
                x = dsa(x, dsa.draw(random, dataset.size, count=len(x)))
            elif protocol.augmentation == "dc":
                x = dc_augment(x, protocol.strategy, random)
            steps.zero_grad()
            criterion(net(x), y).backward()
            steps.step()
        if epoch == protocol.epochs // 2 + 1:
            lr *= 0.1
            steps = optimiser(lr)
    return net


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in net.state_dict().values()])


DSA_ALL = "color_crop_cutout_flip_scale_rotate"


@pytest.mark.parametrize(
    ("model", "count", "protocol", "channels"),
    [
        ("ConvNetD2W4", 7, Protocol("dm", 5, "dsa", DSA_ALL, batch=3, lr=0.05), 1),
        ("ConvNetD2W4", 7, Protocol("dc", 5, batch=256, lr=0.05), 3),
        ("ConvNetD2W4GNALMP", 5, Protocol("dc", 4, "dc", "crop_scale_rotate", batch=2), 1),
        ("MLP", 5, Protocol("dsa", 4, "dsa", "flip_color", batch=2), 1),
        ("ConvNetD1W4NNASwishNP", 1, Protocol("dc", 6), 1),
        ("AlexNet", 1, Protocol("dc", 2), 1),
    ],
)
def test_stacked_and_one_by_one_are_a_plain_loop(model, count, protocol, channels):
    dataset = make_dataset(channels)
    sets = [some_set(dataset, count, seed) for seed in (1, 2)]
    wanted = [
        [plain_training(*sets[i], model, dataset, protocol, i, k) for k in range(2)]
        for i in range(2)
    ]
    for at_once in (1, 3, None):
        found = train_networks(
            sets, model, dataset, protocol, 2, SEED, dtype=torch.float64, at_once=at_once
        )
        for place in range(2):
            for number in range(2):
                torch.testing.assert_close(
                    weights(found[place][number]),
                    weights(wanted[place][number]),
                    rtol=1e-8,
                    atol=1e-10,
                )
                assert not found[place][number].training


@pytest.mark.parametrize("model", ["ConvNetD2W4BN", "ConvNetD2W4LN"])
def test_networks_that_cannot_be_stacked(model):
    dataset = make_dataset()
    protocol = Protocol("dm", 4, "dsa", DSA_ALL, batch=4)
    sets = [some_set(dataset, 9, 1)]
    wanted = [plain_training(*sets[0], model, dataset, protocol, 0, k) for k in range(2)]
    found = train_networks(sets, model, dataset, protocol, 2, SEED, dtype=torch.float64, at_once=2)
    for k in range(2):
        torch.testing.assert_close(weights(found[0][k]), weights(wanted[k]), rtol=1e-9, atol=1e-11)


def test_the_learning_rate_drops_once_and_the_momentum_with_it():
    dataset = make_dataset()
    sets = [some_set(dataset, 4, 3)]

    def trained(epochs: int) -> torch.Tensor:
        nets_ = train_networks(
            sets, "MLP", dataset, Protocol("dc", epochs), 1, SEED, dtype=torch.float64
        )
        return weights(nets_[0][0])

    # E = 6 drops after the pass with index 4: E = 3 (4 passes) and E = 6 share their first 3.
    wanted = plain_training(*sets[0], "MLP", dataset, Protocol("dc", 6), 0, 0)
    torch.testing.assert_close(trained(6), weights(wanted), rtol=1e-9, atol=1e-11)
    for epochs, drop in ((6, 4), (1000, 501), (300, 151)):
        chosen = Protocol("dc", epochs)
        assert (chosen.decay(drop - 1), chosen.decay(drop), chosen.decay(drop + 1)) == (1, 0.1, 1)


def test_pixels_are_normalised_on_the_fly():
    dataset = make_dataset(3)
    pixels, labels = dataset.train_images[:7], dataset.train_labels[:7]
    protocol = Protocol("dm", 3, "dsa", DSA_ALL, batch=4)
    wanted = weights(plain_training(pixels, labels, "ConvNetD2W4", dataset, protocol, 0, 0))
    floats = normalise(pixels, dataset.mean, dataset.std, torch.float64)
    for sets in ([(pixels, labels)], [(floats, labels)], [(pixels, labels), (floats, labels)]):
        found = train_networks(sets, "ConvNetD2W4", dataset, protocol, 1, SEED, dtype=torch.float64)
        torch.testing.assert_close(weights(found[0][0]), wanted, rtol=1e-9, atol=1e-11)


def test_soft_labels_one_hot_are_hard_labels():
    dataset = make_dataset()
    images, labels = some_set(dataset, 6, 1)
    soft = nn.functional.one_hot(labels, dataset.num_classes).double()
    protocol = Protocol("dc", 4, lr=0.05)
    arguments = ("ConvNetD2W4", dataset, protocol, 2, SEED)
    hard_nets = train_networks([(images, labels)], *arguments, dtype=torch.float64)
    soft_nets = train_networks([(images, soft)], *arguments, dtype=torch.float64)
    for a, b in zip(hard_nets[0], soft_nets[0], strict=True):
        torch.testing.assert_close(weights(a), weights(b), rtol=1e-9, atol=1e-11)
    softer = train_networks([(images, soft * 0.8 + 0.2 / 3)], *arguments, dtype=torch.float64)
    assert (weights(softer[0][0]) - weights(hard_nets[0][0])).abs().max() > 1e-4


@pytest.mark.parametrize("at_once", [2, 4])
def test_same_seed_same_bits_for_any_number_of_threads(at_once):
    dataset = make_dataset()
    sets = [some_set(dataset, 7, seed, torch.float32) for seed in (1, 2)]
    protocol = Protocol("dm", 6, "dsa", DSA_ALL, batch=4)

    def run(threads: int, seed: int = SEED) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        inside: set[int] = set()
        found = train_networks(
            sets,
            "ConvNetD2W8",
            dataset,
            protocol,
            2,
            seed,
            at_once=at_once,
            on_progress=lambda _: inside.add(torch.get_num_threads()),
        )
        assert torch.get_num_threads() == threads
        assert inside == {1}  # a thread for each stack, not several inside an operation
        return [weights(net) for each in found for net in each]

    first, again, threaded = run(1), run(1), run(2)
    for a, b, c in zip(first, again, threaded, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], run(1, SEED + 1)[0])


def test_progress_counts_every_epoch_of_every_network():
    dataset = make_dataset()
    seen: list[int] = []
    train_networks(
        [some_set(dataset, 4, 1)], "MLP", dataset, Protocol("dc", 4), 5, SEED,
        at_once=2, on_progress=seen.append,
    )  # fmt: skip
    assert sum(seen) == 5 * 5
    assert sorted(seen) == [1] * 5 + [2] * 10  # three stacks, as even as can be


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_loss_that_is_not_finite_names_network_and_epoch(at_once):
    dataset = make_dataset()
    images, labels = some_set(dataset, 4, 1, torch.float32)
    good, bad = (images, labels), (torch.full_like(images, 3e38), labels)
    with pytest.raises(NotFinite, match=r"network 0 on set 1 is not finite in epoch \d of 9"):
        train_networks([good, bad], "MLP", dataset, Protocol("dc", 9), 2, SEED, at_once=at_once)


def test_after_a_failure_the_other_threads_stop():
    dataset = make_dataset()
    images, labels = some_set(dataset, 2, 1, torch.float32)
    torch.set_num_threads(2)
    seen: list[int] = []
    with pytest.raises(NotFinite, match="set 1"):
        train_networks(
            [(images, labels), (torch.full_like(images, 3e38), labels)],
            "MLP",
            dataset,
            Protocol("dc", 20_000),
            1,
            SEED,
            at_once=1,
            on_progress=seen.append,
        )
    assert len(seen) < 20_000
    assert torch.get_num_threads() == 2


def test_accuracy_counts_right_answers_in_any_chunks():
    dataset = make_dataset(1, 4, 3)
    scores = torch.zeros(len(dataset.test_labels), 3)
    answers = dataset.test_labels.clone()
    answers[:5] = (answers[:5] + 1) % 3  # five wrong answers
    scores[torch.arange(len(scores)), answers] = 1.0

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.seen, self.unused = 0, [], nn.Parameter(torch.zeros(1))

        def forward(self, x):
            assert not torch.is_grad_enabled()
            self.seen.append(x)
            self.place += len(x)
            return scores[self.place - len(x) : self.place]

    for chunk in (1, 7, 500):
        net = Known()
        assert accuracy(net, dataset, chunk) == 13 / 18
        assert torch.equal(
            torch.cat(net.seen), normalise(dataset.test_images, dataset.mean, dataset.std)
        )
        assert max(len(x) for x in net.seen) == min(chunk, 18)
    scores[2, 1] = math.nan
    with pytest.raises(NotFinite, match="logits"):
        accuracy(Known(), dataset)


def test_bad_input_is_refused_before_any_work(monkeypatch):
    dataset = make_dataset()
    images, labels = some_set(dataset, 4, 1, torch.float32)
    monkeypatch.setattr(train_module, "_train", lambda *_: pytest.fail("work has begun"))
    outside = labels.clone()
    outside[2] = 3
    nan = images.clone()
    nan[1, 0, 0, 0] = math.nan
    cases = [
        (ValueError, "labels of set 0 must lie in 0..2", [(images, outside)]),
        (ValueError, "labels of set 0 must lie in 0..2", [(images, outside - 4)]),
        (TypeError, "labels of set 0 must be int64", [(images, labels.int())]),
        (ValueError, "differ in length: 3 and 4", [(images[:3], labels)]),
        (ValueError, "not finite", [(nan, labels)]),
        (ValueError, r"shape \(N, 1, 8, 8\)", [(images[..., :7], labels)]),
        (ValueError, r"shape \(N, 1, 8, 8\)", [(images[:0], labels[:0])]),
        (TypeError, "uint8 or floating-point", [(images.long(), labels)]),
        (TypeError, "pair of tensors", [(images, [0, 1, 2, 0])]),
        (ValueError, "of one size", [(images, labels), (images[:3], labels[:3])]),
        (ValueError, "soft labels of set 0", [(images, torch.zeros(4, 2))]),
        (ValueError, "are not finite", [(images, torch.full((4, 3), math.inf))]),
        (ValueError, "all have hard", [(images, labels), (images, torch.zeros(4, 3))]),
        (ValueError, "sets is empty", []),
    ]
    for error, message, sets in cases:
        with pytest.raises(error, match=message):
            train_networks(sets, "MLP", dataset, Protocol("dc", 1), 1, SEED)
    with pytest.raises(ValueError, match="count"):
        train_networks([(images, labels)], "MLP", dataset, Protocol("dc", 1), 0, SEED)
    with pytest.raises(ValueError, match="unknown network"):
        train_networks([(images, labels)], "MPL", dataset, Protocol("dc", 1), 1, SEED)
    with pytest.raises(ValueError, match="at_once"):
        train_networks([(images, labels)], "MLP", dataset, Protocol("dc", 1), 1, SEED, at_once=0)


@pytest.mark.gpu
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_gpu_trains_the_same_networks(at_once):
    dataset = make_dataset(3)
    sets = [some_set(dataset, 7, 1)]
    protocol = Protocol("dc", 5, batch=3, lr=0.05)
    here, there = (
        train_networks(
            sets, "ConvNetD2W4", dataset, protocol, 2, SEED,
            dtype=torch.float64, at_once=at_once, device=device,
        )[0]
        for device in ("cpu", "cuda")
    )  # fmt: skip
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(weights(theirs.cpu()), weights(ours), rtol=1e-8, atol=1e-10)
        assert accuracy(theirs, dataset) == accuracy(ours, dataset)
