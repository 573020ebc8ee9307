"""MTT, TESLA, FTD and DATM against a loop written out by hand, with autograd through all steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import methods, nets
from ddfast.artefact import Artefact
from ddfast.cli import main
from ddfast.data import Dataset, generated, whitened
from ddfast.distill import distill, unfinished
from ddfast.evaluate import evaluate
from ddfast.experts import open_experts
from ddfast.methods import Run, rollback, trajectory_matching
from ddfast.random import generator

MODEL = "ConvNetD1W4"
SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": MODEL,
    "syn_steps": 5,
    "expert_epochs": 2,
    "max_start_epoch": 3,
    "batch_syn": 4,
    "lr_teacher": 0.1,
    "lr_img": 20.0,
    "lr_lr": 1e-3,
    "iterations": 4,
    "threshold": 1e6,
}
OWN: dict[str, dict[str, Any]] = {
    "mtt": {},
    "tesla": {"teacher_label": False},
    "ftd": {"ema_decay": 0.7},
    "datm": {
        "lr_y": 3.0,
        "min_start_epoch": 1,
        "current_max_start_epoch": 2,
        "expansion_end_epoch": 2,
        "predicted_correctly": False,
    },
}


def settings_of(method: str, **changes: Any) -> dict[str, Any]:
    return SETTINGS | OWN[method] | changes


def literal(dataset: Dataset, run: Run, iterations: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The published algorithm: what is learned, the average of FTD, and the losses."""
    config: Any = run.config
    seed, method = config.seed, type(config).__module__.rsplit(".", 1)[1]
    experts = open_experts(config.experts)
    net = nets.build(MODEL, dataset.channels, dataset.num_classes, dataset.size).double()
    shapes = [(name, p.shape) for name, p in net.named_parameters()]
    learned = {n: t.detach().clone().requires_grad_() for n, t in run.tensors.items()}
    images, lr = learned["images"], learned["lr_parameter"]
    scale = config.lr_teacher / 4
    forms = {"raw": lambda r: r, "log": torch.exp}
    forms["softplus"] = lambda r: scale * (1 + (r / scale).exp()).log()
    optimisers = [
        torch.optim.SGD([images], config.lr_img, 0.5),
        torch.optim.SGD([lr], config.lr_lr / (0.01 if config.lr_form == "log" else 1), 0.5),
    ]
    if method == "datm":
        optimisers.append(torch.optim.SGD([learned["label_logits"]], config.lr_y, 0.9))
    average, history = images.detach().clone(), []
    for it in range(iterations):
        order = torch.randperm(
            experts.num_experts, generator=generator(seed, "experts", it // experts.num_experts)
        )
        number, first, end = int(order[it % experts.num_experts]), 0, config.max_start_epoch
        if method == "datm":
            grown = config.current_max_start_epoch + math.floor(
                (config.max_start_epoch - config.current_max_start_epoch)
                * it
                / config.expansion_end_epoch
            )
            first, end = config.min_start_epoch, min(config.max_start_epoch, grown)
        t = int(torch.randint(first, end, (), generator=generator(seed, "start epoch", it)))
        start = experts.snapshot(number, t).double()
        target = experts.snapshot(number, t + config.expert_epochs).double()
        random, chunks = generator(seed, "minibatches", it), []
        theta, total = start.clone().requires_grad_(), torch.zeros_like(start)
        step_size = forms[config.lr_form](lr)
        for step in range(config.syn_steps):
            if not chunks:
                indices = torch.randperm(len(images), generator=random)
                chunks = list(torch.split(indices, config.batch_syn or len(images)))
            rows = chunks.pop()
            draw = run.augment.draw(
                generator(seed, "augmentation", it, step), dataset.size, count=len(rows)
            )
            x, y = run.augment(images[rows], draw), run.labels[rows]
            here = theta.detach().requires_grad_() if config.adjoint == "frozen" else theta
            parts = here.split([s.numel() for _, s in shapes])
            weights = {n: p.view(s) for (n, s), p in zip(shapes, parts, strict=True)}
            z = torch.func.functional_call(net, weights, (x,))
            if method == "datm":
                soft = learned["label_logits"][rows].softmax(1)
                loss = -(soft * z.log_softmax(1)).sum(1).mean()
            elif method == "tesla" and config.teacher_label:
                parts = target.split([s.numel() for _, s in shapes])
                weights = {n: p.view(s) for (n, s), p in zip(shapes, parts, strict=True)}
                given = torch.func.functional_call(net, weights, (images.detach()[rows],))
                loss = -(given.softmax(1) * z.log_softmax(1)).sum(1).mean()
            else:
                loss = F.cross_entropy(z, y)
            (g,) = torch.autograd.grad(loss, here, create_graph=True)
            total = total + g
            theta = theta - step_size * g
        if config.adjoint == "frozen":
            theta = start - step_size * total
        distance = ((theta - target) ** 2).sum() / ((start - target) ** 2).sum()
        for each in optimisers:
            each.zero_grad()
        distance.backward()
        if getattr(config, "half_image_gradient", False):
            images.grad /= 2
        for each in optimisers:
            each.step()
        if method == "ftd":
            average = config.ema_decay * average + (1 - config.ema_decay) * images.detach()
        history.append(distance.detach())
    found = {n: t.detach() for n, t in learned.items()}
    return {**found, "average": average}, history


def go(run: Run, method: str, iterations: int) -> list[Tensor]:
    """The losses of some iterations, none of which may be rolled back."""
    run.say, history = pytest.fail, []
    for _ in range(iterations):
        history.append(methods.find(method).step(run))
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mtt", {}),
        ("mtt", {"adjoint": "graph", "lr_form": "raw", "batch_syn": 0}),
        ("mtt", {"lr_form": "log"}),
        ("mtt", {"adjoint": "frozen", "history": "checkpoints", "dsa_strategy": "none"}),
        ("tesla", {}),
        ("tesla", {"teacher_label": True}),
        ("tesla", {"teacher_label": True, "adjoint": "exact", "half_image_gradient": True}),
        ("tesla", {"half_image_gradient": True, "batch_syn": 100}),
        ("ftd", {}),
        ("datm", {}),
        ("datm", {"adjoint": "frozen", "history": "host"}),
    ],
)
def test_it_equals_the_literal_loop(make_dataset, make_run, make_experts, method, changes) -> None:
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(dataset, MODEL))
    run = make_run(method, dataset, experts=experts, **settings_of(method, **changes))
    if method == "datm":
        assert list(methods.find("datm").prepare(run))
    start = {name: tensor.detach().clone() for name, tensor in run.tensors.items()}
    expected, losses = literal(dataset, run, 4)
    found = go(run, method, 4)
    torch.testing.assert_close(
        torch.stack(found)[:, 0], torch.stack(losses), rtol=1e-10, atol=1e-10
    )
    for name, tensor in run.tensors.items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-9, atol=1e-10)
        assert (tensor.detach() - start[name]).abs().max() > 1e-4  # it moved
    moved = (run.images.detach() - start["images"]).abs().amax((1, 2, 3))
    assert moved.min() > 1e-3
    if method == "ftd":
        average = run.state["average.images"]
        torch.testing.assert_close(average, expected["average"], rtol=1e-9, atol=1e-10)
        made = run.config.distilled(run.tensors, run.state)
        assert torch.equal(made["images"], average.float())


