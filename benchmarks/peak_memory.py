"""Peak memory of gradient matching, each provider in a process of its own.

    python benchmarks/peak_memory.py --out benchmarks/results/peak_memory.json

"before" is the peak when the work begins: Python, torch, images, and given gradients. The eager
provider keeps the graphs of all classes until its one backward pass: with 100 classes it needs more
than 16 GB, and is measured with 20.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ddfast import engine
from ddfast.bench import commit, device_name
from ddfast.benchmarks.matching_task import Task
from ddfast.memory import peak_resident


def synthetic_side(path: str, classes: int) -> int:
    """Classes of 50 images, 3x32x32; returns the peak before the work."""
    task = Task("full", classes, 50)
    shapes = dict(task.net.named_parameters())
    random = torch.Generator().manual_seed(1)
    real = [torch.randn(classes, *shapes[n].shape, generator=random) for n in task.names]
    before = peak_resident()
    if path == "ddfast":
        images = task.syn.detach()
        engine.match_gradients(task.net, images, task.labels, [50] * classes, real, task.names)
        return before
    loss = torch.zeros(())
    for c in range(classes):
        row = dict(zip(task.names, (g[c] for g in real), strict=True))
        target = [row[n] if n in row else torch.zeros_like(p) for n, p in shapes.items()]
        loss = loss + task.eager_syn(task.of_class(c), c, target)
    task.eager_backward(loss)
    return before


def outer_iteration(classes: int, together: int = 8) -> int:
    """1000 classes at 64x64, 256 real images each, the first `classes` one group after the other.

    Every group costs the same, so that a part of them shows the peak and the time of all.
    """
    task = Task("64x64", 1000, 1)
    before = peak_resident()
    for first in range(0, classes, together):
        few = range(first, min(first + together, classes))
        x = torch.cat([task.real.roll(c, 3) for c in few])
        labels, counts = torch.tensor(few), [task.batch] * len(few)
        real = engine.segment_gradients(
            task.net, x, labels.repeat_interleave(task.batch), counts, task.names
        )
        images = task.syn.detach()[few.start : few.stop]
        engine.match_gradients(task.net, images, labels, [1] * len(few), real, task.names)
    return before


WORK: dict[str, Callable[[], int]] = {
    "synthetic side, full, 20 classes, ipc 50; eager": lambda: synthetic_side("eager", 20),
    "synthetic side, full, 20 classes, ipc 50; ddfast": lambda: synthetic_side("ddfast", 20),
    "synthetic side, full, 100 classes, ipc 50; ddfast": lambda: synthetic_side("ddfast", 100),
    "outer iteration, 64x64, 40 of 1000 classes, ipc 1; ddfast": lambda: outer_iteration(40),
    "outer iteration, 64x64, 1000 classes, ipc 1; ddfast": lambda: outer_iteration(1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--only", choices=list(WORK), help="this one, in this process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="without the last, a quarter hour")
    options = parser.parse_args()
    if options.only:
        torch.set_num_threads(options.threads)
        start = time.perf_counter()
        before = WORK[options.only]()
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"before": before, "peak": peak_resident(), "seconds": seconds}))
        return
    found = {
        "device": device_name("cpu"),
        "threads": options.threads,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    for name in list(WORK)[: -1 if options.quick else None]:
        command = [sys.executable, __file__, "--only", name, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        result = json.loads(done.stdout) if done.returncode == 0 else f"exit {done.returncode}"
        print(name, result, flush=True)
        found[name] = result
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
