"""Interrupted runs: checkpoints, whole and damaged, and resuming to the same bits."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ddfast import methods
from ddfast.data.files import whole_file
from ddfast.distill import checkpoint, loop
from ddfast.distill.log import Log


@pytest.fixture
def stopped(dataset, monkeypatch, run, interrupt_at) -> Callable[[Path], list[Path]]:
    """Makes a run that stopped after 6 iterations; returns its checkpoints, oldest first."""

    def make(out: Path) -> list[Path]:
        with monkeypatch.context() as patch:
            interrupt_at(patch, 6, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run(dataset, out, checkpoint_every=2)
        found = sorted((out / "checkpoint").iterdir())
        assert [p.name for p in found] == [f"iteration-00000000{n}.safetensors" for n in (4, 6)]
        return found

    return make


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("momentum", [0.5, 0.0])
@pytest.mark.parametrize(
    ("method", "update"),
    [("dm", 0), ("dm", 5), ("dc", 3), ("dsa", 4), ("dsac", 4), ("idc", 5), ("idc_i", 3),
     ("idm", 4), ("m3d", 3), ("cafe", 7)],
)  # fmt: skip
def test_an_interrupted_run_resumes_to_the_same_bits(
    dataset,
    tmp_path,
    monkeypatch,
    method,
    update,
    momentum,
    config,
    run,
    interrupt_at,
    same,
    log_of,
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
    assert [line["iteration"] for line in lines] == list(range(config(method).iterations))
    expected = [line["loss"] for line in log_of(tmp_path / "whole")]
    assert [line["loss"] for line in lines] == expected


def test_a_run_whose_last_lines_were_logged_after_the_checkpoint(
    dataset, tmp_path, monkeypatch, run, interrupt_at, same, log_of
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


def test_any_other_failure_keeps_the_state(
    dataset, tmp_path, monkeypatch, run, interrupt_at, same
) -> None:
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
def test_a_signal_saves_and_ends_the_run(
    dataset, tmp_path, monkeypatch, capsys, number, run, same
) -> None:
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


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    dataset, tmp_path, damage, run, stopped, same, log_of
) -> None:
    whole = run(dataset, tmp_path / "whole")
    _, newest = stopped(tmp_path / "part")
    damage(newest)
    with pytest.warns(RuntimeWarning, match=r"000006.* is damaged .*going back to .*000004"):
        part = run(dataset, tmp_path / "part")
    assert same(part, whole)
    assert [line["iteration"] for line in log_of(tmp_path / "part")] == list(range(9))


def test_without_a_whole_checkpoint_there_is_an_error_and_nothing_is_lost(
    dataset, tmp_path, run, stopped, contents
) -> None:
    for path in stopped(tmp_path):
        truncate(path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*remove the folder"):
        run(dataset, tmp_path)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_other_shapes_is_refused(dataset, tmp_path, run, stopped) -> None:
    _, newest = stopped(tmp_path)
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


def test_nothing_in_a_checkpoint_is_pickled(tmp_path, stopped) -> None:
    _, newest = stopped(tmp_path)
    with safe_open(newest, framework="pt") as file:
        assert set(file.keys()) == {"images", "optimiser.0.momentum_buffer"}
        header = json.loads(file.metadata()["header"])
    assert header["identity"]["config"]["ipc"] == 2


def test_checkpoints_cost_little() -> None:
    """Twenty seconds apart at least, and a hundred times what the last one took."""
    one = object.__new__(loop._Loop)
    one.every, now = None, time.monotonic()
    for ago, cost, due in ((5, 0.0, False), (25, 0.1, True), (25, 1.0, False), (130, 1.0, True)):
        one.saved, one.cost = now - ago, cost
        assert one.due() is due


def test_other_conditions_are_pointed_out_at_a_resume(dataset, tmp_path, run, stopped) -> None:
    stopped(tmp_path)
    torch.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match=r"going on with threads 2 instead of 1: results may"):
        run(dataset, tmp_path)


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


def test_whole_file_is_what_checkpoints_rely_on(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
