"""The protocol krr: classification by kernel regression on the set."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ddfast.artefact import Artefact
from ddfast.cli import main
from ddfast.data import Dataset, normalise, random_selection, whitened
from ddfast.evaluate import NotFinite, compare, evaluate, kernel_regression, protocol, random_sets
from ddfast.kernel_matrix import kernel_matrix
from ddfast.random import generator

QUICK = {"progress": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Three classes that overlap."""
    g = torch.Generator().manual_seed(5)
    labels = torch.arange(3).repeat_interleave(30)
    middle = torch.rand((3, 1, 8, 8), generator=g)[labels]
    images = (middle + 0.5 * torch.randn(middle.shape, generator=g)).clamp(0, 1)
    order = torch.randperm(90, generator=g)
    pixels, labels = (255 * images[order]).to(torch.uint8), labels[order]
    return Dataset("toy", pixels[:60], labels[:60], pixels[60:], labels[60:],
                   ("a", "b", "c"), (0.5,), (0.3,))  # fmt: skip


def make(dataset: Dataset, ipc: int = 2, **changes) -> Artefact:
    images, labels = random_selection(dataset, ipc, generator(0, "test"))
    fields = {
        "images": dataset.normalised(images),
        "labels": labels,
        "space": "normalised",
        "mean": dataset.mean,
        "std": dataset.std,
        "class_names": dataset.class_names,
        "dataset": dataset.name,
        "method": "kip",
        "config": {"kernel": "ntk-fc2", "reg": 1e-3, "weight_var": 2.0, "bias_var": 0.1},
        "seed": 0,
        "whitening": dataset.whitening,
    }
    return Artefact(**fields | changes)


def literal(images, labels, dataset, reg=1e-3, **options) -> float:
    """Accuracy in percent, from whole matrices."""
    x = images.double()
    t = normalise(dataset.test_images, dataset.mean, dataset.std)
    t = (t if dataset.whitening is None else dataset.whitening(t)).double()
    k_ss, k_ts = kernel_matrix(x, **options), kernel_matrix(t, x, **options)
    k_ss = k_ss + reg * k_ss.trace() / len(x) * torch.eye(len(x), dtype=torch.float64)
    if not labels.is_floating_point():
        labels = torch.eye(3, dtype=torch.float64)[labels] - 1 / 3
    found = (k_ts @ torch.linalg.inv(k_ss) @ labels.double()).argmax(1)
    return 100 * (found == dataset.test_labels).double().mean().item()


@pytest.mark.parametrize("zca", ["none", "kip"])
def test_the_rows(dataset, zca) -> None:
    seen = whitened(dataset, zca)
    soft = torch.randn((6, 3), generator=torch.Generator().manual_seed(1))
    made = make(seen, soft_labels=soft)
    report = evaluate(made, dataset, ["ntk-fc2", "nngp-fc1"], "krr", **QUICK)
    names = ["distilled, soft labels", "distilled", "random selection", "full data"]
    assert [row.name for row in report.rows] == 2 * names
    options = {"ntk-fc2": {"depth": 2}, "nngp-fc1": {"kind": "nngp", "depth": 1}}
    for row in report.rows:
        others = random_sets(made.labels, dataset, 5, 0)
        sets = {
            "distilled, soft labels": [(made.images, soft)],
            "distilled": [(made.images, made.labels)],
            "random selection": [(seen.normalised(x), y) for x, y in others],
            "full data": [(seen.normalised(dataset.train_images), dataset.train_labels)],
        }
        expected = [
            literal(x, y, seen, bias_var=0.1, **options[row.model]) for x, y in sets[row.name]
        ]
        assert [one for (one,) in row.accuracies] == pytest.approx(expected)
        assert row.protocol.reg == 1e-3
        assert (row.std > 0) == (row.name == "random selection")
        images = 60 if row.name == "full data" else 6
        assert (row.images, row.ipc, row.ratio) == (images, images / 3, images / 60)
    assert "krr, reg 0.001" in report.to_markdown()


def test_reg_and_baselines(dataset) -> None:
    made = make(dataset)
    report = evaluate(made, dataset, "ntk-fc1", "krr", reg=0.5, baselines=False, **QUICK)
    (row,) = report.rows
    assert row.accuracies[0][0] == literal(
        made.images, made.labels, dataset, 0.5, depth=1, bias_var=0.1
    )
    images, labels = random_selection(dataset, 2, generator(0, "test"))
    plain = evaluate((images, labels), dataset, "ntk-fc1", "krr", baselines=False, **QUICK)
    assert plain.rows[0].protocol.reg == 1e-6


