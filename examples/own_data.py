"""Your own data: arrays too large for memory, a memory budget, a run that can be interrupted.

    python examples/own_data.py --data data --out runs/own-data
    python examples/own_data.py --data data --out runs/own-data --memory 64MiB

`Dataset` takes any uint8 tensor (N, channels, H, W), so also a memory-mapped file: images are read
when a batch has them, and normalised on the fly. Without such a file this script writes one, of
coloured shapes, in the place of a preprocessed ImageNet. Images in a folder for each class need no
script:

    ddfast distill dm --dataset ImageFolder --data_path photos --ipc 1 --out runs/photos \\
        --data_options '{"size": 64, "cache": "packed"}'

reads `photos/train/<class>/*` and `photos/test/<class>/*` and packs them into such a file once.

Start the script again after an interruption: it goes on with the same bits. `--memory` is what a
step may take for activations; another budget is another order of summation, so it changes a result
by rounding, and ddfast says so if it changes in the course of a run.

Several GPUs. A run of ddfast is one process on one device: `torchrun` does not spread a single run
over several, and a second process in the folder of a run is refused. What can be spread are runs, a
folder each. Under

    torchrun --nproc-per-node 4 examples/own_data.py --data data --out runs/own-data

this script makes four runs of different seeds, in runs/own-data-0 to -3, each on the GPU of its
process (`RANK` and `LOCAL_RANK`, which torchrun sets). The data must be there already.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from ddfast.data import Dataset, channel_statistics, generated_memmap
from ddfast.distill import distill
from ddfast.methods import find

CLASSES, TRAIN, TEST = 20, 40, 5


def write(folder: Path) -> None:
    """What a preprocessing of your own would leave: images.npy and labels.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    made = generated_memmap(folder / "images.npy", CLASSES, 32, TRAIN, TEST)
    np.save(folder / "labels.npy", torch.cat([made.train_labels, made.test_labels]).numpy())


def read(folder: Path) -> Dataset:
    """The first images are for training. The means are read off all of these once, in pieces."""
    pixels = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    train = CLASSES * TRAIN
    mean, std = channel_statistics(pixels[:train])
    return Dataset(
        name="coloured shapes",
        train_images=pixels[:train],
        train_labels=labels[:train],
        test_images=pixels[train:],
        test_labels=labels[train:],
        class_names=tuple(f"shape {c}" for c in range(CLASSES)),
        mean=mean,
        std=std,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", default="runs/own-data")
    parser.add_argument("--memory", default="1GiB", help="for activations")
    parser.add_argument("--model", help="default: ConvNet, by the size of the images")
    parser.add_argument("--iterations", type=int, default=1000)
    options = parser.parse_args()

    rank, device, out = os.environ.get("RANK"), None, options.out
    missing = not (options.data / "labels.npy").exists()
    if rank is not None:  # one of several runs
        out = f"{out}-{rank}"
        if torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        if missing:
            raise SystemExit(f"no labels.npy in {options.data}: run the script alone to write it")
    elif missing:
        write(options.data)
    dataset = read(options.data)
    print(dataset)
    config = find("dm").config(
        ipc=1, model=options.model, iterations=options.iterations, seed=int(rank or 0)
    )
    artefact = distill("dm", dataset, config, out, memory=options.memory, device=device)
    print(f"{out}: {artefact}")


if __name__ == "__main__":
    main()
