"""MTT, TESLA, FTD and DATM against a literal loop through the whole student, in float64."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.cli import main
from ddfast.distill import distill, loop
from ddfast.experts import open_experts
from ddfast.experts.train import Config as ExpertConfig
from ddfast.experts.train import train
from ddfast.methods import Diverged, datm, ftd, mtt, tesla, trajectory_matching

MODEL = "ConvNetD1W4"
SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "model": MODEL,
    "syn_steps": 4,
    "expert_epochs": 1,
    "max_start_epoch": 3,
    "batch_syn": 4,  # of six images: a batch of two comes first
    "lr_img": 5.0,
    "lr_lr": 1e-4,
    "lr_teacher": 0.05,
    "iterations": 3,
}
ALL = ("mtt", "tesla", "ftd", "datm")


@pytest.fixture(scope="module")
def dataset():
    from tests.methods.conftest import _dataset

    return _dataset([5, 6, 7])


@pytest.fixture(scope="module")
def experts(dataset, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("experts")
    few = {"num_experts": 3, "max_start_epoch": 3, "expert_epochs": 1, "batch_train": 6}
    train(
        dataset,
        ExpertConfig(model=MODEL, lr_teacher=0.1, **few),
        folder,
        progress=False,
        device="cpu",
    )
    return str(folder)


def settings_of(method: str, folder: str, **changes) -> dict[str, Any]:
    found = {**SETTINGS, "experts": folder, **changes}
    if method == "datm":
        found = {"lr_y": 3.0, "current_max_start_epoch": 2, "expansion_end_epoch": 4, **found}
        found.setdefault("threshold", 1e9)
    return found


def literal(run, method: str, iterations: int) -> tuple[dict[str, Tensor], list[float]]:
    """The published loop: all steps in one graph, torch's optimisers."""
    config = run.config
    experts = open_experts(config.experts)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in run.tensors.items()}
    raw = config.lr_form == "raw"
    scale = 1.0 if raw else 1 / config.lr_teacher**2
    optimisers = [
        torch.optim.SGD([leaves["images"]], config.lr_img, 0.5),
        torch.optim.SGD([leaves["lr"]], config.lr_lr * scale, 0.5),
    ]
    if method == "datm":
        optimisers.append(torch.optim.SGD([leaves["label_logits"]], config.lr_y, 0.9))
    named = dict(run.net.named_parameters())
    losses, mean = [], leaves["images"].detach().clone()
    for iteration in range(iterations):
        run.iteration = iteration
        drawn = trajectory_matching.draw(run, experts, len(leaves["images"]))
        lr = leaves["lr"] if raw else leaves["lr"].exp()
        theta = drawn.start.clone().requires_grad_()
        for step, rows in enumerate(drawn.batches):
            at = theta.detach().requires_grad_() if method == "tesla" else theta
            parts = at.split([p.numel() for p in named.values()])
            weights = {n: p.view(named[n].shape) for n, p in zip(named, parts, strict=True)}
            x = run.augment(leaves["images"][rows], drawn.draws[step])
            logits = torch.func.functional_call(run.net, weights, (x,))
            if method == "datm":
                soft = leaves["label_logits"][rows].softmax(1)
                loss = -(soft * F.log_softmax(logits, 1)).sum(1).mean()
            else:
                loss = F.cross_entropy(logits, run.labels[rows])
            (g,) = torch.autograd.grad(loss, at, create_graph=True)
            theta = theta - lr * g
        loss = (theta - drawn.target).square().sum() / (drawn.start - drawn.target).square().sum()
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        if method == "tesla":
            leaves["images"].grad *= 0.5
        for optimiser in optimisers:
            optimiser.step()
        mean = 0.9 * mean + 0.1 * leaves["images"].detach()
        losses.append(loss.item())
    run.iteration = 0
    found = {name: leaf.detach() for name, leaf in leaves.items()}
    return {**found, "mean": mean}, losses


