"""Expert trajectories: training against a literal loop, the file, resuming, importing, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.augment import DSA
from ddfast.cli import main
from ddfast.data import Dataset, whitened
from ddfast.evaluate.side_by_side import SideBySide
from ddfast.experts import EXPERTS, check_experts, open_experts
from ddfast.experts import train as module
from ddfast.experts.importer import import_buffers
from ddfast.experts.train import train
from ddfast.experts.training import Config, Group
from ddfast.methods import Diverged, Interrupted
from ddfast.methods.config import filled
from ddfast.random import generator

SETTINGS = {
    "model": "ConvNetD1W4",
    "num_experts": 3,
    "max_start_epoch": 2,
    "expert_epochs": 1,
    "batch_train": 5,
    "lr_teacher": 0.1,
    "dsa_strategy": "color_crop",
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    random = torch.Generator().manual_seed(5)
    labels = torch.arange(3).repeat_interleave(4)
    pixels = torch.randint(0, 200, (12, 1, 8, 8), generator=random).to(torch.uint8)
    return Dataset("toy", pixels, labels, pixels, labels, ("a", "b", "c"), (0.4,), (0.3,))


def config(**changes) -> Config:
    return Config(**{**SETTINGS, **changes})


def literal(settings: Config, dataset: Dataset, number: int) -> list[torch.Tensor]:
    """One expert as the official script trains it, in float64; its flat snapshots."""
    shape = dataset.channels, dataset.num_classes, dataset.size
    net = nets.build(settings.model, *shape, generator(0, "experts: weights", number)).double()
    parameters = list(net.parameters())
    optimiser = torch.optim.SGD(
        parameters, settings.lr_teacher, settings.mom, weight_decay=settings.l2
    )
    dsa, snapshots = DSA(settings.dsa_strategy), []
    snapshots.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    for epoch in range(settings.train_epochs):
        if settings.decay and epoch == settings.train_epochs // 2 + 1:
            optimiser.param_groups[0]["lr"] *= 0.1
        random = generator(0, "experts: augmentation", number, epoch)
        order = torch.randperm(12, generator=generator(0, "experts: order", number, epoch))
        for rows in order.split(settings.batch_train):
            x = dataset.normalised(dataset.train_images[rows], torch.float64)
            x, y = dsa(x, dsa.draw(random, (8, 8), count=len(rows))), dataset.train_labels[rows]
            g = torch.autograd.grad(cross_entropy(net(x), y), parameters)
            if settings.optimiser == "gsam":
                g = gsam(net, parameters, x, y, g, settings)
            for p, each in zip(parameters, g, strict=True):
                p.grad = each
            optimiser.step()
        snapshots.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    return snapshots


def gsam(net, parameters, x, y, g, settings):
    """The formulas of FTD, parameter by parameter."""
    old = [p.detach().clone() for p in parameters]
    norm = sum((p.abs() * q).square().sum() for p, q in zip(old, g, strict=True)).sqrt()
    if not settings.adaptive:
        norm = sum(q.square().sum() for q in g).sqrt()
    with torch.no_grad():
        for p, q, before in zip(parameters, g, old, strict=True):
            size = before.square() if settings.adaptive else 1.0
            p += settings.rho * size * q / (norm + 1e-12)
    moved = torch.autograd.grad(cross_entropy(net(x), y), parameters)
    with torch.no_grad():
        for p, before in zip(parameters, old, strict=True):
            p.copy_(before)
    a, b = (torch.cat([q.flatten() for q in each]) for each in (g, moved))
    cosine, ratio = a @ b / (a.norm() * b.norm()), a.norm() / b.norm()
    return [m - settings.alpha * (q - cosine * ratio * m) for q, m in zip(g, moved, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mom": 0.5, "l2": 0.01, "decay": True, "max_start_epoch": 3},
        {"zca": "mtt"},
        {"optimiser": "gsam", "rho": 0.2},
        {"optimiser": "gsam", "rho": 0.2, "adaptive": False, "alpha": 1.0},
    ],
)
def test_stacked_experts_are_those_of_a_literal_loop(dataset, changes):
    settings = filled(config(**changes), dataset)
    dataset = whitened(dataset, settings.zca)
    group_nets = [module.built(settings, dataset, k).double() for k in range(3)]
    group = Group(settings, dataset, [0, 1, 2], SideBySide(group_nets, stacked=True))
    found = [group.snapshots()]
    for epoch in range(settings.train_epochs):
        group.epoch(epoch, dataset.train_images, dataset.train_labels)
        found.append(group.snapshots())
    for k in range(3):
        expected = torch.stack(literal(settings, dataset, k))
        error = torch.stack([snapshot[k] for snapshot in found]) - expected
        assert error.abs().max() < 1e-12
        assert (expected[1:] - expected[:-1]).norm(dim=1).min() > 1e-3


def test_stacking_changes_rounding_only(tmp_path, dataset):
    one, many = (
        train(dataset, config(), tmp_path / str(n), at_once=n, progress=False, device="cpu")
        for n in (1, 3)
    )
    assert one.num_experts == 3 and one.epochs == 2
    np.testing.assert_allclose(one.trajectories, many.trajectories, rtol=0, atol=2e-6)


def test_the_file_is_an_ordinary_safetensors_file(tmp_path, dataset):
    experts = train(dataset, config(), tmp_path, progress=False, device="cpu")
    with safe_open(tmp_path / EXPERTS, "pt") as file:
        whole = file.get_tensor("trajectories")
        assert file.get_tensor("written").tolist() == [3, 3, 3]
    assert whole.shape == (3, 3, experts.parameters) and torch.isfinite(whole).all()
    assert torch.equal(whole[1, 2], experts.snapshot(1, 2))
    start = module.built(filled(config(), dataset), dataset, 1).parameters()
    assert torch.equal(experts.snapshot(1, 0), nn.utils.parameters_to_vector(start))
    copied = experts.snapshot(1, 0)
    copied.zero_()
    assert experts.snapshot(1, 0).any()
    for wrong in ((3, 0), (0, 3), (-1, 0)):
        with pytest.raises(IndexError, match="snapshot: got expert"):
            experts.snapshot(*wrong)


@pytest.mark.parametrize("changes", [{}, {"mom": 0.5}])
def test_interrupted_and_resumed_is_the_same_bits(tmp_path, dataset, monkeypatch, changes):
    settings = config(**changes, max_start_epoch=4)
    whole = train(dataset, settings, tmp_path / "whole", progress=False, device="cpu")
    original, calls = Group.epoch, []

    def interrupted(self, epoch, *arguments):
        calls.append(epoch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, epoch, *arguments)

    monkeypatch.setattr(module, "SECONDS_BETWEEN", -1.0)  # a save behind every epoch
    monkeypatch.setattr(Group, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, settings, tmp_path / "cut", progress=False, device="cpu")
    with pytest.raises(ValueError, match="are not trained to the end"):
        open_experts(tmp_path / "cut")
    monkeypatch.setattr(Group, "epoch", original)
    resumed = train(dataset, settings, tmp_path / "cut", progress=False, device="cpu")
    assert np.array_equal(resumed.trajectories, whole.trajectories)


def test_a_resumed_run_may_stack_otherwise(tmp_path, dataset, monkeypatch):
    original, calls = Group.epoch, []

    def interrupted(self, epoch, *arguments):
        calls.append(epoch)
        if len(calls) == 4:  # two experts of three have come to their end
            raise KeyboardInterrupt
        return original(self, epoch, *arguments)

    monkeypatch.setattr(Group, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, config(), tmp_path, at_once=2, progress=False, device="cpu")
    monkeypatch.setattr(Group, "epoch", original)
    assert train(dataset, config(), tmp_path, at_once=3, progress=False, device="cpu").epochs == 2


def test_a_signal_stops_between_two_epochs(tmp_path, dataset, monkeypatch):
    original = Group.epoch

    def stopped(self, *arguments):
        runs[0].stop = True
        return original(self, *arguments)

    runs = []
    monkeypatch.setattr(module, "signals", lambda run: (runs.append(run), nothing())[1])
    monkeypatch.setattr(Group, "epoch", stopped)
    with pytest.raises(Interrupted):
        train(dataset, config(), tmp_path, progress=False, device="cpu")


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_finished_run_is_read_and_another_is_refused(tmp_path, dataset, monkeypatch):
    train(dataset, config(), tmp_path, progress=False, device="cpu")
    monkeypatch.setattr(Group, "epoch", lambda *arguments: pytest.fail("work has begun"))
    train(dataset, config(), tmp_path, progress=False, device="cpu")
    with pytest.raises(ValueError, match="num_experts is 3 there and 4 here"):
        train(dataset, config(num_experts=4), tmp_path, progress=False, device="cpu")


def test_what_the_run_may_not_be_matched_with(tmp_path, dataset):
    experts = train(dataset, config(), tmp_path, progress=False, device="cpu")
    shape = dataset.channels, dataset.num_classes, dataset.size
    check_experts(experts, dataset, nets.build("ConvNetD1W4", *shape), "ConvNetD1W4")
    with pytest.raises(ValueError, match="model is ConvNetD1W4 there and ConvNetD1W8 here"):
        check_experts(experts, dataset, nets.build("ConvNetD1W8", *shape), "ConvNetD1W8")
    other = dataclasses.replace(dataset, train_images=dataset.train_images.flip(0))
    with pytest.raises(ValueError, match="fingerprint is"):
        check_experts(experts, other, nets.build("ConvNetD1W4", *shape), "ConvNetD1W4")
    other = dataclasses.replace(dataset, mean=(0.1,))
    with pytest.raises(ValueError, match=r"mean is \[0.4\] there and \[0.1\] here"):
        check_experts(experts, other, nets.build("ConvNetD1W4", *shape), "ConvNetD1W4")


def test_whitened_experts_belong_to_whitened_images(tmp_path, dataset):
    train(dataset, config(), tmp_path / "plain", progress=False, device="cpu")
    experts = train(dataset, config(zca="mtt"), tmp_path / "zca", progress=False, device="cpu")
    assert not torch.equal(experts.snapshot(0, 1), open_experts(tmp_path / "plain").snapshot(0, 1))
    net = nets.build("ConvNetD1W4", dataset.channels, dataset.num_classes, dataset.size)
    check_experts(experts, whitened(dataset, "mtt"), net, "ConvNetD1W4")
    with pytest.raises(ValueError, match="zca is mtt there and none here"):
        check_experts(experts, dataset, net, "ConvNetD1W4")
    with pytest.raises(ValueError, match="zca is mtt there and kip here"):
        check_experts(experts, whitened(dataset, "kip"), net, "ConvNetD1W4")
    older = dataclasses.replace(
        experts, settings={k: v for k, v in experts.settings.items() if k != "zca"}
    )
    check_experts(older, dataset, net, "ConvNetD1W4")


def test_damaged_and_foreign_files(tmp_path, dataset):
    train(dataset, config(), tmp_path / "run", progress=False, device="cpu")
    content = (tmp_path / "run" / EXPERTS).read_bytes()
    file = tmp_path / "file"
    for bad, message in (
        (content[:-4], "is cut short"),
        (b"", "holds no expert trajectories"),
        (b"PK" + content, "holds no expert trajectories"),
        (struct.pack("<Q", 2) + b"{}", "holds no expert trajectories"),
        (content.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'), "has version 9"),
    ):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            open_experts(file)
    with pytest.raises(FileNotFoundError, match="`ddfast experts` makes one"):
        open_experts(tmp_path / "nothing")


def test_refusals_before_any_work(tmp_path, dataset):
    with pytest.raises(ValueError, match="batch normalisation"):
        train(dataset, config(model="ConvNetD1W4BN"), tmp_path, progress=False)
    with pytest.raises(TypeError, match="config: got dict"):
        train(dataset, {}, tmp_path, progress=False)
    with pytest.raises(ValueError, match="strategy: got 'colour'"):
        config(dsa_strategy="colour")
    with pytest.raises(TypeError, match="decay: got 1, expected true or false"):
        config(decay=1)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_names_expert_and_epoch(tmp_path, dataset):
    with pytest.raises(Diverged, match=r"weight of expert \d is not finite in epoch \d"):
        train(dataset, config(lr_teacher=1e30), tmp_path, progress=False, device="cpu")


def test_only_the_epochs_that_are_read_are_trained(dataset):
    settings = filled(Config(), dataset)
    assert (settings.train_epochs, settings.num_experts, settings.batch_train) == (21, 100, 256)
    assert filled(Config(max_start_epoch=40, expert_epochs=3), dataset).train_epochs == 42


# --- importing ----------------------------------------------------------------------------------


def buffers(tmp_path, experts: int = 2, snapshots: int = 3) -> list:
    """Two official files; every parameter of snapshot t of expert k is full of k + t / 10."""
    net = nets.build("ConvNetD1W4", 1, 3, (8, 8))
    paths = []
    for number in range(2):
        made = [
            [
                [torch.full_like(p, number * experts + k + t / 10) for p in net.parameters()]
                for t in range(snapshots)
            ]
            for k in range(experts)
        ]
        paths.append(tmp_path / f"replay_buffer_{number}.pt")
        torch.save(made, paths[-1])
    return paths


def test_official_buffers_are_imported(tmp_path, dataset):
    experts = import_buffers(buffers(tmp_path), dataset, "ConvNetD1W4", tmp_path / "out")
    assert (experts.num_experts, experts.epochs) == (4, 2)
    for k in range(4):
        for t in range(3):
            assert torch.equal(
                experts.snapshot(k, t), torch.full((experts.parameters,), k + t / 10)
            )
    with pytest.raises(ValueError, match="holds experts already"):
        import_buffers(buffers(tmp_path), dataset, "ConvNetD1W4", tmp_path / "out")
    assert open_experts(tmp_path / "out").settings["imported"]["files"][0] == "replay_buffer_0.pt"


def test_buffers_that_cannot_be_used(tmp_path, dataset):
    paths = buffers(tmp_path)
    with pytest.raises(ValueError, match="parameters of shapes"):
        import_buffers(paths, dataset, "ConvNetD1W8", tmp_path / "out")
    same = [[[p.clone() for p in nets.build("ConvNetD1W4", 1, 3, (8, 8)).parameters()]] * 3]
    torch.save([[[p.detach() for p in s] for s in e] for e in same], tmp_path / "same.pt")
    with pytest.raises(ValueError, match=r"all snapshots of expert 0 .* are the same"):
        import_buffers([tmp_path / "same.pt"], dataset, "ConvNetD1W4", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no"):
        import_buffers([tmp_path / "nothing.pt"], dataset, "ConvNetD1W4", tmp_path / "out")
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        import_buffers([tmp_path / "evil.pt"], dataset, "ConvNetD1W4", tmp_path / "out")
    with pytest.raises(ValueError, match="files: is empty"):
        import_buffers([], dataset, "ConvNetD1W4", tmp_path / "out")


# --- the command --------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    words = ["experts", "--dataset", "digits", "--model", "ConvNetD1W4", "--num_experts", "2"]
    words += ["--max_start_epoch", "1", "--expert_epochs", "1", "--quiet", "--threads", "1"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert "2 experts of 1 epochs" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "a" / "config.json").read_text())
    assert recorded["method"] == "experts" and recorded["config"]["train_epochs"] == 1
    shutil.rmtree(tmp_path / "a")
    assert main(words) == 2
    assert "required and missing: --out" in capsys.readouterr().err


def test_the_command_imports(tmp_path, capsys):
    net = nets.build("ConvNetD1W4", 1, 10, (8, 8))
    made = [[[torch.full_like(p, t) for p in net.parameters()] for t in range(2)]]
    torch.save(made, tmp_path / "replay_buffer_0.pt")
    words = ["experts", "--dataset", "digits", "--model", "ConvNetD1W4", "--out", str(tmp_path)]
    assert main([*words, "--imported", str(tmp_path / "replay_buffer_0.pt")]) == 0
    assert "1 experts of 1 epochs" in capsys.readouterr().out
