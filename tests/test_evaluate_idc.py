"""IDC's protocol: the preset, the training against plain PyTorch, and what is decoded for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR

from ddfast import methods, nets
from ddfast.artefact import Artefact, load
from ddfast.augment import DSA
from ddfast.cli import main
from ddfast.data import Dataset, generated, normalise
from ddfast.distill import unfinished
from ddfast.evaluate import Protocol, evaluate, protocol, steps_matched, train_networks
from ddfast.random import generator

SEED = 3
THREE = "color_crop_flip_scale_rotate"


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generated(classes=3, size=8, train_per_class=12, test_per_class=4)


def named(name: str, size: int = 32, channels: int = 3, classes: int = 2) -> Dataset:
    images = torch.zeros(classes, channels, size, size, dtype=torch.uint8)
    labels = torch.arange(classes)
    words, half = tuple(map(str, range(classes))), (0.5,) * channels
    return Dataset(name, images, labels, images, labels, words, half, half)


@pytest.mark.parametrize(
    ("name", "ipc", "factor", "strategy", "cutmix"),
    [
        ("CIFAR10", 1, 1, THREE, 0.5),
        ("CIFAR100", 40, 2, THREE, 0.5),
        ("SVHN", 1, 1, "color_crop_cutout_scale_rotate", 0.0),
        ("SVHN", 4, 2, "color_crop_scale_rotate", 0.5),
        ("SVHN", 10, 1, "color_crop_scale_rotate", 0.5),
        ("MNIST", 1, 1, "color_crop_scale_rotate", 0.5),
        ("MNIST", 4, 2, "color_crop_scale_rotate", 0.0),
        ("FashionMNIST", 4, 2, THREE, 0.5),
        ("digits", 4, 2, "color_crop_scale_rotate", 0.0),
        ("digits", 1, 1, "color_crop_scale_rotate", 0.5),
    ],
)
def test_small_images(name, ipc, factor, strategy, cutmix) -> None:
    chosen = protocol("idc", named(name), ipc=ipc, factor=factor)
    assert (chosen.epochs, chosen.passes, chosen.batch) == (1000, 1000, 64)
    assert (chosen.augmentation, chosen.strategy, chosen.cutmix) == ("idc", strategy, cutmix)
    drops = {place: chosen.decay(place) for place in range(1000) if chosen.decay(place) != 1}
    assert drops == {665: 0.2, 832: 0.2}  # after 666 and after 833 passes
    assert chosen.steps(65) == 2000


def test_large_images_are_trained_by_their_number() -> None:
    """As the published function counts, decoded images of each class; fewer from 100 classes on."""
    for ipc in (1, 2, 10, 11, 50, 51, 90, 200, 201, 450, 500, 501, 2000):
        full = 3000 if ipc == 1 else next(
            (e for most, e in ((10, 2000), (50, 1500), (200, 1000), (500, 500)) if ipc <= most),
            300,
        )  # fmt: skip
        for classes, expected in ((10, full), (100, int((2 / 3) * full) // 100 * 100)):
            chosen = protocol("idc", named("own", 224, 3, classes), ipc=ipc, factor=3)
            assert (chosen.epochs, chosen.cutmix, chosen.strategy) == (expected, 1.0, THREE)


def test_steps_matched_keeps_the_schedule() -> None:
    chosen = protocol("idc", named("CIFAR10"), ipc=40, factor=2)
    matched = steps_matched(chosen, 400, 50_000)
    assert matched.passes == matched.epochs == 30
    assert steps_matched(chosen, 400, 640).passes == 700


def test_what_is_refused() -> None:
    for settings, message in (
        ({"schedule": "cosines"}, "schedule must be one of dc, multistep, fifths, constant"),
        ({"cutmix": 1.5}, "cutmix must be a probability"),
        ({"schedule": "multistep", "epochs": 0}, "epochs must be an integer of at least 1"),
        ({"augmentation": "idc", "strategy": "spin"}, "spin"),
    ):
        with pytest.raises(ValueError, match=message):
            Protocol("mine", **{"epochs": 1, **settings})


# --- the training -------------------------------------------------------------------------------


def published_box(u: list[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """As in the CutMix paper's code, the draws given."""
    height, width = size
    cut = math.sqrt(1.0 - u[0])
    tall, wide = int(height * cut), int(width * cut)
    y, x = int(u[1] * height), int(u[2] * width)
    return (
        max(y - tall // 2, 0),
        min(y + tall // 2, height),
        max(x - wide // 2, 0),
        min(x + wide // 2, width),
    )


class Shuffled(torch.utils.data.Sampler):
    def __init__(self, count: int, random: torch.Generator) -> None:
        self.count, self.random = count, random

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=self.random).tolist())

    def __len__(self) -> int:
        return self.count


def plain_training(
    images: Tensor, labels: Tensor, model: str, dataset: Dataset, chosen: Protocol, number: int
) -> nn.Module:
    """What the protocol says, in the words of PyTorch."""

    def stream(purpose: str) -> torch.Generator:
        return generator(SEED, f"evaluate: {purpose}", 0, number)

    shape = (dataset.channels, dataset.num_classes, dataset.size)
    net = nets.build(model, *shape, generator=stream("weights")).double().train()
    optimiser = torch.optim.SGD(net.parameters(), chosen.lr, momentum=0.9, weight_decay=5e-4)
    epochs = chosen.epochs
    scheduler = MultiStepLR(optimiser, [2 * epochs // 3, 5 * epochs // 6], gamma=0.2)
    random, mixing = stream("augmentation"), stream("cutmix")
    names = chosen.strategy.split("_")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels),
        batch_size=chosen.batch,
        sampler=Shuffled(len(images), stream("order")),
        generator=torch.Generator().manual_seed(0),
    )
    dsa = DSA("_".join(names), mode="C")
    for _ in range(epochs):
        for x, y in loader:
            x = dsa(x, dsa.draw(random, dataset.size, count=len(x)))
            coin, *u = torch.rand(4, generator=mixing, dtype=torch.float64).tolist()
            order = torch.randperm(len(x), generator=mixing)
            if coin < chosen.cutmix:
                top, bottom, left, right = published_box(u, dataset.size)
                x = x.clone()
                x[:, :, top:bottom, left:right] = x[order][:, :, top:bottom, left:right]
                kept = 1 - (bottom - top) * (right - left) / (x.shape[-1] * x.shape[-2])
                logits = net(x)
                loss = F.cross_entropy(logits, y) * kept
                loss = loss + F.cross_entropy(logits, y[order]) * (1 - kept)
            else:
                loss = F.cross_entropy(net(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        scheduler.step()
    return net


def weights(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in net.state_dict().values()])


@pytest.mark.parametrize("cutmix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_the_training_is_a_plain_loop(dataset, cutmix, soft) -> None:
    chosen = Protocol(
        *("idc", 12, "idc", "color_crop_cutout_flip_scale_rotate"),
        batch=4,
        lr=0.05,
        schedule="multistep",
        cutmix=cutmix,
    )
    images = normalise(dataset.train_images[::5], dataset.mean, dataset.std, torch.float64)
    labels = dataset.train_labels[::5]
    wanted = [plain_training(images, labels, "ConvNetD2W4", dataset, chosen, k) for k in range(2)]
    given = F.one_hot(labels, 3).double() if soft else labels
    for at_once in (1, 2):
        found = train_networks(
            *([(images, given)], "ConvNetD2W4", dataset, chosen, 2, SEED),
            dtype=torch.float64,
            at_once=at_once,
        )
        for net, other in zip(found[0], wanted, strict=True):
            torch.testing.assert_close(weights(net), weights(other), rtol=1e-9, atol=1e-11)


def test_the_drops_are_seen(dataset) -> None:
    """Trainings of 6 and of 5 passes part where the first of them drops, after 4 and after 3."""
    images = normalise(dataset.train_images[:4], dataset.mean, dataset.std, torch.float64)
    found = []
    for epochs in (5, 6):
        chosen = Protocol("idc", epochs, batch=4, schedule="multistep", lr=0.05)
        wanted = plain_training(
            images, dataset.train_labels[:4], "MLP", dataset,
            dataclasses.replace(chosen, augmentation="idc", strategy="crop"), 0,
        )  # fmt: skip
        chosen = dataclasses.replace(chosen, augmentation="idc", strategy="crop")
        sets = [(images, dataset.train_labels[:4])]
        net = train_networks(sets, "MLP", dataset, chosen, 1, SEED, dtype=torch.float64)[0][0]
        torch.testing.assert_close(weights(net), weights(wanted), rtol=1e-9, atol=1e-11)
        found.append([chosen.decay(place) for place in range(epochs)])
    assert found == [[1, 1, 0.2, 0.2, 1], [1, 1, 1, 0.2, 0.2, 1]]


# --- what is decoded ----------------------------------------------------------------------------


def made(dataset: Dataset, **settings: Any) -> Artefact:
    images = torch.rand((6, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    fields = {
        "images": images,
        "labels": torch.tensor([0, 0, 1, 1, 2, 2]),
        "space": "pixel",
        "mean": dataset.mean,
        "std": dataset.std,
        "class_names": dataset.class_names,
        "dataset": dataset.name,
        "method": "idc",
        "config": {"ipc": 2},
        "seed": 0,
        "decoder": {"name": "multi_formation", "factor": 2, "kind": "single"},
    }
    return Artefact(**{**fields, **settings})


def test_an_artefact_decodes_itself(dataset, tmp_path) -> None:
    order = torch.tensor([3, 0, 5, 1, 2, 4])  # labels need not be sorted
    artefact = made(dataset)
    soft = torch.rand((6, 3), generator=torch.Generator().manual_seed(2))
    mixed = made(
        dataset, images=artefact.images[order], labels=artefact.labels[order], soft_labels=soft
    )
    read = load(mixed.save(tmp_path / "a.safetensors"))
    assert read.decoder == artefact.decoder
    for each in (artefact, read):
        decoded = each.decoded()
        assert decoded.decoder is None and decoded.decoded() is decoded
        assert decoded.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
        # The upper left crop of the first image of class 0.
        first = each.images[int((each.labels == 0).nonzero()[0])]
        crop = F.interpolate(first[None, :, :4, :4], size=(8, 8), mode="bilinear")
        torch.testing.assert_close(decoded.images[:1], crop, rtol=0, atol=1e-6)
    expected = soft[torch.argsort(mixed.labels, stable=True)].repeat_interleave(4, 0)
    assert torch.equal(read.decoded().soft_labels, expected)
    plain = made(dataset, decoder=None)
    assert plain.decoded() is plain
    for recipe, message in (
        ({"name": "magic"}, "decoder: got 'magic', expected one of multi_formation"),
        ({"name": "multi_formation", "factor": 9}, "decoder: got factor 9, expected .* 1..8"),
        ({"name": "multi_formation", "factor": 2, "f": 1}, "decoder: multi_formation has no f"),
    ):
        with pytest.raises(ValueError, match=message):
            made(dataset, decoder=recipe)


def test_a_decoded_set_is_compared_with_as_many_stored_images(dataset) -> None:
    artefact = made(dataset)
    report = evaluate(
        *(artefact, dataset, "ConvNetD1W4", "idc"), num_eval=2, epochs=6, progress=False
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["distilled", "random selection", "full data"]
    assert (rows["distilled"].images, rows["distilled"].ipc) == (24, 2)
    assert rows["distilled"].ratio == rows["random selection"].ratio == pytest.approx(6 / 36)
    assert (rows["random selection"].images, rows["full data"].ipc) == (6, 12)
    assert rows["random selection"].networks == 10
    assert "idc, 6 epochs" in report.to_markdown()
    # The very same as training on the decoded images by themselves.
    decoded = artefact.decoded()
    pair = (decoded.normalised(dataset.mean, dataset.std), decoded.labels)
    again = evaluate(
        *(pair, dataset, "ConvNetD1W4", "idc"),
        num_eval=2,
        epochs=6,
        progress=False,
        baselines=False,
    )
    assert again.row("distilled").accuracies == rows["distilled"].accuracies


DATA = '{"classes": 3, "size": 8, "train_per_class": 12, "test_per_class": 4}'


def test_from_the_command_line(tmp_path, capsys) -> None:
    """A run of IDC is evaluated by IDC's protocol, decoded, and shown as it is stored."""
    flags = ["--dataset", "generated", "--data_options", DATA, "--ipc", "2", "--threads", "1"]
    flags += ["--model", "ConvNetD1W4", "--iterations", "2", "--inner_loop", "2", "--n_data", "8"]
    flags += ["--factor", "2"]  # cells of 4 pixels: not by default
    assert main(["distill", "idc", *flags, "--out", str(tmp_path), "--quiet"]) == 0
    artefact = load(tmp_path / "distilled.safetensors")
    assert (artefact.space, artefact.decoder["factor"], len(artefact.images)) == ("pixel", 2, 6)
    halfway, iterations = unfinished(tmp_path)
    assert (iterations, halfway.space, halfway.decoder) == (2, "pixel", artefact.decoder)
    assert torch.equal(halfway.images, artefact.images)
    picture = (tmp_path / "grid.png").read_bytes()
    (tmp_path / "grid.png").unlink()
    assert main(["show", str(tmp_path)]) == 0
    assert (tmp_path / "grid.png").read_bytes() == picture
    words = ["evaluate", str(tmp_path), "--epochs", "2", "--quiet", "--num_eval", "1"]
    assert main([*words, "--selections", "2", "--threads", "1"]) == 0
    assert "| idc | ConvNetD1W4 | idc, 2 epochs |" in capsys.readouterr().out


def test_every_method_knows_the_protocol_of_its_paper() -> None:
    found = {name: method.protocol for name, method in methods.methods().items()}
    assert found == {
        **{name: name for name in ("dc", "dsa", "dm", "idc", "cafe", "m3d", "it_gan", "ncfm")},
        **{name: name for name in ("mtt", "datm", "dd", "linba", "rat_bptt")},
        "tesla": "mtt",
        "ftd": "mtt",
        "dcc": "dc",
        "dsac": "dsa",
        "idc_i": "idc",
        "idm": "dm",
        **dict.fromkeys(("kip", "ls"), "krr"),
        "rfad": "rfad",
        "frepo": "frepo",
        **dict.fromkeys(("mtt", "tesla", "ftd"), "mtt"),
        "datm": "datm",
    }
