"""Published settings of MTT, TESLA, FTD and DATM; DATM's labels and images, TESLA's teacher."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.experts import open_experts
from ddfast.experts.file import EXPERTS, mapped
from ddfast.experts.training import Config as ExpertConfig
from ddfast.methods import datm, tesla
from ddfast.methods.config import filled
from ddfast.methods.published_trajectories import family
from ddfast.methods.trajectory_matching import logits, mean_of_rows, of_rows, segment
from ddfast.random import generator

MODEL = "ConvNetD1W4"
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "syn_steps": 2,
    "expert_epochs": 2,
    "max_start_epoch": 3,
    "lr_teacher": 0.1,
    "lr_img": 1.0,
    "lr_lr": 1e-3,
}
DATM = SETTINGS | {
    "min_start_epoch": 0,
    "current_max_start_epoch": 3,
    "expansion_end_epoch": 0,
    "lr_y": 1.0,
}


def like(dataset, name: str, size: int = 32, classes: int = 10):
    """A data set that looks like one of that name."""
    images = torch.zeros(classes, 3, size, size, dtype=torch.uint8)
    names = tuple(map(str, range(classes)))
    return dataclasses.replace(
        dataset, name=name, train_images=images, train_labels=torch.arange(classes),
        test_images=images, test_labels=torch.arange(classes), class_names=names,
        mean=(0.5,) * 3, std=(0.2,) * 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name", "size", "classes", "ipc", "expected"),
    [
        ("mtt", "CIFAR10", 32, 10, 1, (5000, 50, 2, 2, 0, 1e2, 1e-7, 1e-2)),
        ("mtt", "CIFAR10", 32, 10, 10, (5000, 30, 2, 20, 0, 1e2, 1e-5, 1e-3)),
        ("mtt", "CIFAR100", 32, 100, 50, (5000, 80, 2, 40, 125, 1e3, 1e-5, 1e-2)),
        ("mtt", "TinyImageNet", 64, 200, 10, (5000, 20, 2, 40, 200, 1e4, 1e-4, 1e-2)),
        ("mtt", "own", 128, 10, 10, (5000, 20, 2, 10, 20, 1e5, 1e-6, 1e-2)),
        ("mtt", "MNIST", 28, 10, 500, (5000, 30, 2, 40, 0, 1e3, 1e-5, 1e-3)),
        ("mtt", "own", 32, 10, 3, (5000, 50, 2, 2, 0, 1e2, 1e-7, 1e-2)),
        ("mtt", "own", 32, 10, 4, (5000, 30, 2, 20, 0, 1e2, 1e-5, 1e-3)),
        ("tesla", "CIFAR10", 32, 10, 1, (10000, 50, 2, 5, 0, 500.0, 1e-7, 1e-2)),
        ("tesla", "CIFAR100", 32, 100, 10, (10000, 80, 2, 40, 125, 500.0, 1e-5, 1e-2)),
        ("tesla", "own", 64, 1000, 1, (10000, 10, 3, 10, 100, 5000.0, 1e-4, 1e-2)),
        ("ftd", "CIFAR10", 32, 10, 50, (5000, 30, 2, 40, 0, 1e3, 1e-5, 1e-2)),
        ("ftd", "CIFAR100", 32, 100, 1, (5000, 40, 3, 20, 0, 1e3, 1e-5, 1e-2)),
        ("ftd", "TinyImageNet", 64, 200, 50, (5000, 20, 2, 40, 500, 1e4, 1e-4, 1e-2)),
        ("datm", "CIFAR10", 32, 10, 10, (10000, 80, 2, 20, 100, 100.0, 1e-5, 1e-2)),
        ("datm", "CIFAR100", 32, 100, 100, (10000, 80, 2, 70, 1000, 50.0, 1e-5, 1e-2)),
    ],
)
def test_published_settings(make_dataset, method, name, size, classes, ipc, expected) -> None:
    dataset = like(make_dataset([1]), name, size, classes)
    config = methods.resolve(methods.find(method).config(ipc=ipc), dataset)
    assert (
        config.iterations, config.syn_steps, config.expert_epochs, config.max_start_epoch,
        config.batch_syn, config.lr_img, config.lr_lr, config.lr_teacher,
    ) == expected  # fmt: skip
    assert config.adjoint == ("frozen" if method == "tesla" else "exact")
    assert (config.init, config.momentum, config.lr_form) == ("real", 0.5, "softplus")
    assert config.parametrisation == "pixels"


def test_published_settings_of_each(make_dataset) -> None:
    def of(method: str, name: str, ipc: int, size: int = 32, classes: int = 10, **given: Any):
        dataset = like(make_dataset([1]), name, size, classes)
        return methods.resolve(methods.find(method).config(ipc=ipc, **given), dataset)

    assert of("mtt", "CIFAR10", 1).threshold is None
    assert of("tesla", "CIFAR10", 1, half_image_gradient=True).lr_img == 1000
    assert not of("tesla", "CIFAR10", 1).teacher_label
    assert of("tesla", "own", 1, 64, 1000).teacher_label
    decays = [of("ftd", "CIFAR10", ipc).ema_decay for ipc in (1, 10, 50)]
    assert decays == [0.9999, 0.9995, 0.999]
    config = of("datm", "CIFAR10", 50)
    assert (config.lr_y, config.momentum_y, config.threshold) == (2, 0.9, 1.0)
    assert [config.start_epochs(k) for k in (0, 99, 100, 1999, 2000, 9999)] == [
        (0, 20), (0, 20), (0, 21), (0, 39), (0, 40), (0, 40)
    ]  # fmt: skip
    assert config.predicted_correctly
    config = of("datm", "CIFAR10", 1)
    assert (config.threshold, config.lr_lr) == (1.1, 1e-7) and config.start_epochs(7) == (0, 4)
    config = of("datm", "CIFAR100", 50, classes=100)
    assert config.start_epochs(0) == (20, 70) and not config.predicted_correctly
    assert of("datm", "CIFAR10", 500, max_start_epoch=30).start_epochs(0) == (29, 30)


@pytest.mark.parametrize("method", ["mtt", "tesla", "ftd", "datm"])
@pytest.mark.parametrize("ipc", [1, 10])
def test_digits_need_no_longer_experts_than_they_have_by_default(make_dataset, method, ipc) -> None:
    dataset = like(make_dataset([1]), "digits", 8)
    config = methods.resolve(methods.find(method).config(ipc=ipc), dataset)
    experts = filled(ExpertConfig(), dataset)
    assert config.max_start_epoch - 1 + config.expert_epochs <= experts.train_epochs
    assert (config.model, config.iterations) == (experts.model, 300)
    assert config.lr_img == (100.0, 300.0)[ipc == 10]


@pytest.mark.parametrize(
    ("name", "size", "classes", "expected"),
    [
        ("CIFAR100", 32, 3, "CIFAR100"),
        ("own", 33, 10, "TinyImageNet"),
        ("own", 97, 1000, "ImageNet128"),
        ("own", 96, 500, "ImageNet1K"),
        ("own", 32, 50, "CIFAR100"),
        ("SVHN", 32, 49, "CIFAR10"),
    ],
)
def test_the_nearest_data_set(make_dataset, name, size, classes, expected) -> None:
    assert family(like(make_dataset([1]), name, size, classes)) == expected


def prepared(make_run, make_dataset, make_experts, **changes: Any):
    dataset = make_dataset([12, 9, 15])
    folder = make_experts(dataset, MODEL, experts=4, pace=0.3)
    run = make_run("datm", dataset, experts=str(folder), **DATM | {"ipc": 3} | changes)
    return run, list(datm.prepare(run)), folder


def test_datm_begins_with_images_that_an_expert_knows(make_run, make_dataset, make_experts) -> None:
    run, said, folder = prepared(make_run, make_dataset, make_experts)
    chosen, missing = datm.correct_images(run)
    assert torch.equal(run.images, run.real(chosen))
    assert run.dataset.train_labels[chosen].tolist() == run.labels.tolist()
    assert len(set(chosen.tolist())) == 9
    experts = open_experts(folder)
    guesses = [
        logits(run, experts.snapshot(k, 4).double(), run.images.detach()).argmax(1)
        for k in range(4)
    ]
    wrong = [int((guess != run.labels).sum()) for guess in guesses]
    assert missing in wrong and missing < 9
    assert any(f"{missing} of 9 images are not" in line for line in said) == bool(missing)
    assert "were trained by sgd; DATM as published has those of `ddfast experts --opt" in said[0]
    assert list(datm.prepare(run)) == []


def test_datm_begins_with_the_mean_logits_of_those_who_are_right(
    make_run, make_dataset, make_experts
) -> None:
    run, _, folder = prepared(make_run, make_dataset, make_experts, predicted_correctly=False)
    experts, nobody = open_experts(folder), 0
    each = torch.stack(
        [logits(run, experts.snapshot(k, 4).double(), run.images.detach()) for k in range(4)]
    )
    for row, label in enumerate(run.labels.tolist()):
        right = [z[row] for z in each if z[row].argmax() == label]
        nobody += not right
        expected = torch.stack(right or [z[row] for z in each]).mean(0)
        torch.testing.assert_close(run.tensors[datm.LOGITS][row].detach(), expected)
    assert 0 < nobody < 9
    made = run.config.distilled(run.tensors, run.state)
    torch.testing.assert_close(made["soft_labels"].sum(1), torch.ones(9))
    assert made["lr"] == pytest.approx(0.1) and made["decoder_tensors"] == {}


def test_datm_fills_up_where_an_expert_knows_too_few(make_run, make_dataset, make_experts) -> None:
    run, _, folder = prepared(make_run, make_dataset, make_experts)
    trajectories = mapped(folder / EXPERTS, "r+").trajectories
    trajectories[:, 4, -3:] = (1e4, 0, 0)  # the biases: class 0 for every image
    chosen, missing = datm.correct_images(run)
    assert missing == 6 and len(set(chosen.tolist())) == 9
    assert run.dataset.train_labels[chosen].tolist() == run.labels.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_start_epoch": 3}, "got 3, 3, 3, expected them to ascend"),
        (
            {"min_start_epoch": 2, "current_max_start_epoch": 2, "expansion_end_epoch": 9},
            "got 2, 2",
        ),
        ({"predicted_correctly": True, "init": "noise"}, "predicted_correctly: is for pixels"),
        (
            {"predicted_correctly": True, "parametrisation": "bases", "shared": 2},
            "got parametrisation bases",
        ),
    ],
)
def test_datm_refuses(make_run, make_dataset, make_experts, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(make_run, make_dataset, make_experts, **changes)


def test_tesla_labels_what_is_drawn_and_in_the_end_all(
    make_run, make_dataset, make_experts
) -> None:
    dataset = make_dataset([12, 9, 15])
    run = make_run(
        "tesla", dataset, experts=str(make_experts(dataset, MODEL)), ipc=3, iterations=2,
        teacher_label=True, batch_syn=2, **SETTINGS,
    )  # fmt: skip
    made, part = run.decoded(0, 3), segment(run)
    batches = [torch.tensor([0, 5]), torch.tensor([5, 7])]
    given = logits(run, part.target, made.images.detach()).softmax(1)
    expected = torch.zeros(9, 3, dtype=torch.float64)
    expected[[0, 5, 7]] = given[[0, 5, 7]]
    torch.testing.assert_close(tesla.teachers(run, made, part, batches).values, expected)
    tesla.step(run)
    assert tesla.SOFT_LABELS not in run.state
    run.iteration = 1
    tesla.step(run)
    expected = logits(run, segment(run).target, run.images.detach()).softmax(1)
    torch.testing.assert_close(run.state[tesla.SOFT_LABELS], expected)
    assert "soft_labels" in run.config.distilled(run.tensors, run.state)


def test_tesla_without_a_teacher_keeps_hard_labels(make_run, make_dataset, make_experts) -> None:
    dataset = make_dataset([12, 9, 15])
    experts = str(make_experts(dataset, MODEL))
    settings = {"experts": experts, "ipc": 3, "iterations": 1, **SETTINGS}
    run = make_run("tesla", dataset, teacher_label=False, **settings)
    tesla.step(run)
    assert "soft_labels" not in run.config.distilled(run.tensors, run.state)
    with pytest.raises(ValueError, match="half_image_gradient: true is not offered with adjoint"):
        make_run("tesla", dataset, half_image_gradient=True, adjoint="graph", **settings)


@pytest.mark.parametrize("kind", ["pixels", "multi_formation", "hallucinators", "bases"])
def test_labels_of_rows_are_those_that_the_artefact_decodes_to(
    make_run, make_dataset, make_experts, kind
) -> None:
    dataset = make_dataset([12, 9, 15])
    experts = str(make_experts(dataset, MODEL))
    run = make_run(
        "datm", dataset, experts=experts, ipc=2, parametrisation=kind,
        predicted_correctly=False, **DATM,
    )  # fmt: skip
    soft = torch.randn(len(run.labels), 3, dtype=torch.float64, generator=generator(0, "labels"))
    with torch.no_grad():
        run.tensors[datm.LOGITS].copy_(soft)
    artefact = Artefact(
        **run.config.distilled(run.tensors, run.state), labels=run.labels, space=run.config.space,
        decoder=run.decoder, mean=dataset.mean, std=dataset.std, class_names=dataset.class_names,
        dataset=dataset.name, method="datm", config={}, seed=0,
    )  # fmt: skip
    decoded, made = artefact.decoded(), run.decoded(0, 3)
    torch.testing.assert_close(decoded.images, made.images.detach().float())
    of_images = of_rows(run, soft)
    assert len(of_images) == len(made.images)
    torch.testing.assert_close(decoded.soft_labels, of_images.softmax(1).float())
    torch.testing.assert_close(mean_of_rows(run, of_images), soft)


@pytest.mark.parametrize("method", ["ftd", "datm"])
def test_a_word_about_experts_that_were_trained_otherwise(
    make_run, make_dataset, make_experts, method
) -> None:
    dataset = make_dataset([12, 9, 15])
    experts = str(make_experts(dataset, MODEL))
    run = make_run(
        method, dataset, experts=experts, ipc=3, **(DATM if method == "datm" else SETTINGS)
    )
    said = list(methods.find(method).prepare(run))
    assert "the experts were trained by sgd" in said[0]
    assert math.isfinite(run.config.lr_lr)
