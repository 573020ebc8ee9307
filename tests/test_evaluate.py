"""The whole evaluation: rows, seeds, conversions, reports, refusals."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from ddfast.artefact import Artefact
from ddfast.data import Dataset, normalise, random_selection, whitened
from ddfast.evaluate import (
    NotFinite,
    Protocol,
    Report,
    Row,
    accuracy,
    compare,
    evaluate,
    protocol,
    random_sets,
    train_networks,
)
from ddfast.random import generator, seed_of

QUICK = {"epochs": 3, "batch": 5, "progress": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    g = torch.Generator().manual_seed(5)
    labels = torch.arange(3).repeat_interleave(8)
    pixels = torch.randint(0, 100, (24, 1, 8, 8), generator=g)
    pixels += 50 * labels.view(-1, 1, 1, 1)
    pixels = pixels.to(torch.uint8)
    return Dataset(
        "toy", pixels, labels, pixels.flip(0), labels.flip(0), ("a", "b", "c"), (0.4,), (0.3,)
    )


def artefact(dataset: Dataset, **changed) -> Artefact:
    images, labels = random_selection(dataset, 2, torch.Generator().manual_seed(1))
    fields = {
        "images": normalise(images, dataset.mean, dataset.std),
        "labels": labels,
        "space": "normalised",
        "mean": dataset.mean,
        "std": dataset.std,
        "class_names": dataset.class_names,
        "dataset": "toy",
        "method": "dm",
        "config": {},
        "seed": 0,
    }
    return Artefact(**fields | changed)


def test_rows_are_what_train_networks_gives(dataset):
    made = artefact(dataset)
    report = evaluate(
        made, dataset, ("MLP", "ConvNetD2W4"), num_eval=2, selections=3, seed=4, **QUICK
    )
    assert [(row.name, row.model) for row in report.rows] == [
        (name, model)
        for model in ("MLP", "ConvNetD2W4")
        for name in ("distilled", "random selection", "full data")
    ]
    chosen = protocol("dm", dataset, epochs=3, batch=5)
    selections = [
        random_selection(dataset, 2, generator(4, "evaluate: selection", number))
        for number in range(3)
    ]
    full = [(dataset.train_images, dataset.train_labels)]
    for model in ("MLP", "ConvNetD2W4"):
        trained = train_networks(
            [(made.images, made.labels), *selections], model, dataset, chosen, 2, 4
        )
        wanted = [tuple(100 * accuracy(net, dataset) for net in each) for each in trained]
        assert report.row("distilled", model).accuracies == tuple(wanted[:1])
        assert report.row("random selection", model).accuracies == tuple(wanted[1:])
        trained = train_networks(full, model, dataset, chosen, 2, seed_of(4, "evaluate: full data"))
        wanted = [tuple(100 * accuracy(net, dataset) for net in trained[0])]
        assert report.row("full data", model).accuracies == tuple(wanted)
    for row in report.rows:
        assert row.seconds > 0 and row.peak_memory > 2**20
        assert (row.images, row.ipc, row.ratio) == (
            (24, 8, 1) if row.name == "full data" else (6, 2, 0.25)
        )
    assert sum(row.seconds for row in report.rows) <= report.seconds
    assert (report.dataset, report.split, report.method) == ("toy", "test", "dm")


def test_the_distilled_row_needs_no_baselines_and_the_seed_decides(dataset):
    made = artefact(dataset)
    arguments = {"num_eval": 3, "selections": 2, **QUICK, "epochs": 12, "batch": 3, "lr": 0.05}
    with_baselines = evaluate(made, dataset, "ConvNetD2W4", seed=1, **arguments)
    alone = evaluate(made, dataset, "ConvNetD2W4", seed=1, baselines=False, **arguments)
    assert [row.name for row in alone.rows] == ["distilled"]
    assert alone.rows[0].accuracies == with_baselines.rows[0].accuracies
    pair = evaluate(
        (made.images, made.labels), dataset, "ConvNetD2W4", seed=1, baselines=False, **arguments
    )
    assert pair.rows[0].accuracies == alone.rows[0].accuracies and pair.method == ""
    others = [
        evaluate(made, dataset, "ConvNetD2W4", seed=s, baselines=False, **arguments).rows[0]
        for s in (2, 3, 4)
    ]
    assert any(row.accuracies != alone.rows[0].accuracies for row in others)


def test_an_artefact_with_other_constants_is_converted(dataset, monkeypatch):
    made = artefact(dataset)
    pixels = made.to_pixels()
    seen = []

    def train(sets, *arguments, **keywords):
        seen.append(sets[0][0])
        return train_networks(sets, *arguments, **keywords)

    monkeypatch.setattr(compare, "train_networks", train)
    other = artefact(dataset, images=normalise(pixels, (0.2,), (0.7,)), mean=(0.2,), std=(0.7,))
    plain = artefact(dataset, images=pixels / 255, space="pixel")
    for each in (made, other, plain):
        evaluate(each, dataset, "MLP", num_eval=1, baselines=False, **QUICK)
    assert torch.equal(seen[0], made.images)
    for images in seen[1:]:
        torch.testing.assert_close(images, made.images, rtol=0, atol=1e-5)


def test_a_set_of_cafe_with_dsa_is_evaluated_with_dsa(dataset):
    def strategies(**arguments):
        made = artefact(dataset, method="cafe", config={"dsa_strategy": "color_crop"})
        arguments = {"protocol": "cafe", "baselines": False, "num_eval": 1, **QUICK} | arguments
        set_of = arguments.pop("distilled", made)
        return evaluate(set_of, dataset, "MLP", **arguments).rows[0].protocol.strategy

    assert strategies() == "color_crop"
    assert strategies(dsa_strategy="flip") == "flip"
    assert strategies(dsa_strategy="none") == ""
    assert strategies(distilled=artefact(dataset, config={"dsa_strategy": "crop"})) == ""
    assert strategies(protocol="dm") == "color_crop_cutout_flip_scale_rotate"


def test_soft_labels_have_a_row_of_their_own(dataset):
    soft = torch.full((6, 3), 1 / 3)
    soft[:, 0] += 0.5
    report = evaluate(
        artefact(dataset, soft_labels=soft), dataset, "MLP", num_eval=1, selections=1,
        **QUICK | {"epochs": 40, "lr": 0.1},
    )  # fmt: skip
    names = ["distilled, soft labels", "distilled", "random selection", "full data"]
    assert [row.name for row in report.rows] == names
    # All soft labels favour class 0, which a third of the images have.
    assert report.rows[0].mean == pytest.approx(100 / 3)
    assert report.rows[1].mean > 60
    assert "| dm, soft labels |" in report.to_markdown()


def test_it_learns_and_one_image_is_enough(dataset):
    images, labels = dataset.train_images[:1], dataset.train_labels[:1]
    arguments = {**QUICK, "epochs": 10, "lr": 0.1, "num_eval": 2, "selections": 1}
    report = evaluate((images, labels), dataset, "ConvNetD2W4", **arguments)
    assert report.rows[0].ipc == pytest.approx(1 / 3)
    assert report.rows[0].mean == pytest.approx(100 / 3)  # only class 0 was ever seen
    # The classes differ in brightness, which instance normalisation takes away: an MLP sees it.
    report = evaluate(
        artefact(dataset), dataset, "MLP", "dc", **arguments | {"epochs": 60, "lr": 0.05}
    )
    assert report.row("full data").mean > 90
    assert report.row("distilled").mean > 70


def test_the_full_data_gets_about_as_many_steps(dataset):
    report = evaluate(
        artefact(dataset), dataset, "MLP", num_eval=1, selections=1, **QUICK | {"epochs": 99}
    )
    assert [row.protocol.epochs + 1 for row in report.rows] == [100, 100, 40]
    # 6 images are 2 steps of 5, and 24 images are 5
    assert [row.protocol.steps(row.images) for row in report.rows] == [200, 200, 200]


def test_batch_normalisation_goes_one_by_one(dataset):
    report = evaluate(
        artefact(dataset), dataset, "ConvNetD2W4BN", "dc", num_eval=2, selections=1, **QUICK
    )
    assert report.rows[0].protocol.strategy == "crop_noise"
    assert [row.networks for row in report.rows] == [2, 2, 2]


def test_random_sets_have_as_many_of_each_class(dataset):
    labels = torch.tensor([2, 0, 0, 2, 2])
    sets = random_sets(labels, dataset, 3, 9)
    for images, found in sets:
        assert found.tolist() == [0, 0, 2, 2, 2]
        assert images.dtype == torch.uint8
        assert len(images.flatten(1).unique(dim=0)) == 5
    assert not torch.equal(sets[0][0], sets[1][0])
    again = random_sets(labels, dataset, 1, 9)
    assert torch.equal(again[0][0], sets[0][0])
    with pytest.raises(ValueError, match=r"class 1 \(b\) of toy has 8 .* selection of 9"):
        random_sets(torch.ones(9).long(), dataset, 1, 0)


ROWS = (
    Row("distilled", "MLP", Protocol("dm", 1000), 20, 2.0, 0.01, ((90.0, 92.0),), 1.25, 2**20),
    Row("random selection", "MLP", Protocol("dm", 1000), 20, 2.0, 0.01,
        ((80.0, 84.0), (70.0, 74.0)), 3.0, 2**21),
)  # fmt: skip
REPORT = Report("toy", "test", "dm", 3, ROWS, 4.5, {"device": "cpu", "threads": 2})


def test_the_numbers_of_a_row():
    assert ROWS[0].accuracy == "91.0 ± 1.0"
    values = [80.0, 84.0, 70.0, 74.0]
    assert (ROWS[1].mean, ROWS[1].networks) == (77.0, 4)
    assert ROWS[1].std == pytest.approx(math.sqrt(sum((v - 77) ** 2 for v in values) / 4))
    assert ROWS[1].std == pytest.approx(statistics.pstdev(values))
    assert REPORT.row("random selection") is ROWS[1]
    with pytest.raises(KeyError, match="full data"):
        REPORT.row("full data")


def test_report_files(tmp_path):
    REPORT.write_report(tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(REPORT.to_json())
    assert content["rows"][1]["mean"] == 77.0
    assert content["rows"][1]["networks"] == 4
    assert content["rows"][0]["protocol"]["epochs"] == 1000
    assert content["rows"][0]["accuracies"] == [[90.0, 92.0]]
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[2] == "| dm | MLP | dm, 1001 epochs | 91.0 ± 1.0 | 2 | 2 | 1 % | 1.2 |"
    assert lines[3] == (
        "| random selection | MLP | dm, 1001 epochs | 77.0 ± 5.4 | 2 sets x 2 | 2 | 1 % | 3.0 |"
    )
    assert {line.count("|") for line in lines[:4]} == {9}
    assert "toy" in lines[5] and "4.5 s" in lines[5] and "2 MiB" in lines[5]


def test_evaluate_writes_where_it_is_told(dataset, tmp_path, capsys):
    report = evaluate(
        artefact(dataset), dataset, "MLP", num_eval=1, selections=1, out=tmp_path / "run", **QUICK
    )
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == report.to_markdown()
    assert capsys.readouterr().err == ""
    evaluate(
        artefact(dataset), dataset, "MLP", num_eval=1, selections=1, **QUICK | {"progress": True}
    )
    shown = capsys.readouterr().err
    assert "evaluating on toy" in shown
    # 4 epochs over the distilled set, a random selection and the 24 images of the full data
    assert f"{4 * (6 + 6 + 24)}/{4 * (6 + 6 + 24)}" in shown.replace(".0", "")


def test_values_that_are_not_finite_end_it(dataset):
    huge = artefact(dataset)
    huge = artefact(dataset, images=torch.full_like(huge.images, 3e38))
    with pytest.raises(NotFinite, match=r"network 0 on set 0 .* epoch 0 of 3"):
        evaluate(huge, dataset, "MLP", num_eval=1, baselines=False, **QUICK)


def test_refusals_before_any_work(dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "train_networks", lambda *_, **__: pytest.fail("work has begun"))
    made = artefact(dataset)
    pair = (made.images, made.labels)
    (tmp_path / "file").write_text("not a folder")
    for error, message, distilled, changed in (
        (ValueError, "mean something else",
         artefact(dataset, class_names=("b", "a", "c")), {}),
        (ValueError, "1x8x7, those of toy are 1x8x8",
         artefact(dataset, images=made.images[..., :7]), {}),
        (ValueError, r"labels of set 0 must lie in 0\.\.2", (pair[0], pair[1] + 1), {}),
        (ValueError, "differ in length", (pair[0], pair[1][:3]), {}),
        (TypeError, "labels must be int64 classes", (pair[0], torch.zeros(6, 3)), {}),
        (TypeError, "Artefact or a pair", made.images[0], {}),
        (ValueError, "unknown network", made, {"models": ("MLP", "MPL")}),
        (ValueError, "models is empty", made, {"models": ()}),
        (ValueError, "protocol must be one of", made, {"protocol": "matching"}),
        (ValueError, "num_eval", made, {"num_eval": 0}),
        (ValueError, "selections", made, {"selections": -1}),
        (ValueError, "epochs", made, {"epochs": -1}),
        (ValueError, "unknown operation", made, {"dsa_strategy": "spin"}),
        (OSError, "file", made, {"out": tmp_path / "file"}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            evaluate(distilled, dataset, **{"models": "MLP", **QUICK, **changed})


def test_a_learned_learning_rate_is_of_the_distilled_set_alone(dataset):
    made = artefact(dataset, lr=0.2)
    report = evaluate(made, dataset, "MLP", "mtt", 1, selections=1, **QUICK)
    rates = {row.name: row.protocol.lr for row in report.rows}
    assert rates == {"distilled": 0.2, "random selection": 0.01, "full data": 0.01}
    assert (
        evaluate(made, dataset, "MLP", "dm", 1, selections=1, **QUICK).rows[0].protocol.lr == 0.01
    )
    given = evaluate(made, dataset, "MLP", "mtt", 1, selections=1, lr=0.1, **QUICK)
    assert {row.protocol.lr for row in given.rows} == {0.1}


def test_a_whitened_set_is_compared_with_whitened_images(dataset, monkeypatch):
    """Networks see the selections, the full data and the test images through its whitening."""
    fitted = whitened(dataset, "frepo")
    images, labels = random_selection(dataset, 1, generator(0, "test"))
    made = Artefact(
        images=fitted.normalised(images),
        labels=labels,
        space="normalised",
        mean=dataset.mean,
        std=dataset.std,
        class_names=dataset.class_names,
        dataset=dataset.name,
        method="dm",
        config={},
        seed=0,
        whitening=fitted.whitening,
    )
    seen = []
    original = compare.accuracy
    monkeypatch.setattr(
        compare, "accuracy", lambda net, where: (seen.append(where), original(net, where))[1]
    )
    report = evaluate(made, dataset, "MLP", "dm", 1, selections=1, **QUICK)
    assert len(report.rows) == 3 and len(seen) == 3
    for each in seen:
        found, expected = (d.normalised(dataset.test_images) for d in (each, fitted))
        assert torch.equal(found, expected)