@pytest.mark.parametrize("kind", ["multi_formation", "hallucinators", "bases"])
@pytest.mark.parametrize("method", OWN)
def test_gradients_reach_what_images_are_made_of(
    make_dataset, make_run, make_experts, method, kind
) -> None:
    """Against the whole graph; labels of rows that are decoded to several images included."""
    dataset = make_dataset([12, 9, 15])
    experts = str(make_experts(dataset, MODEL))
    extra = {"teacher_label": True, "adjoint": "exact"} if method == "tesla" else {}
    changes = {"parametrisation": kind, "experts": experts, "lr_img": 0.3, **extra}
    runs = [
        make_run(method, dataset, **settings_of(method, **changes | {"adjoint": adjoint}))
        for adjoint in ("exact", "graph")
    ]
    for run in runs:
        list(methods.find(method).prepare(run))
        before = {name: tensor.detach().clone() for name, tensor in run.tensors.items()}
        go(run, method, 2)
    for name, tensor in runs[0].tensors.items():
        torch.testing.assert_close(tensor, runs[1].tensors[name], rtol=1e-9, atol=1e-11)
        assert not torch.equal(tensor.detach(), before[name]), name


def test_minibatches_are_taken_from_the_end(make_dataset, make_run, make_experts) -> None:
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(dataset, MODEL))
    run = make_run("mtt", dataset, experts=experts, **settings_of("mtt"))
    batches = trajectory_matching.minibatches(run, 7)
    assert [len(batch) for batch in batches] == [3, 4, 3, 4, 3]
    for first in (0, 2):
        both = torch.cat(batches[first : first + 2])
        assert sorted(both.tolist()) == list(range(7))
    run.iteration = 1
    assert not torch.equal(trajectory_matching.minibatches(run, 7)[0], batches[0])
    for size in (7, 20, 0):
        settings = settings_of("mtt", batch_syn=size)
        run = make_run("mtt", dataset, experts=experts, **settings)
        assert [len(batch) for batch in trajectory_matching.minibatches(run, 7)] == [7] * 5


