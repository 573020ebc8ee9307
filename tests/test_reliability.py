"""Runs that are killed with SIGKILL, at any point, end with the bits of one that was not.

Two kinds of point: a random line of Python inside the loop and its writing of files (reached by
counting executed lines, so that it does not depend on the clock), and a random moment, which also
hits inside the calls to torch and the system. This file is its own helper process: it imports
ddfast once and forks a child for every attempt, because importing torch takes longer than a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from ddfast.artefact import Artefact
from ddfast.data import generated
from ddfast.distill import checkpoint, distill, folder, log, loop
from ddfast.methods import dc, dm

AT_A_LINE, AT_A_MOMENT = 12, 6

DATASET = generated(classes=3, size=8, train_per_class=6, test_per_class=1)

WATCHED = {module.__file__ for module in (checkpoint, folder, log, loop)} | {
    sys.modules["ddfast.data.files"].__file__,
    sys.modules["ddfast.data.signed_file"].__file__,
    sys.modules["ddfast.distill.resumable"].__file__,
    sys.modules["ddfast.methods.run"].__file__,
}


def run(out: Path, method: str) -> None:
    """A few seconds at most, with a checkpoint after every second iteration."""
    shared: dict[str, Any] = {"ipc": 2, "model": "ConvNetD1W4", "batch_real": 4}
    config = (
        dm.Config(iterations=24, **shared)
        if method == "dm"
        else dc.Config(iterations=12, outer_loop=2, inner_loop=1, **shared)
    )
    distill(method, DATASET, config, out, checkpoint_every=2, progress=False)


class Lines:
    """Counts the executed lines of the watched files, and kills the process at one of them."""

    def __init__(self, fatal: int | None) -> None:
        self.count, self.fatal = 0, fatal

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def in_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run in a forked process; True if it ended by itself, False if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return True


def traced(out: Path, method: str, fatal: int) -> None:
    sys.settrace(Lines(fatal))
    run(out, method)


def helper(place: Path, method: str, seed: int) -> dict[str, Any]:
    """Kill runs until there were enough kills of both kinds; each run then ends in peace."""
    chance = random.Random(seed)
    torch.set_num_threads(1)  # a process with threads cannot be forked
    tqdm.monitor_interval = 0
    # tqdm's own lock is shared with forked processes: one killed while it holds it stops them all.
    tqdm.set_lock(threading.RLock())
    counter = Lines(None)
    sys.settrace(counter)
    run(place / "whole", method)  # here, so that the children find all of torch imported
    sys.settrace(None)
    begin = time.monotonic()
    run(place / "timed", method)
    duration = time.monotonic() - begin
    kills = {"line": 0, "moment": 0}
    runs = ["timed"]
    reached: list[int] = []
    while kills["line"] < AT_A_LINE or kills["moment"] < AT_A_MOMENT:
        out = place / f"run{len(runs)}"
        runs.append(out.name)
        ended = False
        for _ in range(4):  # kills of one run
            if kills["line"] < AT_A_LINE:
                fatal = chance.randrange(1, counter.count // 2)
                ended = in_child(lambda out=out, fatal=fatal: traced(out, method, fatal))
                kills["line"] += not ended
            else:
                delay = chance.uniform(0, duration / 2)
                ended = in_child(lambda out=out: run(out, method), kill_after=delay)
                kills["moment"] += not ended
            if ended:
                break
            found = list((out / "checkpoint").glob("iteration-*"))
            reached.append(max((int(path.name[10:19]) for path in found), default=0))
        if not ended:
            assert in_child(lambda out=out: run(out, method))
    return {"kills": kills, "runs": runs, "reached": reached}


def killed_runs(tmp_path: Path, method: str, seed: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path), method, str(seed)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["kills"]["line"] >= AT_A_LINE
    assert told["kills"]["moment"] >= AT_A_MOMENT
    assert len(set(told["reached"])) >= 4  # early and late in the run
    whole = tmp_path / "whole"
    expected = (whole / "distilled.safetensors").read_bytes()
    losses = [json.loads(line)["loss"] for line in (whole / "log.jsonl").read_text().splitlines()]
    for name in told["runs"]:
        out = tmp_path / name
        assert (out / "distilled.safetensors").read_bytes() == expected
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == list(range(len(losses)))
        assert [line["loss"] for line in lines] == losses
        assert (out / "grid.png").read_bytes() == (whole / "grid.png").read_bytes()
        assert not list(out.rglob(".*"))  # nothing half written is left
    assert Artefact.load(whole / "distilled.safetensors").images.shape == (6, 3, 8, 8)


def test_killed_runs_of_dm_end_with_the_same_bits(tmp_path: Path) -> None:
    killed_runs(tmp_path, "dm", 1)


def test_killed_runs_of_dc_end_with_the_same_bits(tmp_path: Path) -> None:
    killed_runs(tmp_path, "dc", 2)


if __name__ == "__main__":
    print(json.dumps(helper(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
