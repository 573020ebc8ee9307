"""The file: its layout, reading no more than is asked for, damage, and whether it fits a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ddfast.experts.settings import described
from safetensors import safe_open
from safetensors.torch import save_file

from ddfast import nets
from ddfast.data import Dataset, generated
from ddfast.experts import check_experts, file, open_experts
from ddfast.experts.file import EXPERTS, Writable, create, unfinished

MODEL = "ConvNetD1W4"
EXPERT_COUNT, EPOCHS = 2, 3


def network(dataset: Dataset, model: str = MODEL) -> nets.Network:
    shape = (dataset.channels, dataset.num_classes, dataset.size)
    return nets.build(model, *shape, generator=torch.Generator())


@pytest.fixture
def settings(dataset):
    return described(dataset, network(dataset), MODEL) | {"config": {"seed": 3}, "made_with": {}}


@pytest.fixture
def written(settings, tmp_path) -> Path:
    """A file with known numbers."""
    create(unfinished(tmp_path), settings, EXPERT_COUNT, EPOCHS)
    writable = Writable(unfinished(tmp_path))
    for expert in range(EXPERT_COUNT):
        for epoch in range(EPOCHS + 1):
            writable.put(expert, epoch, values(writable, expert, epoch))
        for epoch in range(EPOCHS):
            writable.note(expert, epoch, 10 * expert + epoch, 0.5)
    writable.publish(tmp_path / EXPERTS)
    return tmp_path / EXPERTS


def values(writable: Writable, expert: int, epoch: int) -> torch.Tensor:
    length = writable.arrays["trajectories"].shape[2]
    return torch.arange(length) / 7 + 100 * expert + epoch


def test_what_is_written_is_read(written, settings) -> None:
    experts = open_experts(written)
    assert (experts.num_experts, experts.epochs) == (EXPERT_COUNT, EPOCHS)
    assert experts.settings == json.loads(json.dumps(settings))
    for expert in range(EXPERT_COUNT):
        for epoch in range(EPOCHS + 1):
            found = experts.snapshot(expert, epoch)
            assert (found.dtype, found.shape) == (torch.float32, (experts.parameters,))
            expected = torch.arange(experts.parameters) / 7 + 100 * expert + epoch
            assert torch.equal(found, expected)
    assert experts.losses.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert experts.accuracies.tolist() == [[0.5] * 3] * 2
    # A copy: it can be written to, and the file stays.
    experts.snapshot(1, 2).zero_()
    assert experts.snapshot(1, 2)[0] == 102
    assert torch.equal(open_experts(written.parent).snapshot(0, 1), experts.snapshot(0, 1))


def test_any_reader_of_safetensors_can_read_it(written) -> None:
    experts = open_experts(written)
    with safe_open(written, framework="pt") as found:
        assert sorted(found.keys()) == ["accuracies", "checksums", "losses", "trajectories"]
        trajectories = found.get_tensor("trajectories")
    assert (trajectories.dtype, trajectories.shape[:2]) == (torch.float32, (2, 4))
    assert torch.equal(trajectories[1, 3], experts.snapshot(1, 3))


def test_expert_and_epoch_out_of_range(written) -> None:
    experts = open_experts(written)
    for expert, epoch, message in (
        (2, 0, "expert: got 2, .* has 0 to 1"),
        (-1, 0, "expert: got -1"),
        (0, 4, "epoch: got 4, .* has 0 to 3"),
        (0, -1, "epoch: got -1"),
    ):
        with pytest.raises(IndexError, match=message):
            experts.snapshot(expert, epoch)


def test_a_damaged_snapshot_is_found_and_others_can_be_read(written) -> None:
    position = written.read_bytes().index(np.float32(100 + 2).tobytes())
    with open(written, "r+b") as out:
        out.seek(position)
        out.write(np.float32(103).tobytes())
    experts = open_experts(written)
    with pytest.raises(ValueError, match="damaged: expert 1 after epoch 2 does not match"):
        experts.snapshot(1, 2)
    assert experts.snapshot(1, 1)[0] == 101


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_only_what_is_asked_for_is_read(settings, tmp_path) -> None:
    """A file of 8 GiB, nearly all of it a hole, in a process of its own."""
    parameters = [["weight", [1 << 20]]]
    path = tmp_path / EXPERTS
    reserve, file._reserve = file._reserve, os.truncate
    try:
        create(path, settings | {"parameters": parameters}, 32, 63)
    finally:
        file._reserve = reserve
    assert path.stat().st_size > 8 << 30
    writable = Writable(path)
    writable.put(17, 40, torch.arange(1 << 20).float())
    writable.arrays["checksums"][writable.arrays["checksums"] == 0] = 1
    writable.close()
    code = (
        "import sys; from ddfast.experts import open_experts; "
        "from ddfast.memory import peak_resident; before = peak_resident(); "
        "experts = open_experts(sys.argv[1]); found = experts.snapshot(17, 40); "
        "assert found[-1] == (1 << 20) - 1; print(peak_resident() - before)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 4 << 20 < int(result.stdout) < 64 << 20  # a snapshot is 4 MiB


def test_a_full_disk_is_found_before_any_work(settings, tmp_path, monkeypatch) -> None:
    def full(handle: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "_reserve", full)
    with pytest.raises(OSError, match=r"out: cannot reserve 0\.00 GiB for 2 experts in .*No space"):
        create(unfinished(tmp_path), settings, 2, 3)
    assert not list(tmp_path.iterdir())


def test_the_space_is_taken_at_once(settings, tmp_path) -> None:
    create(tmp_path / "file", settings | {"parameters": [["weight", [1 << 18]]]}, 2, 3)
    assert (tmp_path / "file").stat().st_blocks * 512 >= 8 << 20


@pytest.mark.parametrize("left", [0, 4, 300, -5])
def test_a_file_cut_short_is_refused(written, left) -> None:
    written.write_bytes(written.read_bytes()[:left])
    with pytest.raises(
        ValueError, match="experts.safetensors is no safetensors file, or it is cut"
    ):
        open_experts(written)


def test_foreign_files_are_refused(written, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no experts at"):
        open_experts(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no experts at"):
        open_experts(tmp_path / "empty")
    other = tmp_path / "other"
    other.write_bytes(b"PK\x03\x04 a pickle in a zip archive" * 10)
    with pytest.raises(ValueError, match="is no safetensors file"):
        open_experts(other)
    save_file({"images": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="is no file of experts: its metadata have no"):
        open_experts(other)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version\\": 1', '"format_version\\": 9', "format version 9, and ddfast"),
        ('\\"fingerprint\\"', '\\"fangerprint\\"', "its settings lack fingerprint"),
        ('"losses": {', '"lasses": {', "it lacks 'losses'"),
        ("[4, 3, 3, 3]", "[4, 3, 3, 2]", "not as long as its list of parameters says"),
    ],
)
def test_contents_that_do_not_fit_together(written, old, new, message) -> None:
    content = written.read_bytes()
    changed = content.replace(old.encode(), new.encode(), 1)
    assert changed != content
    written.write_bytes(changed)
    with pytest.raises(ValueError, match=message):
        open_experts(written)


def test_experts_that_fit_a_run(written, dataset) -> None:
    experts = open_experts(written)
    check_experts(experts, dataset, network(dataset), MODEL)
    # Another name of the same network.
    check_experts(experts, dataset, network(dataset), "ConvNetW4D1IN")


def test_experts_that_do_not_fit_a_run(written, dataset) -> None:
    experts = open_experts(written)
    net = network(dataset)

    def refused(dataset: Dataset, net: nets.Network, model: str, *messages: str) -> None:
        with pytest.raises(ValueError, match="do not fit this run") as error:
            check_experts(experts, dataset, net, model)
        for message in messages:
            assert message in str(error.value)

    other = dataclasses.replace(dataset, name="other", mean=(0.1, 0.2, 0.3))
    refused(other, net, MODEL, "dataset is generated there and other here", "; mean is [")
    refused(dataclasses.replace(dataset, std=(1, 1, 1)), net, MODEL, "run: std is [")
    images = generated(classes=3, size=8, train_per_class=6, test_per_class=2, seed=1)
    refused(images, net, MODEL, "run: fingerprint is ")
    names = dataclasses.replace(dataset, class_names=("a", "b", "c"))
    refused(names, net, MODEL, "class_names is ['0', '1', '2'] there")
    # The same shapes, another activation.
    swish = "ConvNetD1W4ASwish"
    refused(dataset, network(dataset, swish), swish, "model is ConvNetD1W4 there and ConvNetD1W4AS")
    wide = "ConvNetD1W6"
    refused(
        dataset, network(dataset, wide), wide,
        "model is", "parameter features.conv0.weight [4, 3, 3, 3] there is",
        "features.conv0.weight [6, 3, 3, 3] here",
    )  # fmt: skip
    refused(
        dataset, network(dataset, "ConvNetD1W4NN"), MODEL,
        "run: parameter features.norm0.weight [4] there is classifier.weight",
    )  # fmt: skip
    refused(dataset, network(dataset, "MLP"), "MLP", "model is ConvNetD1W4 there and MLP here")