@pytest.mark.parametrize("lr_form", ["log", "raw"])
@pytest.mark.parametrize("method", ALL)
def test_steps_are_those_of_the_literal_loop(
    method, lr_form, make_run, dataset, experts, monkeypatch
):
    # Un-distilled images lead astray: what the guard does is another test's business.
    monkeypatch.setattr(trajectory_matching, "MEAN_DECAY", 0.0)
    changes = {"ftd": {"ema_decay": 0.9}, "tesla": {"half_image_gradient": True}}.get(method, {})
    settings = settings_of(method, experts, lr_form=lr_form, **changes)
    settings["threshold"] = 1e9
    run = make_run(method, dataset, **settings)
    expected, losses = literal(run, method, 3)
    begin = run.images.detach().clone()
    for loss in losses:
        found = methods.find(method).step(run)
        assert found.shape == (3,) and found.tolist() == pytest.approx([loss] * 3, rel=1e-10)
        run.iteration += 1
    for name, tensor in run.tensors.items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-9, atol=1e-11)
    assert (run.images.detach() - begin).flatten(1).norm(dim=1).min() > 1e-4
    if method == "ftd":
        torch.testing.assert_close(run.state["ema.images"], expected["mean"], rtol=1e-9, atol=1e-11)
        made = run.config.distilled(run.tensors, run.state)
        assert torch.equal(made["images"], run.state["ema.images"].float())


def test_the_first_step_of_the_learning_rate_is_that_of_the_raw_form(make_run, dataset, experts):
    found = []
    for form in ("raw", "log"):
        run = make_run("mtt", dataset, **settings_of("mtt", experts, lr_form=form, lr_lr=1e-7))
        mtt.step(run)
        found.append(run.config.distilled(run.tensors, run.state)["lr"] - 0.05)
    assert found[0] != 0 and found[1] == pytest.approx(found[0], rel=1e-3)


