"""Feature matching at ImageNet's size: 1000 classes of 256 images at 64x64, within 8 GiB.

The images lie in a memory-mapped file that the test makes (3.1 GB); each run is a process of its
own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

GIBIBYTE = 1 << 30
CLASSES, PER_CLASS, SIDE = 1000, 256, 64

PROGRAM = """
import json, sys
import numpy as np
import torch
from ddfast import methods
from ddfast.data import Dataset
from ddfast.memory import peak_resident

method, settings, memory, path, classes, in_memory = json.loads(sys.argv[1])
torch.set_num_threads(1)
images = np.load(path, mmap_mode="r")[: classes * 256]
images = torch.from_numpy(np.array(images) if in_memory else images)
labels = torch.arange(classes).repeat_interleave(256)
dataset = Dataset(
    name="made here",
    train_images=images,
    train_labels=labels,
    test_images=images[:1].clone(),
    test_labels=labels[:1],
    class_names=tuple(str(c) for c in range(classes)),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
known = methods.find(method)
run = methods.start(methods.resolve(known.config(**settings), dataset), dataset, memory)
known.check(run)
for _ in known.prepare(run):
    pass
begin = run.images.detach().clone()
losses = known.step(run)
moved = (run.images.detach() - begin).flatten(1).norm(dim=1)
print(json.dumps({
    "peak": peak_resident(),
    "losses": losses.tolist(),
    "least": moved.min().item(),
    "images": run.images.detach().flatten(1).double().norm(dim=1).tolist(),
}))
"""

MODEL = "ConvNetD4W8"  # of the published depth for 64 pixels; its width would take half an hour
SOME = 40
"""So many of the classes, from memory and with memory to spare, for comparison."""

SETTINGS: dict[str, dict] = {
    "dm": {},
    "idm": {"model_train_steps": 1},
    # An untrained network: what is at stake are the real images.
    "ncfm": {"num_premodel": 1, "pretrain_epochs": 0, "num_freqs": 256},
}

ALIKE: dict[str, dict] = {
    "dm": {"dsa_strategy": "none"},
    "idm": {"dsa_strategy": "none", "step": "joint"},
    "ncfm": {"aug_type": "none", "calib_weight": 0.0},
}
"""Under which a class has the same loss and image whatever the number of classes: without random
numbers drawn for all of them at once, class after class in a step, or their classification."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Iterator[Path]:
    """Noise, shifted and turned around for each class, so that no two have the same images."""
    path = tmp_path_factory.mktemp("scale") / "images.npy"
    shape = (CLASSES * PER_CLASS, 3, SIDE, SIDE)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    noise = np.random.default_rng(0).integers(0, 128, (PER_CLASS, *shape[1:]), dtype=np.uint8)
    for c in range(CLASSES):
        here = file[c * PER_CLASS : (c + 1) * PER_CLASS]
        here[:] = np.roll(noise, (c, c // SIDE), (3, 2)) + np.uint8(c * 37 % 128)
    file.flush()
    del file
    yield path
    path.unlink()  # pytest keeps the folders of the last runs


def one_step(
    path: Path, method: str, memory: int, classes: int, in_memory: bool = False, **more
) -> dict:
    settings = {"ipc": 1, "model": MODEL, "dataset": "made here", **SETTINGS[method], **more}
    call = json.dumps([method, settings, memory, str(path), classes, in_memory])
    done = subprocess.run([sys.executable, "-c", PROGRAM, call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", SETTINGS)
def test_one_iteration_with_1000_classes_streamed_from_a_file(images, method) -> None:
    streamed = one_step(images, method, GIBIBYTE, CLASSES, **ALIKE[method])
    assert streamed["peak"] < 8 * GIBIBYTE
    assert len(streamed["losses"]) == CLASSES
    assert min(streamed["losses"]) > 0 and streamed["least"] > 0  # every class's image has moved
    whole = one_step(images, method, 4 * GIBIBYTE, SOME, in_memory=True, **ALIKE[method])
    assert streamed["losses"][:SOME] == pytest.approx(whole["losses"], rel=1e-4)
    assert streamed["images"][:SOME] == pytest.approx(whole["images"], rel=1e-6)


@pytest.mark.parametrize("method", SETTINGS)
def test_streaming_changes_nothing(images, method) -> None:
    """The same bits from a file; beyond rounding, the same in pieces of another size."""
    whole = one_step(images, method, 4 * GIBIBYTE, SOME, in_memory=True)
    assert one_step(images, method, 4 * GIBIBYTE, SOME) | {"peak": 0} == whole | {"peak": 0}
    little = one_step(images, method, GIBIBYTE // 32, SOME)
    assert little["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert little["images"] == pytest.approx(whole["images"], rel=1e-6)