def test_every_expert_comes_before_any_comes_again(make_dataset, make_run, make_experts) -> None:
    dataset = make_dataset([7, 6, 9])
    folder = make_experts(dataset, MODEL, experts=4)
    run = make_run("mtt", dataset, experts=str(folder), **settings_of("mtt", max_start_epoch=1))
    experts, orders = open_experts(folder), []
    for run.iteration in range(12):
        part = trajectory_matching.segment(run)
        orders += [k for k in range(4) if torch.equal(experts.snapshot(k, 0).double(), part.start)]
    assert all(sorted(orders[i : i + 4]) == [0, 1, 2, 3] for i in (0, 4, 8))
    assert len({tuple(orders[i : i + 4]) for i in (0, 4, 8)}) > 1


def test_published_lr_lr_keep_their_meaning(make_dataset, make_run, make_experts) -> None:
    """The first step moves lr by as much in every form, and later ones in the default, too."""
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(dataset, MODEL))
    moves = {}
    for form in ("raw", "log", "softplus"):
        run = make_run(
            "mtt", dataset, experts=experts, **settings_of("mtt", lr_form=form, lr_lr=1e-7)
        )
        assert run.config.learning_rate(run.tensors).item() == pytest.approx(0.1, rel=1e-12)
        go(run, "mtt", 1)
        moves[form] = run.config.learning_rate(run.tensors).item() - 0.1
    assert abs(moves["raw"]) > 1e-9
    assert moves["log"] == pytest.approx(moves["raw"], rel=1e-4)
    slope = 1 - math.exp(-4)
    assert moves["softplus"] == pytest.approx(slope**2 * moves["raw"], rel=1e-4)
    far = {"lr_parameter": torch.tensor(0.7, dtype=torch.float64, requires_grad=True)}
    lr = run.config.learning_rate(far)
    assert lr.item() == pytest.approx(0.7, rel=1e-9)
    assert torch.autograd.grad(lr, far["lr_parameter"])[0].item() == pytest.approx(1, rel=1e-9)
    far["lr_parameter"] = torch.tensor(-0.3, dtype=torch.float64)
    assert 0 < run.config.learning_rate(far).item() < 1e-6


@pytest.mark.parametrize("method", OWN)
def test_a_run_resumes_with_the_same_bits(
    make_dataset, make_experts, tmp_path, monkeypatch, method, same_when_resumed
) -> None:
    """With roll-backs before and after the interruptions."""
    dataset = generated(classes=3, size=8, train_per_class=6, test_per_class=3)
    experts = str(make_experts(dataset, MODEL))
    config = methods.find(method).config(
        **settings_of(method, experts=experts, iterations=9)
        | ({"teacher_label": True} if method == "tesla" else {})
    )
    gradients, count, said = trajectory_matching.gradients, rollback._count, []

    def broken(run: Run, *arguments: Any) -> Any:
        losses, found = gradients(run, *arguments)
        if run.iteration in (1, 3, 5):
            losses = losses + math.inf
        return losses, found

    def learns_a_rate(folder) -> None:
        assert unfinished(folder)[0].lr is not None

    monkeypatch.setattr(trajectory_matching, "gradients", broken)
    monkeypatch.setattr(rollback, "_count", lambda *a: said.append(count(*a)))
    again = same_when_resumed(method, dataset, config, 3, 7, between=learns_a_rate)
    assert len(said) == 2 * 3
    if method in ("tesla", "datm"):
        assert torch.allclose(again.soft_labels.sum(1), torch.ones(6))
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 9
    assert Artefact.load(tmp_path / "cut" / "distilled.safetensors").lr == again.lr


