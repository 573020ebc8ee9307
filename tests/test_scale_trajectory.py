"""One step of trajectory matching at ImageNet's size within 4 GiB, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

GIBIBYTE = 1 << 30

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from ddfast import methods
from ddfast.data import generated_memmap
from ddfast.experts.file import EXPERTS, create, described
from ddfast.memory import peak_resident

method, folder = sys.argv[1:]
torch.set_num_threads(1)
dataset = generated_memmap(
    Path(folder) / "images.npy", classes=1000, size=64, train_per_class=1, test_per_class=1
)
known = methods.find(method)
settings = dict(ipc=1, model="ConvNetD4", syn_steps=10, batch_syn=100, expert_epochs=1)
settings |= dict(max_start_epoch=1, lr_img=100.0, lr_lr=1e-6, lr_teacher=0.01)
first = methods.start(methods.resolve(known.config(**settings), dataset), dataset, 1 << 30)
flat = torch.cat([p.detach().flatten() for p in first.net.parameters()])
experts = create(
    Path(folder) / EXPERTS, described(dataset, first.net, "ConvNetD4"), 1, 1, len(flat)
)
noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))
experts.trajectories[0, 0] = flat.numpy()
experts.trajectories[0, 1] = (flat + 0.01 * noise).numpy()
experts.written[:] = 2
config = methods.resolve(known.config(**settings, experts=folder), dataset)
run = methods.start(config, dataset, 1 << 30)
known.check(run)
begin = run.images.detach().clone()
losses = known.step(run)
moved = (run.images.detach() - begin).flatten(1).norm(dim=1)
print(json.dumps({
    "peak": peak_resident(), "loss": losses[0].item(), "classes": len(losses),
    "least": moved.min().item(),
}))
"""


@pytest.mark.parametrize("method", ["tesla", "mtt"])
def test_one_step_with_1000_classes_at_64x64(tmp_path, method) -> None:
    """ConvNetD4 of the published width, ten steps of a hundred images: every image once."""
    command = [sys.executable, "-c", PROGRAM, method, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] < 4 * GIBIBYTE
    assert found["classes"] == 1000 and found["loss"] > 0 and found["least"] > 0
