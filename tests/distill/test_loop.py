"""The loop: what a run leaves behind, what it refuses, and what it does when it diverges."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.distill import checkpoint, distill, folder, loop
from ddfast.memory import in_words
from ddfast.methods import Diverged

METHODS = ("dm", "dc", "dsa", "dsac", "idc", "idc_i", "idm", "m3d", "cafe")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_methods_steps_and_leaves_its_files(
    dataset, tmp_path, method, config, run, same, log_of
) -> None:
    out = tmp_path / "deep" / "run"
    artefact = run(dataset, out, method)
    expected = methods.start(methods.resolve(config(method), dataset), dataset, loop.DEFAULT)
    losses = []
    for _ in range(expected.config.iterations):
        losses.append(methods.find(method).step(expected).mean().item())
        expected.iteration += 1
    assert torch.equal(artefact.images, expected.images.detach())
    assert artefact.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint", "config.json", "distilled.safetensors", "grid.png", "log.jsonl"
    ]  # fmt: skip
    assert same(Artefact.load(out / "distilled.safetensors"), artefact)
    assert (artefact.method, artefact.dataset, artefact.seed) == (method, "generated", 0)
    assert (artefact.mean, artefact.class_names) == (dataset.mean, dataset.class_names)
    assert artefact.config == methods.as_json(expected.config)
    lines = log_of(out)
    assert [line["iteration"] for line in lines] == list(range(expected.config.iterations))
    assert [line["loss"] for line in lines] == losses
    assert all(line["peak_memory"] > 1 << 20 for line in lines)
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(lines))


def test_another_seed_gives_another_result(dataset, tmp_path, run, same) -> None:
    first = run(dataset, tmp_path / "a")
    assert same(first, run(dataset, tmp_path / "b"))
    assert not same(first, run(dataset, tmp_path / "c", settings={"seed": 1}))


def test_a_finished_run_is_read_not_repeated(
    dataset, tmp_path, monkeypatch, capsys, run, same, contents
) -> None:
    artefact = run(dataset, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(methods.Run, "update", lambda *_: pytest.fail("it ran again"))
    again = run(dataset, tmp_path, progress=True)
    assert same(artefact, again)
    assert contents(tmp_path) == before
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_another_config_in_the_folder_is_refused(dataset, tmp_path, run, contents) -> None:
    run(dataset, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        run(dataset, tmp_path, settings={"ipc": 1, "lr_img": 0.25})
    message = str(error.value)
    assert "ipc is 2 there and 1 here" in message
    assert "lr_img is 1.0 there and 0.25 here" in message
    assert "seed" not in message
    with pytest.raises(ValueError, match="method is dm there and dc here"):
        run(dataset, tmp_path, "dc")
    other = dataclasses.replace(dataset, train_images=dataset.train_images.flip(0))
    with pytest.raises(ValueError, match=r"\(data fingerprint is \w+ there and \w+ here\)"):
        run(other, tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_of_unknown_origin_is_refused(dataset, tmp_path, run) -> None:
    (tmp_path / "distilled.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"distilled\.safetensors but no config\.json"):
        run(dataset, tmp_path)
    (tmp_path / "config.json").write_text('{"method": "dm"')
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        run(dataset, tmp_path)
    assert (tmp_path / "distilled.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("method", ["dm", "dc"])
def test_a_diverging_run_is_caught_with_step_and_class(dataset, tmp_path, method, run) -> None:
    settings = {"lr_img": 1e30, "iterations": 50}
    with pytest.raises(Diverged) as error:
        run(dataset, tmp_path, method, settings=settings)
    message = str(error.value)
    assert "not finite at iteration " in message
    assert "of class 0 (" in message
    assert "lr_img (now 1e+30)" in message
    good = Artefact.load(tmp_path / "last_good.safetensors")
    iteration = int(message.split("at iteration ")[1].split(".")[0].split(",")[0].split(";")[0])
    assert f"after {iteration} iterations" in message
    assert torch.isfinite(good.images).all()
    found = checkpoint.read_last(tmp_path / "checkpoint")
    assert found is not None
    assert found[1]["iteration"] == iteration
    assert torch.equal(found[0]["images"], good.images)
    assert not (tmp_path / "distilled.safetensors").exists()
    with pytest.raises(Diverged, match=f"at iteration {iteration}"):
        run(dataset, tmp_path, method, settings=settings)


def test_nan_in_one_class_is_named(dataset, tmp_path, monkeypatch, run) -> None:
    update = methods.Run.update

    def broken(self: methods.Run, gradient: torch.Tensor, losses: torch.Tensor, *rest: Any) -> None:
        if self.iteration == 3:
            gradient["images"][self.of_classes(1, 2)][0, 0, 0, 0] = float("nan")
        update(self, gradient, losses, *rest)

    monkeypatch.setattr(methods.Run, "update", broken)
    name = dataset.class_names[1]
    with pytest.raises(
        Diverged, match=rf"gradient of class 1 \({name}\) is not finite at iter\w+ 3"
    ):
        run(dataset, tmp_path)
    three = run(dataset, tmp_path / "three", settings={"iterations": 3})
    assert torch.equal(Artefact.load(tmp_path / "last_good.safetensors").images, three.images)


def test_an_image_that_overflows_is_caught(dataset, config) -> None:
    state = methods.start(methods.resolve(config(lr_img=1e20), dataset), dataset, loop.DEFAULT)
    gradient = torch.zeros_like(state.images)
    gradient[3, 0, 0, 0] = 1e20
    with pytest.raises(Diverged, match=r"an image of class 1 \("):
        state.update(gradient, torch.ones(3))


def test_a_network_full_of_nan_is_caught(dataset, tmp_path, monkeypatch, run) -> None:
    initialise = loop.methods.run.nets.initialise

    def poisoned(net: torch.nn.Module, random: torch.Generator) -> None:
        initialise(net, random)
        with torch.no_grad():
            next(net.parameters()).fill_(float("nan"))

    monkeypatch.setattr(loop.methods.run.nets, "initialise", poisoned)
    with pytest.raises(Diverged, match=r"the loss of class 0 .*, 1 .*, 2 .* at iteration 0"):
        run(dataset, tmp_path)


def test_an_unwritable_folder_is_refused_before_any_work(
    dataset, tmp_path, monkeypatch, run
) -> None:
    monkeypatch.setattr(methods.Run, "update", lambda *_: pytest.fail("it ran"))
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/ddfast-run")):
        with pytest.raises(OSError, match=f"out: cannot write into {out}"):
            run(dataset, out)
    assert file.read_text() == "mine"


def test_two_processes_do_not_share_a_folder(dataset, tmp_path, run) -> None:
    with folder.locked(tmp_path), pytest.raises(BlockingIOError, match="another process is runn"):
        run(dataset, tmp_path)
    run(dataset, tmp_path)


@pytest.mark.parametrize(
    ("method", "settings", "options", "error", "message"),
    [
        ("dx", {}, {}, ValueError, "method: got 'dx'"),
        ("dm", {}, {"memory": "much"}, ValueError, "memory: got 'much'"),
        ("dm", {}, {"memory": "2KiB"}, ValueError, "memory: the budget of 2048 bytes"),
        ("dm", {}, {"checkpoint_every": 0}, ValueError, "checkpoint_every: got 0"),
        ("dm", {}, {"device": "abacus"}, ValueError, "device: got 'abacus'"),
        ("dm", {"model": "ConvNot"}, {}, ValueError, "unknown network 'ConvNot'"),
        ("dm", {"ipc": 7}, {}, ValueError, "has 6 training images, fewer than ipc 7"),
        ("dm", {"dataset": "MNIST"}, {}, ValueError, "dataset: the config says 'MNIST'"),
        ("dm", {"dsa_strategy": "colour"}, {}, ValueError, "colour"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_folder_free(
    dataset, tmp_path, method, settings, options, error, message, config
) -> None:
    with pytest.raises(error, match=message):
        distill(method, dataset, config("dm", **settings), tmp_path, progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_method_is_refused(dataset, tmp_path, config) -> None:
    with pytest.raises(TypeError, match=r"got ddfast\.methods\.dc\.Config, .*dm\.Config for"):
        distill("dm", dataset, config("dc"), tmp_path)


def test_global_settings_are_put_back(dataset, tmp_path, run) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    run(dataset, tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_pictures_in_the_course_of_a_run(dataset, tmp_path, monkeypatch, run) -> None:
    seen = []
    picture = loop._Loop.picture
    monkeypatch.setattr(
        loop._Loop, "picture", lambda self: (seen.append(self.run.iteration), picture(self))
    )
    run(dataset, tmp_path, settings={"iterations": 25})
    assert seen == [*range(0, 25, 2), 25]
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_fingerprint_sees_images_labels_and_names(dataset) -> None:
    seen = {folder.fingerprint(dataset)}
    images = dataset.train_images.clone()
    images[-1, -1, -1, -1] ^= 1
    labels = dataset.train_labels.clone()
    labels[:7] = labels[:7].flip(0)
    names = tuple(reversed(dataset.class_names))
    for change in ({"train_images": images}, {"train_labels": labels}, {"class_names": names}):
        seen.add(folder.fingerprint(dataclasses.replace(dataset, **change)))
    assert len(seen) == 4


def test_sizes_in_words() -> None:
    sizes = (5, 2048, 3 << 20, 5 << 29)
    assert [in_words(x) for x in sizes] == ["5 B", "2 KiB", "3 MiB", "2.5 GiB"]