def test_blocks_change_nothing(dataset, monkeypatch) -> None:
    made = make(dataset)
    whole = evaluate(made, dataset, "ntk-fc2", "krr", **QUICK)
    monkeypatch.setattr(kernel_regression, "DEFAULT", 5000)
    again = evaluate(made, dataset, "ntk-fc2", "krr", baselines=False, **QUICK)
    assert again.rows[0].accuracies == whole.row("distilled").accuracies


def test_of_many_images_a_random_subset_stands_for_all(dataset, monkeypatch) -> None:
    monkeypatch.setattr(kernel_regression, "SUBSET", 20)
    report = evaluate(make(dataset), dataset, "ntk-fc2", "krr", **QUICK)
    row = report.row("full data, random subset")
    assert (row.images, row.ratio) == (20, 1 / 3)
    again = evaluate(make(dataset), dataset, "ntk-fc2", "krr", **QUICK)
    assert again.row("full data, random subset").accuracies == row.accuracies


def test_the_same_each_time_and_test_labels_are_not_looked_at(dataset) -> None:
    made = make(dataset)
    first = evaluate(made, dataset, "ntk-fc2", "krr", **QUICK)
    wrong = dataclasses.replace(dataset, test_labels=(dataset.test_labels + 1) % 3)
    second = evaluate(made, dataset, "ntk-fc2", "krr", **QUICK)
    other = evaluate(made, wrong, "ntk-fc2", "krr", **QUICK)
    for a, b, c in zip(first.rows, second.rows, other.rows, strict=True):
        assert a.accuracies == b.accuracies != c.accuracies


def test_cross_entropy_has_no_use_for_negative_labels(dataset) -> None:
    shares = torch.full((6, 3), 1 / 3)
    quick = {"num_eval": 1, "epochs": 1, "baselines": False, **QUICK}
    for soft, rows in ((shares, 2), (shares - 1 / 2, 1)):
        report = evaluate(make(dataset, soft_labels=soft), dataset, "MLP", "dm", **quick)
        assert len(report.rows) == rows
    quick |= {"epochs": None}
    made = make(dataset, soft_labels=shares - 1 / 2)
    names = [row.name for row in evaluate(made, dataset, "MLP", "frepo", **quick).rows]
    assert names == ["distilled, soft labels", "distilled"]


def test_the_command_takes_the_kernel_of_the_run(dataset, tmp_path, monkeypatch, capsys) -> None:
    made = make(dataset)
    made.save(tmp_path / "set.safetensors")
    monkeypatch.setattr("ddfast.data.load", lambda *arguments, **options: dataset)
    quick = ["--quiet", "--device", "cpu", "--no_baselines"]
    main(["evaluate", str(tmp_path / "set.safetensors"), *quick])
    assert "| kip | ntk-fc2 | krr, reg 0.001 |" in capsys.readouterr().out
    main(
        [
            "evaluate",
            str(tmp_path / "set.safetensors"),
            *quick,
            "--reg",
            "0.1",
            "--model",
            "ntk-fc1,nngp-fc1",
        ]
    )
    shown = capsys.readouterr().out
    assert "| kip | ntk-fc1 | krr, reg 0.1 |" in shown and "| kip | nngp-fc1 |" in shown


@pytest.mark.parametrize(
    ("models", "name", "options", "message"),
    [
        ("ConvNet", "krr", {}, "kernel: got 'ConvNet', expected KIND-NETWORK"),
        ([], "krr", {}, "models is empty: there is no kernel"),
        ("ntk-conv4", "krr", {}, "expected at least 16 x 16"),
        ("ntk-fc1", "krr", {"epochs": 3}, "epochs has no meaning for protocol 'krr'"),
        ("ntk-fc1", "krr", {"dsa_strategy": "crop"}, "dsa_strategy has no meaning"),
        ("ntk-fc1", "krr", {"reg": -1.0}, "reg must be finite and at least 0, got -1.0"),
        ("MLP", "dm", {"reg": 1.0}, "reg has no meaning for protocol 'dm'"),
    ],
)
def test_what_cannot_work_is_refused(dataset, monkeypatch, models, name, options, message) -> None:
    monkeypatch.setattr(compare, "kernel_rows", None)
    with pytest.raises(ValueError, match=message):
        evaluate(make(dataset), dataset, models, name, **QUICK, **options)


def test_what_is_not_finite_is_named(dataset) -> None:
    images = torch.full((3, 1, 8, 8), 1e200, dtype=torch.float64)
    found = (images, torch.arange(3))
    with pytest.raises(NotFinite, match="predictions for the test images are not finite"):
        kernel_regression.accuracy(kernel_matrix, found, dataset, 1e-6, torch.device("cpu"))


def test_the_preset(dataset) -> None:
    preset = protocol("krr", dataset)
    assert (preset.reg, preset.passes) == (1e-6, 1) and math.isfinite(preset.lr)
    with pytest.raises(ValueError, match="lr has no meaning for protocol 'krr'"):
        protocol("krr", dataset, lr=0.1)
