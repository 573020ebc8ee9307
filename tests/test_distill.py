"""The loop: what a run leaves behind, exact resume, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.data import Dataset, generated
from ddfast.data.files import whole_file
from ddfast.distill import checkpoint, distill, folder, loop
from ddfast.distill.log import Log
from ddfast.memory import in_words
from ddfast.methods import Diverged

SMALL: dict[str, dict[str, Any]] = {
    "dm": {"iterations": 9, "batch_real": 4},
    "dc": {"iterations": 4, "outer_loop": 2, "inner_loop": 1, "batch_real": 4},
    "dsa": {"iterations": 4, "outer_loop": 2, "inner_loop": 1, "batch_real": 4, "batch_train": 3},
    "dsac": {"iterations": 4, "outer_loop": 2, "inner_loop": 1, "batch_real": 4, "inner_warmup": 1},
    "idc": {"iterations": 4, "inner_loop": 2, "batch_real": 4, "n_data": 8, "init": "real"},
    "idc_i": {"iterations": 4, "inner_loop": 2, "n_data": 8, "step": "per_class"},
    "idm": {
        "iterations": 7,
        "batch_real": 4,
        "net_generate_interval": 2,
        "net_num": 4,
        "model_train_steps": 2,
        "reset_interval": 4,
        "factor": 2,
        "init": "real",
    },
    "m3d": {"iterations": 7, "batch_real": 4, "factor": 2, "init": "real"},
    "cafe": {"iterations": 4, "outer_most": 3, "inner_most": 2, "batch_real": 4},
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generated(classes=3, size=8, train_per_class=6, test_per_class=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config(method: str = "dm", **settings: Any) -> methods.Config:
    known = {"ipc": 2, "model": "ConvNetD1W4", **SMALL[method]}
    return methods.find(method).config(**known | settings)


def run(dataset: Dataset, out: Path, method: str = "dm", **options: Any) -> Artefact:
    settings = options.pop("settings", {})
    options = {"progress": False, **options}
    return distill(method, dataset, config(method, **settings), out, **options)


def same(a: Artefact, b: Artefact) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def contents(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Let the given image update (counted from 0, over all iterations) raise once it is done."""
    update, calls = methods.Run.update, []

    def interrupted(self: methods.Run, *arguments: Any) -> None:
        update(self, *arguments)
        calls.append(1)
        if len(calls) == call + 1:
            raise error

    monkeypatch.setattr(methods.Run, "update", interrupted)


@pytest.mark.parametrize("method", SMALL)
def test_a_run_is_the_methods_steps_and_leaves_its_files(dataset, tmp_path, method) -> None:
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


def test_another_seed_gives_another_result(dataset, tmp_path) -> None:
    first = run(dataset, tmp_path / "a")
    assert same(first, run(dataset, tmp_path / "b"))
    assert not same(first, run(dataset, tmp_path / "c", settings={"seed": 1}))


