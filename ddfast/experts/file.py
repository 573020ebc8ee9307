"""The file of expert trajectories: one memory-mapped array behind a header that says what it is.

A safetensors file of two tensors: `trajectories`, float32 (experts, epochs + 1, parameters), each
snapshot the flat parameters in the order of `net.parameters()`, snapshot 0 those of the start; and
`written`, int32 (experts,), how many snapshots of each are whole. It is made in full size and
filled in place, so that the header is there from the beginning and nothing is ever copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddfast.data import Dataset
from ddfast.data.fingerprint import fingerprint

EXPERTS = "experts.safetensors"
"""The file in a folder of experts that holds their trajectories."""

KEY = "ddfast experts"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Experts:
    """Trajectories in a file. Nothing is read before it is asked for.

    Attributes:
        path: of the file.
        settings: all that made them: data set, network, training.
        written: snapshots of each expert that are whole, a memory-map.
        trajectories: float32 (experts, epochs + 1, parameters), a memory-map.
    """

    path: Path
    settings: Mapping[str, Any]
    written: np.ndarray
    trajectories: np.ndarray

    @property
    def num_experts(self) -> int:
        """How many networks were trained."""
        return int(self.trajectories.shape[0])

    @property
    def epochs(self) -> int:
        """Number of the last snapshot."""
        return int(self.trajectories.shape[1]) - 1

    @property
    def parameters(self) -> int:
        """Numbers in a snapshot."""
        return int(self.trajectories.shape[2])

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """Parameters of an expert in the course of its training.

        Args:
            expert: its number, from 0.
            epoch: after how many epochs; 0 for its fresh weights.

        Returns:
            float32 (parameters,), a copy.

        Raises:
            IndexError: there is no such expert or epoch.
        """
        if not (0 <= expert < self.num_experts and 0 <= epoch <= self.epochs):
            raise IndexError(
                f"snapshot: got expert {expert}, epoch {epoch}, expected up to "
                f"{self.num_experts - 1} and {self.epochs}"
            )
        return torch.from_numpy(np.array(self.trajectories[expert, epoch]))


def described(dataset: Dataset, net: nn.Module, model: str) -> dict[str, Any]:
    """What trajectories belong to, as plain values: the images and the network."""
    return {
        "dataset": dataset.name,
        "fingerprint": fingerprint(dataset),
        "class_names": list(dataset.class_names),
        "shape": [dataset.channels, *dataset.size],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "zca": "none" if dataset.whitening is None else dataset.whitening.mode,
        "model": model,
        "parameters": [[name, list(p.shape)] for name, p in net.named_parameters()],
    }


def check_experts(experts: Experts, dataset: Dataset, net: nn.Module, model: str) -> None:
    """Refuse trajectories of another data set or network.

    An imported file does not know its images; then only the network is compared.

    Args:
        experts: the trajectories.
        dataset: that of the run.
        net: the network of the run, whose parameters must have those names and shapes.
        model: its name.

    Raises:
        ValueError: naming what differs.
    """
    wanted = json.loads(json.dumps(described(dataset, net, model)))
    known = {"zca": "none", **experts.settings}  # older files have no whitening
    different = [
        f"{name} is {_shown(known[name])} there and {_shown(value)} here"
        for name, value in wanted.items()
        if name in known and known[name] != value
    ]
    sizes = sum(p.numel() for p in net.parameters())
    if experts.parameters != sizes and not different:
        different = [f"{experts.parameters} parameters there and {sizes} here"]
    if different:
        raise ValueError(f"experts: {experts.path} is of another run: {'; '.join(different)}")


def open_experts(path: str | os.PathLike[str]) -> Experts:
    """Map the trajectories of a file, or of the folder that it lies in. Nothing is unpickled.

    Args:
        path: of the file, or of a folder that holds `experts.safetensors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of trajectories, cut short, of another version, or not all trained yet.
    """
    path = Path(path)
    path = path / EXPERTS if path.is_dir() else path
    experts = mapped(path, "r")
    begun = int((experts.written <= experts.epochs).sum())
    if begun:
        raise ValueError(
            f"experts: {begun} of {experts.num_experts} in {path} are not trained to the end; the "
            "command that began them goes on"
        )
    return experts


def create(
    path: Path, settings: Mapping[str, Any], experts: int, epochs: int, parameters: int
) -> Experts:
    """A new file of this size, nothing written yet. It takes its place once it is whole."""
    shape = experts, epochs + 1, parameters
    counts, values = 4 * experts, 4 * experts * (epochs + 1) * parameters
    header = json.dumps(
        {
            "__metadata__": {
                KEY: json.dumps({"format_version": FORMAT_VERSION, "settings": dict(settings)})
            },
            "written": {"dtype": "I32", "shape": [experts], "data_offsets": [0, counts]},
            "trajectories": {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [counts, counts + values],
            },
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid():08d}")
    with temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        size = 8 + len(header) + counts + values
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    temporary.replace(path)
    return mapped(path, "r+")


def mapped(path: Path, mode: str) -> Experts:
    """The file's arrays, to be read ("r") or filled ("r+").

    Raises:
        FileNotFoundError, ValueError: see `open_experts`.
    """
    if not path.exists():
        raise FileNotFoundError(f"experts: no file {path}; `ddfast experts` makes one")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length < 1 << 26:
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
        content = json.loads(header["__metadata__"][KEY])
        version = content["format_version"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"experts: {path} holds no expert trajectories ({error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"experts: {path} has version {version!r}, expected {FORMAT_VERSION}")
    arrays = {}
    for name, kind in (("written", np.int32), ("trajectories", np.float32)):
        first, end = header[name]["data_offsets"]
        if 8 + length + end > path.stat().st_size:
            raise ValueError(f"experts: {path} is cut short")
        shape: Sequence[int] = header[name]["shape"]
        arrays[name] = np.memmap(path, kind, mode, 8 + length + first, tuple(shape))  # type: ignore[call-overload]
    return Experts(path, content["settings"], arrays["written"], arrays["trajectories"])


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
