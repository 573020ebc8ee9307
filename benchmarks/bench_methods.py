"""Every method's iteration: what `ddfast distill` does between two lines of its log.

    python benchmarks/bench_methods.py

A run is made as `ddfast distill` makes it, prepared, and taken through its first iteration; what is
timed is its second, again and again from the same state. The images are noise. "reference" answers
every operator by its definition in plain torch (`use_backend`) and leaves the method's structure as
it is. It is not the official script's loop over classes; bench_gradient_matching.py and
bench_distribution_matching.py have that.

Settings are the published ones, but an iteration is cut short where it consists of many equal parts
(`LOOPS`): trainings of networks, steps of students, frequencies. The memory and the time at hand
decide on classes, real images and images per class. With --quick the network is narrow. With it, or
beyond 32 pixels, RFAD does without its transform, a matrix of pixels by pixels that would take all
the time. Kernels of convolutional networks are replaced by fully connected ones beyond 16 pixels,
where their definition takes minutes.

Verified are the synthetic set, and all else that a checkpoint keeps, after the iteration: how far
each tensor's change is from the reference's, in norm, relative to that change. A ReLU whose input
rounds to the other side of zero moves an image's gradient by up to some per cent in any program;
reported is the median over the images, for other tensors the whole. Where that is more than allowed
the reference goes again from images changed by as much as a fast convolution rounds (2e-6), and
twice what it then is off by is allowed, but no more than 0.2: the error reported is scaled by it.

RaT-BPTT runs in float64: its gradient goes through Adam's steps on biases in front of a norm, whose
own gradient is rounding and nothing else, so that in float32 two right programs can differ by as
much as it is large.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddfast
from ddfast import generator, methods
from ddfast.bench import Case, run
from ddfast.bench.sizes import SIZES, Size
from ddfast.benchmarks import sizing
from ddfast.benchmarks.random_images import noise
from ddfast.data import Dataset
from ddfast.experts import train as experts
from ddfast.memory import DEFAULT
from ddfast.methods import Method, Run
from ddfast.methods.run import learned, restore

AT_MOST = {
    0: ("pretrain_epochs",),
    1: (
        # Epochs between two updates of the images, and a queue's or pool's training.
        *("inner_loop", "inner_most", "outer_warmup", "inner_warmup", "n_data", "distill_epochs"),
        *("model_train_steps", "fetch_net_num", "num_premodel", "n_models", "inversion_steps"),
        # Trajectories of one expert.
        *("expert_epochs", "max_start_epoch", "current_max_start_epoch"),
    ),
    # Updates of the images, steps of a student and of what is differentiated, networks.
    2: ("outer_loop", "outer_most", "syn_steps", "distill_steps", "inner_steps", "window"),
    3: ("totwindow", "pool_size", "net_num"),
    # Frequencies: drawing them is most of what their definition takes.
    256: ("num_freqs",),
}
LOOPS = {name: most for most, names in AT_MOST.items() for name in names}
"""The most that a setting of this name may be, in whatever method has it."""

LARGEST_CONVOLUTIONAL = 16
TOLERANCE, MOST_ALLOWED = 1e-2, 0.2
# Where images share something, such as LinBa's bases, no median makes up for a flip: off by 1.04e-2
# was measured at 64 pixels.
TOLERANCE_SHARED = 3e-2
IN_DOUBLE = ("rat_bptt",)


def shown(name: str, size: Size) -> str:
    """The published network at the size's depth and width: ConvNet, ConvNetW256NN, FRePoNet."""
    base, suffix = re.fullmatch(r"(\w*?Net)(?:D\d+)?(?:W\d+)?(NN)?", name).groups()  # type: ignore
    return f"{base}D{size.depth}W{size.width}{suffix or ''}"


