"""Training: what a run leaves behind, exact resume, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddfast.data import Dataset, generated
from ddfast.distill import folder
from ddfast.experts import Experts, check_experts, open_experts
from ddfast.experts import train as module
from ddfast.experts.file import EXPERTS, Writable, unfinished
from ddfast.experts.train import Config
from ddfast.experts.training import Group, built
from ddfast.methods import Diverged

CPU = torch.device("cpu")


def train(dataset: Dataset, config: Config, out: Path, **options: Any) -> Experts:
    return module.train(dataset, config, out, **{"progress": False, "device": "cpu", **options})


def contents(out: Path) -> bytes:
    return (out / EXPERTS).read_bytes()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, epochs: int, error: BaseException) -> None:
    """After so many epochs of groups."""
    epoch, calls = Group.epoch, []

    def interrupted(self: Group, number: int, stopped: Callable[[], bool]) -> Any:
        if len(calls) == epochs:
            raise error
        calls.append(1)
        return epoch(self, number, stopped)

    monkeypatch.setattr(Group, "epoch", interrupted)


def test_a_run_leaves_its_files(dataset, make_config, tmp_path, capsys) -> None:
    out = tmp_path / "deep" / "run"
    experts = train(dataset, make_config(), out, progress=True)
    said = capsys.readouterr().err
    assert "experts: dataset generated, model ConvNetD1W4" in said
    assert "2 at once" in said
    assert sorted(path.name for path in out.iterdir()) == ["config.json", EXPERTS]
    assert (experts.num_experts, experts.epochs) == (3, 3)
    net = built(make_config(), dataset, 0, CPU)
    assert experts.parameters == sum(p.numel() for p in net.parameters())
    settings = experts.settings
    assert (settings["dataset"], settings["class_names"]) == ("generated", ["0", "1", "2"])
    assert (settings["channels"], settings["size"]) == (3, [8, 8])
    assert tuple(settings["mean"]) == dataset.mean
    assert tuple(settings["std"]) == dataset.std
    assert settings["parameters"][0] == ["features.conv0.weight", [4, 3, 3, 3]]
    assert settings["config"]["dsa_strategy"] == "color_crop_cutout_flip_scale_rotate"
    assert (settings["config"]["seed"], settings["config"]["optimiser"]) == (0, "sgd")
    recorded = json.loads((out / "config.json").read_text())
    assert settings["fingerprint"] == recorded["data"]["fingerprint"]
    for expert in range(3):
        snapshots = [experts.snapshot(expert, epoch) for epoch in range(4)]
        first = built(make_config(), dataset, expert, CPU).parameters()
        assert torch.equal(snapshots[0], torch.cat([p.detach().reshape(-1) for p in first]))
        for a, b in zip(snapshots, snapshots[1:], strict=False):
            assert (a - b).norm() > 1e-3  # the distance that matching divides by
    assert experts.losses.shape == (3, 3)
    assert (experts.losses > 0.1).all()
    assert ((experts.accuracies >= 0) & (experts.accuracies <= 1)).all()
    assert not torch.equal(experts.snapshot(0, 3), experts.snapshot(1, 3))
    check_experts(experts, dataset, net, "ConvNetD1W4")
    # Called again, it is only opened.
    before = contents(out)
    again = train(dataset, make_config(), out)
    assert torch.equal(again.snapshot(2, 3), experts.snapshot(2, 3))
    assert contents(out) == before


def test_experts_learn(dataset, make_config, tmp_path) -> None:
    experts = train(dataset, make_config(train_epochs=30, lr_teacher=0.1), tmp_path)
    assert experts.losses[:, -1].mean() < 0.7 * experts.losses[:, 0].mean()


def test_threads_stacks_and_company_change_nothing_but_rounding(
    dataset, make_config, tmp_path
) -> None:
    one = train(dataset, make_config(), tmp_path / "one")
    torch.set_num_threads(2)
    train(dataset, make_config(), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    torch.set_num_threads(1)
    alone = train(dataset, make_config(), tmp_path / "alone", at_once=1)
    fewer = train(dataset, make_config(num_experts=1), tmp_path / "fewer", at_once=8)
    other = train(dataset, make_config(seed=1), tmp_path / "other")
    last = one.snapshot(0, 3)
    torch.testing.assert_close(alone.snapshot(0, 3), last, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fewer.snapshot(0, 3), last, rtol=1e-3, atol=1e-5)
    assert (other.snapshot(0, 0) - one.snapshot(0, 0)).abs().max() > 0.1


def test_epochs_follow_from_what_matching_reads(dataset, make_config, tmp_path) -> None:
    config = make_config(train_epochs=None, max_start_epoch=2, expert_epochs=3)
    assert train(dataset, config, tmp_path).epochs == 4
    # The same experts under another name.
    assert train(dataset, make_config(train_epochs=4), tmp_path).epochs == 4


@pytest.mark.parametrize("settings", [{}, {"mom": 0.5}, {"optimiser": "gsam", "decay": True}])
@pytest.mark.parametrize("epochs", [0, 2, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("crash")])
def test_an_interrupted_run_resumes_to_the_same_bits(
    dataset, make_config, tmp_path, monkeypatch, settings, epochs, error
) -> None:
    """Of a stack of one expert and one of two, of which the first is finished after 3 epochs."""
    config = make_config(**settings)
    train(dataset, config, tmp_path / "whole")
    out = tmp_path / "part"
    with monkeypatch.context() as patch:
        interrupt_after(patch, epochs, error)
        with pytest.raises(type(error)):
            train(dataset, config, out)
    assert not (out / EXPERTS).exists()
    written = [Writable(unfinished(out)).written(k) for k in range(3)]
    assert written == {0: [1, 0, 0], 2: [3, 0, 0], 4: [4, 2, 2]}[epochs]
    with pytest.raises(FileNotFoundError, match="not finished; the command that began them"):
        open_experts(out)
    with pytest.raises(ValueError, match="expert [01] is not finished"):
        open_experts(unfinished(out))
    trained: list[tuple[int, ...]] = []
    epoch = Group.epoch

    def counted(self: Group, number: int, stopped: Callable[[], bool]) -> Any:
        trained.append((number, *self.experts))
        return epoch(self, number, stopped)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "epoch", counted)
        train(dataset, config, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(trained) == 6 - (epochs if not config.mom else 3 * (epochs // 3))


def test_a_snapshot_that_did_not_reach_the_disk_is_made_again(
    dataset, make_config, tmp_path, monkeypatch
) -> None:
    """A machine that loses power may keep any part of what was written."""
    train(dataset, make_config(), tmp_path / "whole")
    out = tmp_path / "part"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(dataset, make_config(), out)
    file = Writable(unfinished(out))
    file.arrays["trajectories"][0, 2, 5:] = 0
    file.arrays["trajectories"][1, 2] = 0
    file.close()
    train(dataset, make_config(), out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_diverging_run_names_expert_and_epoch(dataset, make_config, tmp_path) -> None:
    with pytest.raises(Diverged, match=r"expert \d is not finite after epoch \d of 3"):
        train(dataset, make_config(lr_teacher=1e30), tmp_path)
    assert not (tmp_path / EXPERTS).exists()


def test_a_folder_with_another_run_is_refused(dataset, make_config, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(dataset, make_config(), tmp_path)
    before = unfinished(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="batch_train is 8 there and 9 here"):
        train(dataset, make_config(batch_train=9), tmp_path)
    other = generated(classes=3, size=8, train_per_class=6, test_per_class=2, seed=1)
    with pytest.raises(ValueError, match="data fingerprint is"):
        train(other, make_config(), tmp_path)
    assert unfinished(tmp_path).read_bytes() == before
    with folder.locked(tmp_path), pytest.raises(BlockingIOError, match="another process"):
        train(dataset, make_config(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds unfinished-experts.safetensors but no config"):
        train(dataset, make_config(), tmp_path)
    changed = config.replace('"seed": 0', '"seed": 1')
    (tmp_path / "config.json").write_text(changed)
    with pytest.raises(ValueError, match="is not of this run; remove it"):
        train(dataset, make_config(seed=1), tmp_path)


def test_a_resume_under_other_conditions_warns(dataset, make_config, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(dataset, make_config(), tmp_path)
    with pytest.warns(RuntimeWarning, match="going on with at_once 1 instead of 2, threads 1"):
        train(dataset, make_config(), tmp_path, at_once=1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts: got 0, expected at least 1"),
        ({"train_epochs": 0}, ValueError, "train_epochs: got 0, expected at least 1"),
        ({"lr_teacher": 0.0}, ValueError, "lr_teacher: got 0.0, expected more than 0"),
        ({"mom": 1.0}, ValueError, "mom: got 1.0, expected less than 1"),
        ({"optimiser": "adam"}, ValueError, "optimiser: got 'adam', expected 'sgd' or 'gsam'"),
        ({"decay": 1}, TypeError, "decay: got 1, expected true or false"),
        ({"alpha": True}, TypeError, "alpha: got True, expected a number"),
        ({"dsa_strategy": "crop_colour"}, ValueError, "unknown operation 'colour'"),
        ({"dataset": "digits"}, ValueError, "the config says 'digits', the data set given is"),
        ({"model": "ConvNetD1W4BN"}, ValueError, "model: ConvNetD1W4BN has batch normalisation"),
        ({"model": "Conv"}, ValueError, "unknown network 'Conv'"),
    ],
)
def test_wrong_settings_are_named_before_any_work(
    dataset, make_config, tmp_path, settings, error, message
) -> None:
    with pytest.raises(error, match=message):
        train(dataset, make_config(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_arguments_are_named(dataset, make_config, tmp_path) -> None:
    with pytest.raises(TypeError, match="config: got dict"):
        module.train(dataset, {"num_experts": 1}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at_once must be at least 1"):
        train(dataset, make_config(), tmp_path, at_once=0)
    with pytest.raises(ValueError, match="device: got 'nowhere'"):
        train(dataset, make_config(), tmp_path, device="nowhere")


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_ends_with_the_same_bits(tmp_path, number) -> None:
    """It is told to stop, or not even told, once some epochs are written."""
    out, epochs = tmp_path / "run", 60
    options = {"classes": 3, "size": 8, "train_per_class": 60, "test_per_class": 2}
    command = [
        *(sys.executable, "-m", "ddfast", "experts", "--dataset", "generated"),
        *("--data_options", json.dumps(options), "--model", "ConvNetD1W4", "--num_experts", "2"),
        *("--batch_train", "4", "--train_epochs", str(epochs), "--threads", "1"),
        *("--out", str(out), "--quiet"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (unfinished(out).exists() and Writable(unfinished(out)).written(0) > 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(120) == (130 if number == signal.SIGINT else -number)
    assert not (out / EXPERTS).exists()
    assert Writable(unfinished(out)).written(0) + Writable(unfinished(out)).written(1) > 3
    config = Config(
        dataset="generated", data_options=options, model="ConvNetD1W4", num_experts=2,
        batch_train=4, train_epochs=epochs,
    )  # fmt: skip
    train(generated(**options), config, out)
    train(generated(**options), config, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
