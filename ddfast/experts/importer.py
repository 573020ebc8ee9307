"""Expert trajectories of the official scripts, `replay_buffer_n.pt`, as a file of ours."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddfast import nets
from ddfast._version import __version__
from ddfast.data import Dataset
from ddfast.distill import folder
from ddfast.experts.file import EXPERTS, Experts, create, described, open_experts

__all__ = ["import_buffers"]


def import_buffers(
    files: Sequence[str | os.PathLike[str]],
    dataset: Dataset,
    model: str,
    out: str | os.PathLike[str],
) -> Experts:
    """Write the experts of `replay_buffer_n.pt` files into one file of ours.

    Such a file is a list of experts, each a list of snapshots (one before the first epoch and one
    after each), each a list of the parameters' tensors. They say nothing of what they were trained
    on: name, normalisation, whitening and images of the data set are taken on trust.

    Args:
        files: in the order in which the experts are to be numbered.
        dataset: that they were trained on; whitened (`ddfast.data.whitened`) if they saw it so.
        model: name for `ddfast.nets.build` of their network.
        out: folder for the file, made if need be.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file of another kind, parameters of other shapes than the network's, experts
            with different numbers of snapshots, or whose snapshots are all the same.
    """
    if not files:
        raise ValueError("files: is empty, expected replay_buffer_n.pt files")
    shape = (dataset.channels, dataset.num_classes, dataset.size)
    net = nets.build(model, *shape)
    shapes = [tuple(p.shape) for p in net.parameters()]
    paths = [Path(file) for file in files]
    counts = [_count(_read(path), path, shapes) for path in paths]
    snapshots = {number for _, number in counts}
    if len(snapshots) > 1:
        raise ValueError(f"files: experts have {sorted(snapshots)} snapshots, expected one number")
    settings = described(dataset, net, model)
    settings["imported"] = {"files": [path.name for path in paths], "ddfast": __version__}
    out = folder.opened(out)
    if (out / EXPERTS).exists():
        raise ValueError(f"out: {out} holds experts already; choose another folder")
    experts = create(
        out / EXPERTS,
        settings,
        sum(number for number, _ in counts),
        snapshots.pop() - 1,
        sum(p.numel() for p in net.parameters()),
    )
    place = 0
    for path in paths:
        for expert in _read(path):
            for epoch, snapshot in enumerate(expert):
                flat = torch.cat([p.detach().float().reshape(-1) for p in snapshot])
                experts.trajectories[place, epoch] = flat.numpy()
            place += 1
    experts.trajectories.flush()  # type: ignore[attr-defined]
    experts.written[:] = experts.epochs + 1
    experts.written.flush()  # type: ignore[attr-defined]
    return open_experts(out)


def _read(path: Path) -> list[list[list[Tensor]]]:
    if not path.exists():
        raise FileNotFoundError(f"files: there is no {path}")
    try:
        experts = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"files: {path} cannot be read as tensors ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(experts, list) or not experts:
        raise ValueError(f"files: {path} holds no list of experts")
    return experts


def _count(
    experts: list[list[list[Tensor]]], path: Path, shapes: list[tuple[int, ...]]
) -> tuple[int, int]:
    """How many experts and snapshots; checks them all."""
    for number, expert in enumerate(experts):
        if not isinstance(expert, list) or len(expert) < 2 or len(expert) != len(experts[0]):
            raise ValueError(f"files: expert {number} of {path} has another number of snapshots")
        for epoch, snapshot in enumerate(expert):
            found = [tuple(p.shape) if isinstance(p, Tensor) else None for p in snapshot]
            if found != shapes:
                raise ValueError(
                    f"files: expert {number} of {path} has at epoch {epoch} parameters of shapes "
                    f"{found}, expected {shapes}"
                )
        if all(
            torch.equal(a, b)
            for snapshot in expert[1:]
            for a, b in zip(expert[0], snapshot, strict=True)
        ):
            raise ValueError(
                f"files: all snapshots of expert {number} of {path} are the same; on a CPU the "
                "official script saves the last parameters for every epoch, and nothing can be "
                "learned from them"
            )
    return len(experts), len(experts[0])