def test_graph_gives_the_same_step(make_run, dataset, experts):
    results = []
    for adjoint in ("exact", "graph"):
        run = make_run("mtt", dataset, **settings_of("mtt", experts, adjoint=adjoint))
        mtt.step(run)
        results.append(run.images.detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_minibatches_come_from_the_end_of_permutations(make_run, dataset, experts):
    run = make_run("mtt", dataset, **settings_of("mtt", experts, syn_steps=5))
    drawn = trajectory_matching.draw(run, open_experts(experts), 6)
    assert [len(rows) for rows in drawn.batches] == [2, 4, 2, 4, 2]
    for first in (0, 2):
        together = torch.cat(drawn.batches[first : first + 2])
        assert sorted(together.tolist()) == list(range(6))
    assert all(draw.shape[1] == len(r) for draw, r in zip(drawn.draws, drawn.batches, strict=True))


def test_any_parametrisation(make_run, dataset, experts):
    for name in ("multi_formation", "hallucinators", "bases"):
        changes = {"parametrisation": name, "lr_img": 0.1}
        changes |= {"shared": 2} if name == "bases" else {}
        run = make_run("mtt", dataset, **settings_of("mtt", experts, **changes))
        before = {k: t.detach().clone() for k, t in run.tensors.items()}
        mtt.step(run)
        assert all(not torch.equal(before[k], t.detach()) for k, t in run.tensors.items()), name


# --- labels -------------------------------------------------------------------------------------


def test_teacher_labels_are_of_the_images_drawn(make_run, dataset, experts):
    changes = {"teacher_label": True, "syn_steps": 1, "batch_syn": 4}
    run = make_run("tesla", dataset, **settings_of("tesla", experts, **changes))
    made = run.decoded(0, 3)
    drawn = trajectory_matching.draw(run, open_experts(experts), 6)
    labels, kind = tesla.teacher_labels(run, made, drawn, {})
    rows = drawn.batches[0]
    assert kind == "probabilities" and len(rows) == 2
    nn.utils.vector_to_parameters(drawn.target, run.net.parameters())
    expected = run.net(run.images[rows]).softmax(1).detach()
    torch.testing.assert_close(labels[rows], expected, rtol=1e-12, atol=0)
    others = torch.ones(6, dtype=torch.bool)
    others[rows] = False
    assert not labels[others].any()
    assert "soft_labels" not in run.state
    run.iteration = 2  # the last
    tesla.step(run)
    assert torch.allclose(run.state["soft_labels"].sum(1), torch.ones(6))


def test_datm_begins_with_what_experts_have_right(dataset, experts):
    config = methods.resolve(datm.Config(**settings_of("datm", experts)), dataset)
    tensors, labels = config.starting_set(dataset, torch.Generator().manual_seed(0))
    assert tensors["label_logits"].shape == (6, 3) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    opened = open_experts(experts)
    net = methods.start(config, dataset, 1 << 30).net
    right = torch.zeros(6, 3)
    count = torch.zeros(6, 1)
    for k in range(3):
        nn.utils.vector_to_parameters(opened.snapshot(k, 3), net.parameters())
        logits = net(tensors["images"]).detach()
        good = (logits.argmax(1) == labels).unsqueeze(1)
        right += logits * good
        count += good
    known = count[:, 0] > 0
    assert known.any()
    torch.testing.assert_close(tensors["label_logits"][known], (right / count)[known])
    assert (tensors["label_logits"].argmax(1) == labels).all()
    made = config.distilled(tensors, {})
    torch.testing.assert_close(made["soft_labels"].sum(1), torch.ones(6))


def test_datm_window_grows(dataset, experts):
    config = datm.Config(
        **{**SETTINGS, "min_start_epoch": 1, "current_max_start_epoch": 4, "max_start_epoch": 10,
           "expansion_end_epoch": 100, "lr_y": 1.0}
    )  # fmt: skip
    ends = [config.start_epochs(i) for i in (0, 16, 17, 50, 99, 100, 5000)]
    assert ends == [(1, 4), (1, 4), (1, 5), (1, 7), (1, 9), (1, 10), (1, 10)]


# --- what goes wrong ------------------------------------------------------------------------------


def test_an_expert_that_stood_still_is_left_out(make_run, dataset, experts, monkeypatch):
    run, said = make_run("mtt", dataset, **settings_of("mtt", experts)), []
    run.say = said.append
    original = trajectory_matching.draw
    monkeypatch.setattr(
        trajectory_matching,
        "draw",
        lambda *a: (lambda d: d._replace(target=d.start.clone()))(original(*a)),
    )
    before = run.images.detach().clone()
    assert mtt.step(run).tolist() == [1, 1, 1]
    assert torch.equal(run.images, before) and "did not move" in said[0]


def test_a_loss_beyond_its_mean_goes_back_to_the_last_good_state(
    make_run, dataset, experts, monkeypatch
):
    run, said = make_run("mtt", dataset, **settings_of("mtt", experts)), []
    run.say = said.append
    before = {name: t.detach().clone() for name, t in run.tensors.items()}
    mtt.step(run)
    first = run.state["mean_loss"]
    run.iteration = 1
    loss = torch.tensor(2.5, dtype=torch.float64) * max(1.0, first.item())
    nothing = {name: torch.ones_like(t) for name, t in run.tensors.items()}
    trajectory_matching.settle(run, nothing, loss)
    assert all(torch.equal(t.detach(), before[name]) for name, t in run.tensors.items())
    assert "iteration 1" in said[0] and "went back" in said[0]
    assert run.state["roll_backs"] == 1
    trajectory_matching.settle(run, run.no_gradients(), first)
    assert run.state["roll_backs"] == 0
    for _ in range(trajectory_matching.MOST_ROLL_BACKS):
        trajectory_matching.settle(run, nothing, loss * math.nan)
    with pytest.raises(Diverged, match="after 20 roll-backs in a row; a smaller lr_teacher"):
        trajectory_matching.settle(run, nothing, loss * math.nan)


def test_without_a_good_state_the_run_ends(make_run, dataset, experts):
    run = make_run("mtt", dataset, **settings_of("mtt", experts, lr_teacher=1e30))
    with pytest.raises(Diverged, match="iteration 0; a smaller lr_teacher"):
        mtt.step(run)


def test_a_raw_learning_rate_below_zero_is_rolled_back(make_run, dataset, experts):
    run = make_run("mtt", dataset, **settings_of("mtt", experts, lr_form="raw"))
    mtt.step(run)
    run.iteration, said = 1, []
    run.say = said.append
    wild = run.no_gradients() | {"lr": torch.tensor(1e9, dtype=torch.float64)}
    trajectory_matching.settle(run, wild, run.state["mean_loss"])
    assert "learning rate is not above 0" in said[0]
    assert run.config.student_lr(run.tensors) > 0


def test_above_the_threshold_nothing_changes(make_run, dataset, experts):
    run = make_run("datm", dataset, **settings_of("datm", experts, threshold=1e-9))
    before = {name: t.detach().clone() for name, t in run.tensors.items()}
    assert datm.step(run).min() > 1e-9
    assert all(torch.equal(t.detach(), before[name]) for name, t in run.tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "experts: missing; make some with `ddfast experts --dataset"),
        (
            {"max_start_epoch": 9},
            "has 3 epochs, and max_start_epoch 9 with expert_epochs 1 needs 9",
        ),
        ({"model": "ConvNetD1W8"}, "model is ConvNetD1W4 there and ConvNetD1W8 here"),
        ({"model": "ConvNetD1W4BN"}, "batch normalisation"),
        ({"min_start_epoch": 3}, "min_start_epoch: got 3, expected less than max_start_epoch"),
    ],
)
def test_refusals_before_the_first_step(make_run, dataset, experts, changes, message):
    with pytest.raises(ValueError, match=message):
        make_run("mtt", dataset, **settings_of("mtt", experts, **changes))


