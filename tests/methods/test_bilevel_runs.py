"""Whole runs of DD, LinBa and RaT-BPTT, what they leave behind, and their protocols."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.cli import main
from ddfast.distill import distill
from ddfast.evaluate import compare, evaluate, train_networks
from ddfast.evaluate.presets import protocol
from ddfast.evaluate.protocols import by_own_schedule
from ddfast.methods import dd
from ddfast.methods.pretrained import flattened
from ddfast.random import generator
from tests.methods.test_bilevel import ALL, MODEL, settings_of


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([5, 6, 7])


@pytest.mark.parametrize("method", ALL)
def test_interrupted_and_resumed_is_the_same_bits(method, tmp_path, dataset, same_when_resumed):
    config = methods.find(method).config(**settings_of(method, iterations=5))
    artefact = same_when_resumed(method, dataset, config, 4)
    assert Artefact.load(tmp_path / "cut" / "distilled.safetensors").lr == artefact.lr


@pytest.mark.parametrize("known", [False, True])
def test_networks_follow_the_schedule_of_dd(tmp_path, dataset, known):
    """The protocol against a literal loop; random selections have one of their own."""
    config = dd.Config(**settings_of("dd"))
    artefact = distill("dd", dataset, config, tmp_path, progress=False, device="cpu")
    assert isinstance(artefact.lr, tuple) and len(artefact.lr) == 4
    start = (5, 2) if known else None
    own = by_own_schedule(protocol("dd", dataset), artefact.lr, 2, "xavier", start)
    sets = [(artefact.images, artefact.labels)]
    for at_once in (1, 2):
        trained = train_networks(
            sets, MODEL, dataset, own, 3, 3, dtype=torch.float64, at_once=at_once, device="cpu"
        )[0]
        for number, found in enumerate(trained):
            net = methods.start(methods.resolve(config, dataset), dataset, 1 << 30).net
            random = generator(3, "evaluate: weights", 0, number)
            if known:  # the two networks of a run with this seed, in turn
                random = generator(5, "fixed network", number % 2)
            dd.draw_weights(net, random, "xavier")
            net = net.double()
            for i, rate in enumerate(artefact.lr):
                rows = dd.group_rows(4, 3, 2)[i % 2]
                loss = F.cross_entropy(net(artefact.images[rows].double()), artefact.labels[rows])
                for p, g in zip(
                    net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
                ):
                    p.data -= rate * g
            theirs, ours = (flattened(n) for n in (net, found))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_report_of_dd(tmp_path, dataset):
    config = dd.Config(**settings_of("dd", init_net="fixed", sample_n_nets=2, seed=4))
    artefact = distill("dd", dataset, config, tmp_path, progress=False, device="cpu")
    report = evaluate(
        artefact, dataset, [MODEL, "MLP"], "dd", 1, selections=1, progress=False, epochs=1
    )
    for model, start in ((MODEL, (4, 2)), ("MLP", None)):
        chosen = {row.name: row.protocol for row in report.rows if row.model == model}
        rates = {name: each.rates for name, each in chosen.items()}
        assert rates == {"distilled": artefact.lr, "random selection": (), "full data": ()}
        own = chosen["distilled"]
        assert (own.groups, own.passes, own.weights, own.start) == (2, 2, "xavier", start)
        assert chosen["random selection"].start is None
    with pytest.raises(ValueError, match="protocol: dd needs a set with a learned rate"):
        evaluate((artefact.images, artefact.labels), dataset, MODEL, "dd", 1, progress=False)
    for settings in ({}, {"distill_steps": 3}):
        other = dataclasses.replace(artefact, config=settings)
        with pytest.raises(ValueError, match=r"dd needs the number of groups .* with 4 rates"):
            evaluate(other, dataset, MODEL, "dd", 1, progress=False)


@pytest.mark.parametrize(("method", "strategy"), [("linba", "flip_rotate"), ("rat_bptt", "none")])
def test_sets_are_evaluated_with_the_augmentation_that_they_were_made_for(
    tmp_path, dataset, monkeypatch, method, strategy
):
    settings = settings_of(method, dsa_strategy=strategy, iterations=1)
    config = methods.find(method).config(**settings)
    artefact = distill(method, dataset, config, tmp_path, progress=False, device="cpu")
    seen: list[Any] = []

    def no_training(sets, model, dataset, chosen, *rest, **options):
        seen.append(chosen)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train_networks", no_training)
    for given in ({}, {"dsa_strategy": "crop"}, {"batch": 5}):
        with pytest.raises(KeyboardInterrupt):
            evaluate(artefact, dataset, MODEL, method, 1, progress=False, **given)
    names = "" if strategy == "none" else strategy
    assert [each.strategy for each in seen] == [names, "crop", names]
    # RaT-BPTT: one image of two classes in a step of its student.
    assert [each.batch for each in seen] == [640 if method == "linba" else 2] * 2 + [5]
    if method == "rat_bptt":
        assert [each.steps(6) for each in seen] == [1002, 1002, 1000]
    else:
        assert {each.steps(6) for each in seen[:2]} == {300}


def test_the_commands(tmp_path, capsys):
    words = ["--dataset", "digits", "--model", MODEL, "--ipc", "1", "--iterations", "1", "--quiet"]
    few = {"dd": ["--distill_epochs", "2"], "linba": ["--inner_steps", "2"], "rat_bptt": []}
    for method, more in few.items():
        out = str(tmp_path / method)
        assert main(["distill", method, *words, *more, "--threads", "1", "--out", out]) == 0
    capsys.readouterr()


def test_protocols():
    from tests.test_evaluate_protocols import named

    chosen = protocol("linba", named("CIFAR10"))
    assert (chosen.epochs, chosen.batch, chosen.weight_decay, chosen.decay(150)) == (300, 640, 0, 1)
    assert (chosen.augmentation, chosen.lr, chosen.momentum) == ("none", 0.01, 0.9)
    assert protocol("linba", named("CIFAR10"), dsa_strategy="flip").strategy == "flip"
    chosen = protocol("rat_bptt", named("CIFAR10"), ipc=300)
    assert (chosen.optimiser, chosen.lr, chosen.epochs) == ("adamw", 1e-3, 334)
    assert chosen.strategy == "flip_rotate"
    assert protocol("rat_bptt", named("digits")).strategy == "rotate"
    assert protocol("dd", named("CIFAR10")).epochs == 300