def test_the_experts_and_not_their_place_make_the_run(
    make_dataset, make_experts, tmp_path, monkeypatch
) -> None:
    dataset = make_dataset([7, 6, 9])
    a, b = (make_experts(dataset, MODEL, name=name) for name in "ab")
    c = make_experts(dataset, MODEL, pace=0.03, name="c")

    def once(folder):
        config = methods.find("mtt").config(**settings_of("mtt", experts=str(folder)))
        return distill("mtt", dataset, config, tmp_path / "run", progress=False)

    first = once(a)
    assert torch.equal(once(b).images, first.images)
    with pytest.raises(ValueError, match="experts_fingerprint is "):
        once(c)
    assert "experts" not in first.config and len(first.config["experts_fingerprint"]) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, r"experts: missing; `ddfast experts --dataset small --model Conv"),
        ({"max_start_epoch": 4}, r"has 4 epochs, and max_start_epoch 4 with .* needs 5; `ddfast"),
        ({"expert_epochs": 3}, r"needs 5; .*--expert_epochs 3 --out FOLDER` makes some of as many"),
        ({"model": "ConvNetD1W5"}, "experts: .* model is ConvNetD1W4 there and ConvNetD1W5 here"),
        ({"model": "ConvNetD1W4BN"}, "batch normalisation, whose running statistics"),
        ({"experts_fingerprint": "0123"}, "experts_fingerprint: got 0123, and that of"),
        ({"lr_teacher": 0.0}, "lr_teacher: got 0.0, expected more than 0"),
        ({"batch_syn": -1}, "batch_syn: got -1"),
        ({"adjoint": "both"}, "adjoint: got 'both'"),
    ],
)
@pytest.mark.parametrize("method", ["mtt", "datm"])
def test_what_cannot_work_is_refused(
    make_dataset, make_run, make_experts, method, changes, message
) -> None:
    dataset = make_dataset([7, 6, 9])
    settings = settings_of(method, experts=str(make_experts(dataset, MODEL)))
    with pytest.raises(ValueError, match=message):
        make_run(method, dataset, **settings | changes)


def test_experts_of_other_images_are_refused(make_dataset, make_run, make_experts) -> None:
    experts = str(make_experts(make_dataset([7, 6, 8]), MODEL))
    with pytest.raises(ValueError, match=r"experts: .* fingerprint is"):
        make_run("mtt", make_dataset([7, 6, 9]), **settings_of("mtt", experts=experts))
    with pytest.raises(FileNotFoundError, match="no file"):
        make_run("mtt", make_dataset([7, 6, 9]), **settings_of("mtt", experts="nowhere"))


def test_images_are_whitened_as_the_experts_were(make_dataset, make_run, make_experts) -> None:
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(whitened(dataset, "mtt"), MODEL))
    run = make_run("mtt", dataset, **settings_of("mtt", experts=experts))
    assert run.config.zca == "mtt" and run.dataset.whitening.mode == "mtt"
    real = run.dataset.normalised(dataset.train_images, torch.float64)
    for image in run.images.detach():  # real images, whitened
        assert (image - real).abs().amax((1, 2, 3)).min() < 1e-6
    x, _ = literal(dataset, run, 2)
    go(run, "mtt", 2)
    torch.testing.assert_close(run.images.detach(), x["images"], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="zca is mtt there and none here"):
        make_run("mtt", dataset, **settings_of("mtt", experts=experts, zca="none"))


@pytest.mark.parametrize("method", OWN)
def test_from_the_command_line(tmp_path, capsys, method) -> None:
    """Experts, a few iterations and the evaluation, all with published settings but for speed."""
    out = str(tmp_path / "experts")
    train = ["--model", MODEL, "--num_experts", "2", "--max_start_epoch", "2"]
    words = ["experts", "--dataset", "digits", *train, "--expert_epochs", "1", "--threads", "1"]
    assert main([*words, "--batch_train", "256", "--out", out, "--quiet"]) == 0
    flags = ["--dataset", "digits", "--ipc", "1", "--model", MODEL, "--buffer_path", out]
    flags += ["--max_start_epoch", "2", "--expert_epochs", "1", "--syn_steps", "3"]
    flags += ["--iterations", "3", "--threads", "1", "--quiet"]
    flags += ["--min_start_epoch", "0", "--current_max_start_epoch", "1"] * (method == "datm")
    run = str(tmp_path / "run")
    assert main(["distill", method, *flags, "--out", run]) == 0
    artefact = Artefact.load(tmp_path / "run" / "distilled.safetensors")
    assert artefact.lr > 0 and (artefact.soft_labels is not None) == (method == "datm")
    from ddfast.data import load

    report = evaluate(
        artefact, load("digits"), MODEL, methods.find(method).protocol,
        num_eval=1, epochs=2, baselines=False, progress=False,
    )  # fmt: skip
    assert all(row.protocol.lr == artefact.lr for row in report.rows)
    capsys.readouterr()
