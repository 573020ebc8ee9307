"""ImageNet's shape, 1000 classes at 64x64, within 8 GiB; each run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GIBIBYTE = 1 << 30

PROGRAM = """
import json, sys
import torch
from ddfast import methods
from ddfast.data import generated_memmap
from ddfast.memory import peak_resident

method, settings, memory, path = json.loads(sys.argv[1])
torch.set_num_threads(1)
dataset = generated_memmap(path, classes=1000, size=64, train_per_class=3, test_per_class=1)
known = methods.find(method)
run = methods.start(methods.resolve(known.config(**settings), dataset), dataset, memory)
known.check(run)
begin = run.images.detach().clone()
losses = known.step(run)
moved = (run.images.detach() - begin).flatten(1).norm(dim=1)
print(json.dumps({
    "peak": peak_resident(),
    "losses": losses.tolist(),
    "least": moved.min().item(),
    "checksum": run.images.double().sum().item(),
}))
"""


def one_step(folder: Path, method: str, memory: int, **settings) -> dict:
    call = json.dumps([method, settings, memory, str(folder / "images.npy")])
    command = [sys.executable, "-c", PROGRAM, call]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", ["dc"])
def test_one_iteration_with_1000_classes_at_64x64(tmp_path, method) -> None:
    """The weights of the head alone are 2 MB a class: 6 GB for both sides and the derivative.

    The benchmark `bench_gradient_matching.py --peak` runs the full width with 256 images a class.
    """
    settings = {"ipc": 1, "batch_real": 3, "model": "ConvNetD4W32", "dataset": "generated"}
    usual = one_step(tmp_path, method, GIBIBYTE, **settings)
    assert usual["peak"] < 8 * GIBIBYTE
    assert len(usual["losses"]) == 1000
    assert min(usual["losses"]) > 0 and usual["least"] > 0  # every class's image has moved
    little = one_step(tmp_path, method, GIBIBYTE // 16, **settings)
    assert little["peak"] < usual["peak"]
    for a, b in zip(usual["losses"], little["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert little["checksum"] == pytest.approx(usual["checksum"], rel=1e-6)
