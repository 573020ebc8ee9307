"""Training experts, from a data set to a file: `ddfast experts`."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ddfast import nets
from ddfast._version import __version__
from ddfast.data import Dataset, whitened
from ddfast.distill import folder
from ddfast.distill.process import clear, deterministic, say, signals, usable_device
from ddfast.evaluate.side_by_side import SideBySide, evenly, shared_out, stack_size
from ddfast.experts.file import EXPERTS, Experts, create, described, mapped, open_experts
from ddfast.experts.training import Config, Group
from ddfast.methods import Diverged, Interrupted
from ddfast.methods.config import as_json, filled
from ddfast.random import generator

__all__ = ["EXPERTS", "Config", "train"]

SECONDS_BETWEEN = 20.0


def train(
    dataset: Dataset,
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    at_once: int | None = None,
    progress: bool = True,
) -> Experts:
    """Train experts on the training images, or go on with a run that was interrupted.

    `out` then holds `config.json` and `experts.safetensors`, see `ddfast.experts.file`. Small
    networks are trained several at once, with stacked weights, and the machine's threads share out
    the stacks. Each expert draws its weights, the order of its images and their augmentation from
    generators of its own, so that the others change it by rounding only. A run that is called again
    with the same settings goes on behind the last epoch that was saved (without momentum, else at
    the beginning of the expert) and ends with the same bits.

    Args:
        dataset: only its training images are used, whitened as `config.zca` says.
        config: what is left out is filled in, see `Config.published`.
        out: the folder of the run, made if need be.
        device: None for the GPU if there is one, else the CPU.
        at_once: networks to stack at most; None for a rule by size, 1 for one by one.
        progress: show a bar and messages on stderr.

    Raises:
        TypeError, ValueError: settings that cannot work, batch normalisation, a folder with another
            run in it; before any work starts.
        OSError: the folder cannot be written, or another process is running in it.
        Diverged: a loss is no longer finite; the message names the expert and the epoch.
        KeyboardInterrupt: SIGINT or SIGTERM came; whole epochs have been saved.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"config: got {type(config).__name__}, expected ddfast.experts.train.Config"
        )
    config = filled(config, dataset)
    dataset = whitened(dataset, config.zca)
    where = usable_device(device)
    net = built(config, dataset, 0)
    if nets.has_batchnorm(net):
        raise ValueError(
            f"model: {config.model} has batch normalisation, whose running statistics are no "
            "parameters and would not be kept; use instance or group normalisation"
        )
    batch = min(config.batch_train, len(dataset.train_labels))
    image = (dataset.channels, *dataset.size)
    stack = stack_size(net, image, batch, at_once, config.num_experts)
    out = folder.opened(out)
    with folder.locked(out):
        mine = folder.identity("experts", as_json(config), dataset)
        begun = folder.claim(out, mine)
        folder.record(out, mine, config.data_path)
        clear(out)
        path = out / EXPERTS
        settings = described(dataset, net, config.model)
        settings |= {"training": as_json(config), "versions": {"ddfast": __version__}}
        if begun and path.exists():
            experts = mapped(path, "r+")
        else:
            size = sum(p.numel() for p in net.parameters())
            experts = create(path, settings, config.num_experts, config.train_epochs, size)
        if (experts.written > experts.epochs).all():
            say(progress, f"{out} is finished; nothing to do")
            return open_experts(path)
        say(progress, f"experts: {', '.join(f'{k} {v}' for k, v in as_json(config).items() if v)}")
        run = _Run(config, dataset, experts, stack, where, progress)
        with deterministic(), signals(run):
            run.finish()
        return open_experts(path)


def built(config: Config, dataset: Dataset, number: int) -> nets.Network:
    """Expert `number` before its training."""
    random = generator(config.seed, "experts: weights", number)
    shape = (dataset.channels, dataset.num_classes, dataset.size)
    return nets.build(config.model, *shape, generator=random)


@dataclass
class _Run:
    """What the threads share."""

    config: Config
    dataset: Dataset
    experts: Experts
    stack: int
    device: torch.device
    progress: bool
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    saved: float = field(default_factory=time.monotonic)

    def finish(self) -> None:
        """Train all that is missing, a stack a thread."""
        groups = evenly(range(self.config.num_experts), max(1, self.stack))
        missing = [g for g in groups if self.experts.written[g].min() <= self.experts.epochs]
        images = self.dataset.train_images
        if self.device.type == "cuda" and images.numel() < torch.cuda.mem_get_info()[0] // 4:
            images = images.to(self.device)
        labels = self.dataset.train_labels.to(images.device)
        done = sum(max(0, int(written) - 1) for written in self.experts.written)
        self.bar = tqdm(
            total=self.config.num_experts * self.config.train_epochs,
            initial=done,
            desc=f"experts {self.dataset.name}",
            unit="epoch",
            disable=not self.progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        cores = torch.get_num_threads()
        workers = min(cores, len(missing)) if self.device.type == "cpu" else 1
        threads = 1 if self.stack else cores // workers
        ended = threading.Event()
        try:
            shared_out(
                lambda group: self.train(group, images, labels, ended),
                missing,
                ended,
                workers,
                threads,
            )
        finally:
            self.bar.close()
        if self.stop:
            say(self.progress, "stopped and saved; the same command again goes on from there")
            raise Interrupted

    def train(
        self, numbers: list[int], images: Tensor, labels: Tensor, ended: threading.Event
    ) -> None:
        """Train the experts of one stack to their end."""
        group_nets = [built(self.config, self.dataset, k).to(self.device) for k in numbers]
        group = Group(
            self.config, self.dataset, numbers, SideBySide(group_nets, stacked=self.stack > 0)
        )
        first, written = 0, min(int(self.experts.written[k]) for k in numbers)
        if written and not self.config.mom:  # the parameters are all there is to go on from
            first = written - 1
            begun = torch.stack([self.experts.snapshot(k, first) for k in numbers])
            group.load(begun.to(self.device))
        else:
            self.keep(group, 0)
        for epoch in range(first, self.config.train_epochs):
            if self.stop or ended.is_set():
                self.save(numbers, epoch)
                return
            losses = group.epoch(epoch, images, labels)
            finite = torch.isfinite(losses) & torch.isfinite(group.snapshots()).all(1)
            if not finite.all():
                bad = numbers[int((~finite).nonzero()[0])]
                raise Diverged(
                    f"the loss or a weight of expert {bad} is not finite in epoch {epoch}; a "
                    f"smaller lr_teacher (now {self.config.lr_teacher:g}) may help"
                )
            self.keep(group, epoch + 1)
            with self.lock:
                self.bar.set_postfix_str(f"loss {losses.mean().item():.4g}", refresh=False)
                self.bar.update(len(numbers))
            if epoch + 1 == self.config.train_epochs or self.due():
                self.save(numbers, epoch + 1)

    def keep(self, group: Group, epoch: int) -> None:
        values = group.snapshots().cpu().numpy()
        for k, row in zip(group.numbers, values, strict=True):
            self.experts.trajectories[k, epoch] = row

    def due(self) -> bool:
        return time.monotonic() - self.saved > SECONDS_BETWEEN

    def save(self, numbers: list[int], epoch: int) -> None:
        """Snapshots up to this epoch are on the disk before the file says so."""
        with self.lock:
            self.experts.trajectories.flush()  # type: ignore[attr-defined]
            self.experts.written[numbers] = epoch + 1
            self.experts.written.flush()  # type: ignore[attr-defined]
            self.saved = time.monotonic()