@pytest.mark.parametrize("momentum", [0.5, 0.0])
@pytest.mark.parametrize(
    ("method", "update"),
    [("dm", 0), ("dm", 5), ("dc", 3), ("dsa", 4), ("dsac", 4), ("idc", 5), ("idc_i", 3),
     ("idm", 4), ("m3d", 3), ("cafe", 7)],
)  # fmt: skip
def test_an_interrupted_run_resumes_to_the_same_bits(
    dataset, tmp_path, monkeypatch, method, update, momentum
) -> None:
    settings = {"momentum": momentum}
    whole = run(dataset, tmp_path / "whole", method, settings=settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, update, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(dataset, tmp_path / "part", method, settings=settings)
    assert not (tmp_path / "part" / "distilled.safetensors").exists()
    part = run(dataset, tmp_path / "part", method, settings=settings)
    assert same(part, whole)
    lines = log_of(tmp_path / "part")
    assert [line["iteration"] for line in lines] == list(range(SMALL[method]["iterations"]))
    expected = [line["loss"] for line in log_of(tmp_path / "whole")]
    assert [line["loss"] for line in lines] == expected


def test_a_run_whose_last_lines_were_logged_after_the_checkpoint(
    dataset, tmp_path, monkeypatch
) -> None:
    """As after SIGKILL: the log is ahead of the checkpoint, and its last line is cut."""
    whole = run(dataset, tmp_path / "whole")
    out = tmp_path / "part"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(dataset, out)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"iteration": 6, "loss": 99}\n{"iteration": 7, "lo')
    (out / "checkpoint" / ".iteration-000000007.safetensors.0badcafe").write_bytes(b"half")
    (out / ".grid.png.0badcafe").write_bytes(b"half")
    assert same(run(dataset, out), whole)
    assert [line["iteration"] for line in log_of(out)] == list(range(9))
    assert [line["loss"] for line in log_of(out)] == [x["loss"] for x in log_of(tmp_path / "whole")]
    assert not list(out.rglob(".*"))


def test_a_finished_run_is_read_not_repeated(dataset, tmp_path, monkeypatch, capsys) -> None:
    artefact = run(dataset, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(methods.Run, "update", lambda *_: pytest.fail("it ran again"))
    again = run(dataset, tmp_path, progress=True)
    assert same(artefact, again)
    assert contents(tmp_path) == before
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_another_config_in_the_folder_is_refused(dataset, tmp_path) -> None:
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


def test_a_folder_of_unknown_origin_is_refused(dataset, tmp_path) -> None:
    (tmp_path / "distilled.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"distilled\.safetensors but no config\.json"):
        run(dataset, tmp_path)
    (tmp_path / "config.json").write_text('{"method": "dm"')
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        run(dataset, tmp_path)
    assert (tmp_path / "distilled.safetensors").read_bytes() == b"precious"


def stopped(dataset: Dataset, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A run that stopped after 6 iterations, and its checkpoints, oldest first."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(dataset, out, checkpoint_every=2)
    found = sorted((out / "checkpoint").iterdir())
    assert [p.name for p in found] == [f"iteration-00000000{n}.safetensors" for n in (4, 6)]
    return found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    dataset, tmp_path, monkeypatch, damage
) -> None:
    whole = run(dataset, tmp_path / "whole")
    _, newest = stopped(dataset, tmp_path / "part", monkeypatch)
    damage(newest)
    with pytest.warns(RuntimeWarning, match=r"000006.* is damaged .*going back to .*000004"):
        part = run(dataset, tmp_path / "part")
    assert same(part, whole)
    assert [line["iteration"] for line in log_of(tmp_path / "part")] == list(range(9))


def test_without_a_whole_checkpoint_there_is_an_error_and_nothing_is_lost(
    dataset, tmp_path, monkeypatch
) -> None:
    for path in stopped(dataset, tmp_path, monkeypatch):
        truncate(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*remove the folder"):
        run(dataset, tmp_path)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_other_shapes_is_refused(dataset, tmp_path, monkeypatch) -> None:
    _, newest = stopped(dataset, tmp_path, monkeypatch)
    tensors, header = checkpoint.read(newest)
    tensors["images"] = tensors["images"][:2]
    checkpoint.write(newest.parent, header.pop("iteration"), tensors, header)
    with pytest.raises(ValueError, match=r"images has shape \(2, 3, 8, 8\), expected \(6, 3"):
        run(dataset, tmp_path)


def test_checkpoints_survive_a_crash_while_writing(tmp_path, monkeypatch) -> None:
    tensors = {"images": torch.arange(6.0).view(2, 3), "optimiser.0.x": torch.tensor(3)}
    for iteration in (3, 5, 9):
        checkpoint.write(tmp_path, iteration, tensors, {"seconds": 1.5})
    assert [p.name[10:19] for p in sorted(tmp_path.iterdir())] == ["000000005", "000000009"]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, 11, {"images": torch.zeros(1)}, {})
    found = checkpoint.read_last(tmp_path)
    assert found is not None
    assert torch.equal(found[0]["images"], tensors["images"])
    assert torch.equal(found[0]["optimiser.0.x"], tensors["optimiser.0.x"])
    assert found[1] == {"seconds": 1.5, "iteration": 9}
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_in_a_checkpoint_is_pickled(dataset, tmp_path, monkeypatch) -> None:
    _, newest = stopped(dataset, tmp_path, monkeypatch)
    with safe_open(newest, framework="pt") as file:
        assert set(file.keys()) == {"images", "optimiser.0.momentum_buffer"}
        header = json.loads(file.metadata()["header"])
    assert header["identity"]["config"]["ipc"] == 2


@pytest.mark.parametrize("method", ["dm", "dc"])
def test_a_diverging_run_is_caught_with_step_and_class(dataset, tmp_path, method) -> None:
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


def test_nan_in_one_class_is_named(dataset, tmp_path, monkeypatch) -> None:
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


def test_an_image_that_overflows_is_caught(dataset) -> None:
    state = methods.start(methods.resolve(config(lr_img=1e20), dataset), dataset, loop.DEFAULT)
    gradient = torch.zeros_like(state.images)
    gradient[3, 0, 0, 0] = 1e20
    with pytest.raises(Diverged, match=r"an image of class 1 \("):
        state.update(gradient, torch.ones(3))


def test_a_network_full_of_nan_is_caught(dataset, tmp_path, monkeypatch) -> None:
    initialise = loop.methods.run.nets.initialise

    def poisoned(net: torch.nn.Module, random: torch.Generator) -> None:
        initialise(net, random)
        with torch.no_grad():
            next(net.parameters()).fill_(float("nan"))

    monkeypatch.setattr(loop.methods.run.nets, "initialise", poisoned)
    with pytest.raises(Diverged, match=r"the loss of class 0 .*, 1 .*, 2 .* at iteration 0"):
        run(dataset, tmp_path)


def test_any_other_failure_keeps_the_state(dataset, tmp_path, monkeypatch) -> None:
    whole = run(dataset, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, MemoryError("no more"))
        with pytest.raises(MemoryError):
            run(dataset, tmp_path / "part")
    found = checkpoint.read_last(tmp_path / "part" / "checkpoint")
    assert found is not None
    assert found[1]["iteration"] == 4
    assert same(run(dataset, tmp_path / "part"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(dataset, tmp_path, monkeypatch, capsys, number) -> None:
    whole = run(dataset, tmp_path / "whole")
    update = methods.Run.update

    def signalled(self: methods.Run, *arguments: Any) -> None:
        if self.iteration == 5:
            signal.raise_signal(number)
        update(self, *arguments)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(methods.Run, "update", signalled)
        with pytest.raises(KeyboardInterrupt):
            run(dataset, tmp_path / "part", progress=True)
    assert signal.getsignal(number) is handler
    assert "saved after 5 of 9 iterations; the same command again" in capsys.readouterr().err
    assert same(run(dataset, tmp_path / "part"), whole)


def test_an_unwritable_folder_is_refused_before_any_work(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(methods.Run, "update", lambda *_: pytest.fail("it ran"))
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/ddfast-run")):
        with pytest.raises(OSError, match=f"out: cannot write into {out}"):
            run(dataset, out)
    assert file.read_text() == "mine"


def test_two_processes_do_not_share_a_folder(dataset, tmp_path) -> None:
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
    dataset, tmp_path, method, settings, options, error, message
) -> None:
    with pytest.raises(error, match=message):
        distill(method, dataset, config("dm", **settings), tmp_path, progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_method_is_refused(dataset, tmp_path) -> None:
    with pytest.raises(TypeError, match=r"got ddfast\.methods\.dc\.Config, .*dm\.Config for"):
        distill("dm", dataset, config("dc"), tmp_path)


def test_global_settings_are_put_back(dataset, tmp_path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    run(dataset, tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_other_conditions_are_pointed_out_at_a_resume(dataset, tmp_path, monkeypatch) -> None:
    stopped(dataset, tmp_path, monkeypatch)
    torch.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match=r"going on with threads 2 instead of 1: results may"):
        run(dataset, tmp_path)


def test_checkpoints_cost_little(dataset, tmp_path) -> None:
    """Twenty seconds apart at least, and a hundred times what the last one took."""
    one = object.__new__(loop._Loop)
    one.every, now = None, time.monotonic()
    for ago, cost, due in ((5, 0.0, False), (25, 0.1, True), (25, 1.0, False), (130, 1.0, True)):
        one.saved, one.cost = now - ago, cost
        assert one.due() is due


def test_pictures_in_the_course_of_a_run(dataset, tmp_path, monkeypatch) -> None:
    seen = []
    picture = loop._Loop.picture
    monkeypatch.setattr(
        loop._Loop, "picture", lambda self: (seen.append(self.run.iteration), picture(self))
    )
    run(dataset, tmp_path, settings={"iterations": 25})
    assert seen == [*range(0, 25, 2), 25]
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_keeps_what_came_before_and_drops_the_rest(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for i in range(4):
        log.write(iteration=i, loss=1.0)
    log.close()
    Log(path, 2).close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1]
    path.write_text(path.read_text() + "garbage\n")
    Log(path, 9).close()
    assert len(path.read_text().splitlines()) == 2


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


def test_whole_file_is_what_checkpoints_rely_on(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
