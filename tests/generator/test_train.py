"""Training: what a run leaves behind, its step, exact resume, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ddfast.data import Dataset, generated, normalise
from ddfast.distill import checkpoint
from ddfast.generator import Generator, adversarial, check_generator, normalised
from ddfast.generator import train as module
from ddfast.generator.adversarial import Config
from ddfast.methods import Diverged

CPU = torch.device("cpu")


def train(dataset: Dataset, config: Config, out: Path, **options: Any) -> Generator:
    return module.train(dataset, config, out, **{"progress": False, "device": "cpu", **options})


def weights(out: Path) -> bytes:
    return (out / "generator.safetensors").read_bytes()


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException) -> None:
    step, calls = adversarial.step, []

    def interrupted(run: adversarial.Training) -> tuple[float, float]:
        if len(calls) == steps:
            raise error
        calls.append(1)
        return step(run)

    monkeypatch.setattr(module, "step", interrupted)


def test_a_run_leaves_its_files(dataset, make_config, tmp_path) -> None:
    out = tmp_path / "deep" / "run"
    generator = train(dataset, make_config(), out)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint", "config.json", "generator.safetensors", "log.jsonl", "samples.png"
    ]  # fmt: skip
    check_generator(generator, dataset)
    assert generator.architecture == {
        "classes": 3, "channels": 3, "size": [8, 8], "latent_dim": 3, "width": 2
    }  # fmt: skip
    recipe = generator.recipe
    assert (recipe["dataset"], recipe["class_names"]) == ("generated", ["0", "1", "2"])
    assert tuple(recipe["mean"]) == dataset.mean
    assert recipe["config"]["iterations"] == 6
    assert recipe["config"]["dsa_strategy"] == "color_crop_cutout_flip_scale_rotate"
    assert (
        recipe["fingerprint"]
        == json.loads((out / "config.json").read_text())["data"]["fingerprint"]
    )
    lines = log_of(out)
    assert [line["iteration"] for line in lines] == list(range(6))
    assert all(0 <= line["discriminator"] < 100 for line in lines)
    # Called again, it is only read.
    before = weights(out)
    again = train(dataset, make_config(), out)
    assert torch.equal(again.first.weight, generator.first.weight)
    assert weights(out) == before


def test_another_seed_gives_another_generator(dataset, make_config, tmp_path) -> None:
    train(dataset, make_config(), tmp_path / "a")
    train(dataset, make_config(), tmp_path / "b")
    train(dataset, make_config(seed=1), tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_one_step_is_adam_on_the_hinge_losses(dataset, make_config) -> None:
    """Written out, with two steps of the discriminator."""
    config = adversarial.resolve(make_config(steps_discriminator=2), dataset)
    run, expected = (adversarial.start(config, dataset, CPU) for _ in range(2))
    losses = adversarial.step(run)
    g, d = expected.generator, expected.discriminator
    adam = {
        net: torch.optim.Adam(net.parameters(), lr, (0.0, 0.9))
        for net, lr in ((g, config.lr_generator), (d, config.lr_discriminator))
    }
    for k in range(2):
        real, real_labels = expected.real(0, k)
        labels = expected.labels(0, k)
        fake = normalised(g(expected.latents(0, k), labels).detach(), dataset.mean, dataset.std)
        seen = expected.seen(torch.cat([real, fake]), 0, k)
        scores = d(seen, torch.cat([real_labels, labels]))
        loss = F.relu(1 - scores[:4]).mean() + F.relu(1 + scores[4:]).mean()
        adam[d].zero_grad()
        loss.backward()
        adam[d].step()
    labels = expected.labels(0, 2)
    fake = normalised(g(expected.latents(0, 2), labels), dataset.mean, dataset.std)
    deceived = -d(expected.seen(fake, 0, 2), labels).mean()
    adam[g].zero_grad()
    deceived.backward()
    adam[g].step()
    assert losses == pytest.approx((loss.item(), deceived.item()), rel=1e-5)
    start = adversarial.start(config, dataset, CPU)
    for name in ("generator", "discriminator"):
        for ours, theirs, first in zip(
            *(getattr(x, name).parameters() for x in (run, expected, start)), strict=True
        ):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
            assert not torch.equal(ours, first)
    # The average has moved 9/10 of the way: its decay is (1 + 0) / (10 + 0) at the first step.
    for kept, now, first in zip(
        *(x.parameters() for x in (run.average, run.generator, start.generator)), strict=True
    ):
        assert torch.allclose(kept, first + 0.9 * (now - first), rtol=1e-5, atol=1e-6)


def test_what_a_step_draws(dataset, make_config) -> None:
    config = adversarial.resolve(make_config(batch=500), dataset)
    run = adversarial.start(config, dataset, CPU)
    images, labels = run.real(3, 0)
    # Images with their labels, from all of the training images.
    pixels = normalise(dataset.train_images, dataset.mean, dataset.std)
    chosen = {int((image == pixels).all((1, 2, 3)).nonzero()) for image in images}
    assert chosen == set(range(18))
    for image, label in zip(images[:20], labels, strict=False):
        assert dataset.train_labels[(image == pixels).all((1, 2, 3)).nonzero()] == label
    assert torch.bincount(run.labels(3, 0), minlength=3).min() > 100
    # Each image has an operation and parameters of its own.
    same = images[:1].repeat(50, 1, 1, 1)
    seen = run.seen(same, 3, 0)
    assert len({image.numpy().tobytes() for image in seen}) > 30
    assert torch.equal(seen, run.seen(same, 3, 0))
    assert not torch.equal(seen, run.seen(same, 4, 0))
    assert not torch.equal(run.latents(3, 0), run.latents(3, 1))


def test_the_final_statistics_are_those_of_the_averaged_weights(dataset, make_config) -> None:
    config = adversarial.resolve(make_config(), dataset)
    run = adversarial.start(config, dataset, CPU)
    for _ in range(3):
        adversarial.step(run)
        run.iteration += 1
    state = {name: value.clone() for name, value in adversarial.state_of(run).items()}
    generator = adversarial.finished(run)
    assert all(torch.equal(state[n], v) for n, v in adversarial.state_of(run).items())
    # In training mode a batch has mean 0 after every normalisation; with the right statistics a
    # large batch nearly has in evaluation mode.
    outputs = []
    generator.norm.register_forward_hook(lambda m, i, o: outputs.append((i[0], o)))
    latents = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator(latents, dataset.train_labels.repeat(112)[:2000])
    before = outputs[0][0]
    mean, variance = before.mean((0, 2, 3)), before.var((0, 2, 3))
    assert torch.allclose(generator.norm.running_mean, mean, atol=0.2 * variance.sqrt().max())
    assert torch.allclose(generator.norm.running_var, variance, rtol=0.3)


@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_an_interrupted_run_resumes_to_the_same_bits(
    dataset, make_config, tmp_path, monkeypatch, steps
) -> None:
    train(dataset, make_config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(dataset, make_config(), tmp_path / "part")
    assert not (tmp_path / "part" / "generator.safetensors").exists()
    train(dataset, make_config(), tmp_path / "part")
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    picture = "samples.png"
    assert (tmp_path / "part" / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()
    losses = [
        [(line["iteration"], line["generator"]) for line in log_of(tmp_path / name)]
        for name in ("whole", "part")
    ]
    assert losses[0] == losses[1]


def test_a_crash_goes_back_to_the_last_checkpoint(
    dataset, make_config, tmp_path, monkeypatch
) -> None:
    train(dataset, make_config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, RuntimeError("crash"))
        with pytest.raises(RuntimeError, match="crash"):
            train(dataset, make_config(), tmp_path / "part", checkpoint_every=2)
    found = checkpoint.read_last(tmp_path / "part" / "checkpoint")
    assert found is not None
    assert found[1]["iteration"] == 4
    train(dataset, make_config(), tmp_path / "part")
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")


@pytest.mark.parametrize("which", ["discriminator", "generator"])
def test_values_that_are_not_finite_end_the_run(
    dataset, make_config, tmp_path, monkeypatch, which
) -> None:
    step = adversarial.step

    def poisoned(run: adversarial.Training) -> tuple[float, float]:
        if run.iteration == 3:
            with torch.no_grad():
                getattr(run, which).blocks[0].shortcut.bias.fill_(torch.nan)
        return step(run)

    monkeypatch.setattr(module, "step", poisoned)
    message = r"the loss of the discriminator is not finite at iteration 3; a smaller lr_discr"
    with pytest.raises(Diverged, match=message):
        train(dataset, make_config(), tmp_path, checkpoint_every=1)
    found = checkpoint.read_last(tmp_path / "checkpoint")
    assert found is not None
    assert found[1]["iteration"] == 3
    assert all(torch.isfinite(value).all() for value in found[0].values())


def test_a_gradient_that_is_not_finite_changes_no_weight(dataset, make_config) -> None:
    run = adversarial.start(adversarial.resolve(make_config(), dataset), dataset, CPU)
    before = [parameter.clone() for parameter in run.generator.parameters()]
    run.generator.last.bias.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(Diverged, match="the gradient of the generator is not finite at iteration"):
        adversarial.step(run)
    after = run.generator.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_folder_with_another_run_is_refused(dataset, make_config, tmp_path) -> None:
    train(dataset, make_config(), tmp_path)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="batch is 4 there and 5 here"):
        train(dataset, make_config(batch=5), tmp_path)
    other = generated(classes=3, size=8, train_per_class=6, test_per_class=2, seed=1)
    with pytest.raises(ValueError, match="data fingerprint is"):
        train(other, make_config(), tmp_path)
    assert weights(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations: got 0, expected at least 1"),
        ({"batch": 1}, ValueError, "batch: got 1, expected at least 2"),
        ({"lr_generator": 0.0}, ValueError, "lr_generator: got 0.0, expected more than 0"),
        ({"average": 1.0}, ValueError, "average: got 1.0, expected less than 1"),
        ({"width": "wide"}, TypeError, "width: got 'wide', expected an integer"),
        ({"dsa_strategy": "crop_colour"}, ValueError, "unknown operation 'colour'"),
        ({"dataset": "digits"}, ValueError, "the config says 'digits', the data set given is"),
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
        module.train(dataset, {"iterations": 1}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint_every: got 0"):
        train(dataset, make_config(), tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="device: got 'nowhere'"):
        train(dataset, make_config(), tmp_path, device="nowhere")


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_sigint_saves_and_the_same_command_goes_on(tmp_path) -> None:
    options = '{"classes": 3, "size": 8, "train_per_class": 6, "test_per_class": 2}'
    command = [
        *(sys.executable, "-m", "ddfast", "generator", "--dataset", "generated"),
        *("--data_options", options, "--batch", "4", "--width", "2", "--G_ch", "2"),
        *("--D_ch", "2", "--dim_z", "3", "--threads", "1", "--iterations", "1000000"),
        *("--out", str(tmp_path / "run"), "--quiet"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    found = checkpoint.read_last(tmp_path / "run" / "checkpoint")
    assert found is not None
    assert found[1]["iteration"] >= 1