def test_datm_refuses_labels_of_decoded_images():
    with pytest.raises(ValueError, match="DATM's labels belong to images"):
        datm.Config(ipc=1, parametrisation="bases")


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_interrupted_and_resumed_is_the_same_bits(method, tmp_path, dataset, experts, monkeypatch):
    settings = settings_of(method, experts, iterations=6)
    config = methods.find(method).config(**settings)
    whole = distill(method, dataset, config, tmp_path / "whole", progress=False, device="cpu")
    original, calls = loop._Loop.iterate, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(loop._Loop, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(method, dataset, config, tmp_path / "cut", progress=False, device="cpu")
    monkeypatch.setattr(loop._Loop, "iterate", original)
    resumed = distill(method, dataset, config, tmp_path / "cut", progress=False, device="cpu")
    assert torch.equal(resumed.images, whole.images) and resumed.lr == whole.lr
    if method == "datm":
        assert torch.equal(resumed.soft_labels, whole.soft_labels)


def test_ftd_says_when_experts_are_not_flat(make_run, dataset, experts):
    run = make_run("ftd", dataset, **settings_of("ftd", experts))
    assert "--optimiser gsam" in next(iter(ftd.prepare(run)))


def test_the_command_from_experts_to_a_report(tmp_path, capsys):
    words = ["--dataset", "digits", "--model", MODEL]
    few = ["--max_start_epoch", "1", "--expert_epochs", "1", "--quiet", "--threads", "1"]
    out = str(tmp_path / "experts")
    assert main(["experts", *words, *few, "--num_experts", "2", "--out", out]) == 0
    run = ["distill", "mtt", *words, *few, "--buffer_path", out, "--ipc", "1", "--iterations", "2"]
    assert main([*run, "--syn_steps", "2", "--out", str(tmp_path / "run")]) == 0
    artefact = Artefact.load(tmp_path / "run" / "distilled.safetensors")
    assert artefact.lr == pytest.approx(0.02, rel=0.5)
    lines = [json.loads(s) for s in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["loss"] > 0 for line in lines)
    words = ["evaluate", str(tmp_path / "run"), "--epochs", "2", "--quiet", "--num_eval", "1"]
    assert main([*words, "--selections", "1", "--threads", "1"]) == 0
    assert "mtt, 3 epochs" in capsys.readouterr().out


def test_published_settings():
    from tests.test_evaluate_protocols import named

    cifar = methods.resolve(mtt.Config(ipc=10), named("CIFAR10"))
    assert (cifar.syn_steps, cifar.expert_epochs, cifar.max_start_epoch) == (30, 2, 20)
    assert (cifar.lr_img, cifar.lr_lr, cifar.lr_teacher) == (100, 1e-5, 1e-3)
    assert methods.resolve(mtt.Config(ipc=20), named("CIFAR10")).max_start_epoch == 20
    assert methods.resolve(mtt.Config(ipc=1), named("my own")).syn_steps == 50
    found = methods.resolve(tesla.Config(ipc=1), named("CIFAR10"))
    assert (found.max_start_epoch, found.lr_img, found.adjoint) == (5, 1000, "frozen")
    assert found.half_image_gradient and not found.teacher_label
    assert methods.resolve(ftd.Config(ipc=50), named("CIFAR10")).ema_decay == 0.999
    found = methods.resolve(datm.Config(ipc=1000), named("CIFAR10"))
    assert (found.syn_steps, found.min_start_epoch, found.lr_y) == (100, 40, 10)