def settings_of(
    method: Method, size: Size, dataset: Dataset, quick: bool, folder: Path
) -> dict[str, Any]:
    """What differs from the published settings."""
    fields = {field.name for field in dataclasses.fields(method.config)}
    found: dict[str, Any] = {"ipc": size.ipc}
    if "generator" in fields:
        found["generator"] = str(folder / "generator.safetensors")
        generator.save(
            generator.Generator(
                dataset.num_classes, dataset.channels, dataset.size, width=max(2, size.width // 4)
            ),
            found["generator"],
            {"dataset": dataset.name, "class_names": dataset.class_names},
        )
    published: Any = methods.resolve(method.config(**found), dataset)
    found["model"] = shown(published.model, size)
    found |= {
        name: min(getattr(published, name), most) for name, most in LOOPS.items() if name in fields
    }
    if "distill_steps" in fields:  # each has as many images of a class
        found["distill_steps"] = math.gcd(found["distill_steps"], size.ipc)
    if getattr(published, "threshold", None) is not None:  # above it nothing would move
        found["threshold"] = 1e6
    if "transform" in fields and (quick or min(dataset.size) > 32):
        found["transform"] = False
    share = min(1.0, size.batch_real / SIZES["cifar10"].batch_real)
    for name in ("batch_real", "batch_train", "batch_latents", "batch_per_class"):
        if name in fields:  # published for 256 real images of a class, or about
            scaled = math.ceil(getattr(published, name) * share)
            found[name] = min(max(2, scaled), len(dataset.train_labels))
    if published.shared is not None:  # so few that coefficients find a place beside them
        most = size.classes * size.ipc * published.base_scale**2
        found["shared"] = min(published.shared, most - 1)
    if "task_sampler_nc" in fields:
        found["task_sampler_nc"] = min(published.task_sampler_nc, dataset.num_classes)
    if (
        str(getattr(published, "kernel", "")).startswith("ntk-")
        and min(dataset.size) > LARGEST_CONVOLUTIONAL
    ):
        found["kernel"] = "ntk-fc3"
    if "experts" in fields:
        # The published steps are too large for a single epoch's way: the second would be undone.
        found["lr_img"] = published.lr_img / 100
        found["experts"] = str(folder)
        expert = experts.Config(
            model=found["model"],
            num_experts=1,
            batch_train=len(dataset.train_labels),
            **{name: found[name] for name in ("expert_epochs", "max_start_epoch")},
        )
        experts.train(dataset, expert, folder, progress=False, device="cpu")
    return found


def prepared(method: Method, size: Size, options: argparse.Namespace, folder: Path) -> Run:
    """A run that stands before its second iteration; before its first if that is the only one."""
    dataset = noise(size, size.classes, max(size.batch_real, 4 * size.ipc))
    settings = settings_of(method, size, dataset, options.quick, folder)
    config = methods.resolve(method.config(**settings), dataset)
    dtype = torch.float64 if method.name in IN_DOUBLE else torch.float32
    # As much as `ddfast distill` allows itself: plans are made for more than is taken.
    memory = max(options.memory, DEFAULT)
    made = methods.start(config, dataset, memory, options.device, dtype)
    method.check(made)
    for _ in method.prepare(made):
        pass
    if config.iterations > 1:
        method.step(made)
        made.iteration += 1
    return made


class Iteration:
    """A run's next iteration, from the same state every time."""

    def __init__(self, method: Method, made: Run) -> None:
        self.method, self.run = method, made
        self.before = {name: tensor.clone() for name, tensor in learned(made).items()}
        self.state, self.images = dict(made.state), 0

    def __call__(self, backend: str) -> dict[str, Tensor]:
        """What a checkpoint would keep afterwards."""
        made, begun = self.run, self.run.processed
        restore(made, {name: tensor.clone() for name, tensor in self.before.items()})
        made.state = dict(self.state)
        with ddfast.use_backend(backend) if backend != "auto" else contextlib.nullcontext():
            self.method.step(made)
        self.images = made.processed - begun
        return {name: t.clone() for name, t in (learned(made) | made.state).items()}

    def error(self, result: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
        """Of the worst tensor, see above; 1 where other tensors are there, or nothing has moved."""
        found = self.distance(result, exact)
        if not TOLERANCE < found < 1:
            return found
        allowed = min(2 * self.sensitivity(exact), MOST_ALLOWED)
        return found / max(1.0, allowed / TOLERANCE)

    def sensitivity(self, exact: dict[str, Tensor]) -> float:
        """How far the reference gets from its own result if the images are a rounding or so off."""
        before, worst = self.before, 0.0
        rows = self.run.config.rows
        for seed in range(3):
            start = before[rows]
            noise = 16 * torch.finfo(start.dtype).eps * sizing.drawn(start.shape, seed, start)
            self.before = before | {rows: start * (1 + noise)}
            try:
                moved = self("reference")
            finally:
                self.before = before
            moved[rows] = moved[rows] - start * noise
            worst = max(worst, self.distance(moved, exact))
        return worst

    def distance(self, result: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
        """The error without regard to what the reference does."""
        if result.keys() != exact.keys():
            return 1.0
        before, worst, moved = self.before | self.state, 0.0, False
        for name, wanted in exact.items():
            if not wanted.dtype.is_floating_point:
                worst = max(worst, float(not torch.equal(result[name], wanted)))
                continue
            found, wanted = result[name].double(), wanted.double()
            start = before[name].double() if name in before else torch.zeros_like(wanted)
            rows = len(wanted) if name == self.run.config.rows else 1
            change = (wanted - start).reshape(rows, -1).norm(dim=1)
            wrong = (found - wanted).reshape(rows, -1).norm(dim=1)
            unmoved = change == 0
            moved |= name in self.run.tensors and not bool(unmoved.all())
            # Rounding of the value itself: a difference below it says nothing.
            epsilon = torch.finfo(exact[name].dtype).eps
            rounding = epsilon * wanted.reshape(rows, -1).norm(dim=1)
            relative = (wrong - rounding).clamp_min(0) / change.clamp_min(1e-30)
            relative[unmoved] = (wrong > rounding)[unmoved].double()
            worst = max(worst, float(relative.median()))
        return worst if moved else 1.0


def case(method: Method, size: Size, options: argparse.Namespace) -> Case:
    """One method at just this size."""
    folder = tempfile.TemporaryDirectory()  # lives as long as the case
    made = prepared(method, size, options, Path(folder.name))
    iteration = Iteration(method, made)
    made.scratch = folder  # type: ignore[attr-defined]
    exact = iteration("reference")
    config: Any = made.config
    kernel = str(getattr(config, "kernel", ""))
    kernel = kernel if "-" in kernel else ""  # others are of features
    network = kernel or config.model
    image = size.channels * size.side**2 * made.dtype.itemsize
    return Case(
        operator=f"method:{method.name}",
        name=f"{network}, {size.side} px, C={size.classes}, ipc {size.ipc}, n={config.batch_real}",
        mode="iteration",
        exact=lambda: exact,
        providers={
            "reference": lambda: iteration("reference"),
            "ddfast": lambda: iteration("auto"),
        },
        # Every image that a network sees is read, and the synthetic set read and written.
        bytes=image * (iteration.images + 2 * size.classes * size.ipc),
        # And goes forward through the convolutions at least once, where there are any.
        flops=0 if kernel else iteration.images * sizing.operations_of_image(size),
        tolerance=TOLERANCE_SHARED if set(made.tensors) - {config.rows} else TOLERANCE,
        rounds=7,
        device=options.device,
        error=iteration.error,
        dtype=str(made.dtype).removeprefix("torch."),
    )


def few_of(size: Size, options: argparse.Namespace) -> tuple[Size, str]:
    """What of the size an iteration has time and memory for; in quick with a narrow network."""
    width = min(size.width, 16) if options.quick and options.device == "cpu" else size.width
    narrow = dataclasses.replace(size, width=width)
    few, note = sizing.several_classes(
        narrow,
        options,
        memory=32 * width * size.side**2,
        operations=20 * sizing.operations_of_image(narrow),
        seconds=2,
    )
    few = dataclasses.replace(few, batch_real=max(few.batch_real, 2))
    notes = [f"width {width} of {size.width}"] if width < size.width else []
    return few, ", ".join([*notes, note] if note else notes)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    if "iteration" not in sizing.wanted(options, "iteration"):
        return
    few, note = few_of(size, options)
    chosen = getattr(options, "methods", None) or methods.methods()
    for name in chosen:
        made = case(methods.find(name), few, options)
        yield dataclasses.replace(made, size=sizing.label(size, note))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    given: dict[str, Any] = {"memory": 1 << 30} | vars(options)
    yield from sized(SIZES["cifar10"], argparse.Namespace(**given))


if __name__ == "__main__":
    run(cases, __doc__ or "")
