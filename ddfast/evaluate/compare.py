"""A distilled set beside random selections and the full data, by the same protocol."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ddfast import nets
from ddfast._version import __version__
from ddfast.artefact import Artefact
from ddfast.data import Dataset
from ddfast.distill.folder import opened
from ddfast.distill.log import peak_memory
from ddfast.evaluate import presets
from ddfast.evaluate.kernel_regression import KRR, kernel_rows, kernels_of
from ddfast.evaluate.presets import LEARNED_LR
from ddfast.evaluate.progress import bar
from ddfast.evaluate.protocols import Protocol, by_own_schedule, steps_matched
from ddfast.evaluate.report import Report, Row
from ddfast.evaluate.sets import own_sets, random_sets, seen_alike
from ddfast.evaluate.train import TrainingSet, accuracy, train_networks
from ddfast.random import seed_of

__all__ = ["evaluate"]

OWN_STRATEGY = ("cafe", "linba", "rat_bptt")
"""Protocols with the augmentation that the set was distilled with."""


@dataclass(frozen=True)
class _Part:
    """Sets of one size that are trained on together, and the rows that come of it."""

    rows: dict[str, slice]  # name -> which of the sets
    sets: Sequence[TrainingSet]
    stored: int  # images of which each set is made
    protocol: Protocol
    seed: int

    @property
    def images(self) -> int:
        return len(self.sets[0][0])


def evaluate(
    distilled: Artefact | TrainingSet,
    dataset: Dataset,
    models: str | Sequence[str] = ("ConvNet",),
    protocol: str = "dm",
    num_eval: int = 5,
    seed: int = 0,
    selections: int = 5,
    baselines: bool = True,
    progress: bool = True,
    *,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    dsa_strategy: str | None = None,
    reg: float | None = None,
    device: str | torch.device | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Report:
    """Train networks on a distilled set and on what it has to be compared with, and test them.

    For each model the report has a row for the distilled set with its hard labels, one with its
    soft labels if it has any (a cross-entropy has no use for negative ones), one for random
    selections with as many images of each class, and one for the full data with about as many SGD
    steps (see `ddfast.evaluate.steps_matched`). With `krr` models are kernels, and nothing is
    trained. An artefact with a decoder is decoded first; what counts for the selections is what it
    stores, hallucinators or coefficients as so many images as would take the same storage. A
    learned learning rate is used with the distilled set by the protocols whose method learns one.
    Where the artefact is whitened, all other images are seen through its whitening.

    Args:
        distilled: an artefact (one with other constants is converted); or a pair of images,
            `(N, channels, H, W)`, float normalised as the data set is or uint8, and int64 labels.
        dataset: its test images decide; `ddfast.data.hold_out` for choosing settings without them.
        models: names for `ddfast.nets.build`; with `krr` of kernels, such as "ntk-fc3", see
            `ddfast.kernel_matrix.kernel_options`.
        protocol: `"dc"`, `"dsa"`, `"dm"`, `"idc"`, ...: see `ddfast.evaluate.protocol`.
        num_eval: networks for each set; with `krr` of no meaning.
        seed: all random numbers follow from it: the selections from (seed, "evaluate: selection",
            number), the networks as in `ddfast.evaluate.train_networks`.
        selections: how many random selections.
        baselines: False leaves out random selections and full data.
        progress: show a bar on stderr.
        epochs, batch, lr, dsa_strategy: override the protocol's. Without a dsa_strategy, cafe,
            linba and rat_bptt have that of the artefact's config, if it is of that method, and
            without a batch rat_bptt has that of its student.
        reg: of `krr`: the ridge. None for that of the artefact's config, else 1e-6.
        device: None for the GPU if there is one, else the CPU.
        out: folder for `report.json` and `report.md`, found to be writable before any work.

    Raises:
        TypeError, ValueError: settings or sets that cannot work, before any work.
        OSError: `out` cannot be written.
        NotFinite: a training came to values that are not finite; the message names it.
    """
    folder = None if out is None else opened(out)
    dataset = seen_alike(distilled, dataset)
    kernels, names = None, {}
    if protocol == KRR:
        given = [models] if isinstance(models, str) else list(models)
        refused = {"epochs": epochs, "batch": batch, "lr": lr, "dsa_strategy": dsa_strategy}
        kernels = kernels_of(given, distilled, dataset, reg, refused)
    else:
        if reg is not None:
            raise ValueError(f"reg has no meaning for protocol {protocol!r}, only for {KRR!r}")
        names = _checked_models(models, dataset)
    for what, value in (("num_eval", num_eval), ("selections", selections)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be an integer of at least 1, got {value!r}")
    stored, hard, soft = own_sets(distilled, dataset)
    others = random_sets(stored, dataset, selections, seed) if baselines else []
    factor = 1
    if isinstance(distilled, Artefact) and distilled.decoder is not None:
        factor = distilled.decoder.get("factor", 1)
    if isinstance(distilled, Artefact) and protocol == distilled.method:
        settings = distilled.config
        if protocol in OWN_STRATEGY and dsa_strategy is None:
            dsa_strategy = settings.get("dsa_strategy")
        if protocol == "rat_bptt" and batch is None:
            batch = settings["batch_per_class"] * settings["task_sampler_nc"]

    own_lr = lr
    if lr is None and protocol in LEARNED_LR and isinstance(distilled, Artefact):
        own_lr = distilled.lr if isinstance(distilled.lr, float) else None

    where = _device(device)
    began = time.monotonic()
    rows: list[Row] = []
    title = f"evaluating on {dataset.name}"
    if kernels is not None:
        sets = 1 + (soft is not None) + len(others) + bool(others)
        work = sets * len(kernels.by_name) * len(dataset.test_labels)
        with bar(work, title, progress) as advance:
            rows = kernel_rows(
                kernels, len(stored), hard, soft, others, dataset, seed, where, advance
            )
    else:
        plans = []
        for model, batchnorm in names.items():
            chosen = {
                images: presets.protocol(
                    protocol,
                    dataset,
                    batchnorm,
                    epochs=epochs,
                    batch=batch,
                    lr=lr,
                    dsa_strategy=dsa_strategy,
                    ipc=max(1, round(images / dataset.num_classes)),
                    factor=factor,
                )
                for images in {len(stored), len(hard[1])}
            }
            own = dataclasses.replace(chosen[len(hard[1])], lr=own_lr or chosen[len(hard[1])].lr)
            if protocol == "dd":
                own = _scheduled(own, distilled, model)
            labelled = soft if own.loss != "cross_entropy" or _are_shares(soft) else None
            parts = _parts(len(stored), hard, labelled, others, dataset, chosen, own, seed)
            plans.append((model, parts))
        work = sum(
            num_eval * len(part.sets) * part.images * part.protocol.passes
            for _, parts in plans
            for part in parts
        )
        with bar(work, title, progress) as advance:
            for model, parts in plans:
                for part in parts:
                    rows += _rows(part, model, dataset, num_eval, where, advance)
    report = Report(
        dataset=dataset.name,
        split=dataset.test_split,
        method=distilled.method if isinstance(distilled, Artefact) else "",
        seed=seed,
        rows=tuple(rows),
        seconds=time.monotonic() - began,
        machine={
            "device": where.type,
            "threads": torch.get_num_threads(),
            "ddfast": __version__,
            "torch": str(torch.__version__),
        },
    )
    if folder is not None:
        report.write_report(folder)
    return report


def _scheduled(preset: Protocol, distilled: Artefact | TrainingSet, model: str) -> Protocol:
    """The protocol by which networks of a model are trained on DD's own set."""
    if not isinstance(distilled, Artefact) or not isinstance(distilled.lr, tuple):
        raise ValueError("protocol: dd needs a set with a learned rate for each step, such as DD's")
    settings = distilled.config
    groups = settings.get("distill_steps")
    if not isinstance(groups, int) or groups < 1 or len(distilled.lr) % groups:
        raise ValueError(
            f"protocol: dd needs the number of groups in the set's config, got distill_steps "
            f"{groups!r} with {len(distilled.lr)} rates"
        )
    known = settings.get("init_net") == "fixed" and settings.get("model") == model
    return by_own_schedule(
        preset,
        distilled.lr,
        groups,
        settings.get("init_weights", "default"),
        (distilled.seed, settings.get("sample_n_nets", 1)) if known else None,
    )


def _checked_models(models: str | Sequence[str], dataset: Dataset) -> dict[str, bool]:
    """The names, each with whether it has batch normalisation."""
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise ValueError("models is empty: there is nothing to train")
    shape = (dataset.channels, dataset.num_classes, dataset.size)
    return {name: nets.has_batchnorm(nets.build(name, *shape)) for name in names}


def _parts(
    stored: int,
    hard: TrainingSet,
    soft: TrainingSet | None,
    others: list[TrainingSet],
    dataset: Dataset,
    chosen: dict[int, Protocol],
    own_protocol: Protocol,
    seed: int,
) -> list[_Part]:
    """The distilled set and, if there are random selections, these and the full data.

    Args:
        stored: images of the distilled set before it was decoded, and of each selection.
        chosen: the protocol by the number of images that are trained on.
        own_protocol: of the distilled set.
    """
    decoded = len(hard[1])
    own = {"distilled": slice(0, 1)}
    if others and stored == decoded and own_protocol == chosen[stored]:
        rows = {**own, "random selection": slice(1, None)}
        parts = [_Part(rows, [hard, *others], stored, chosen[stored], seed)]
    else:
        parts = [_Part(own, [hard], stored, own_protocol, seed)]
        if others:
            rows = {"random selection": slice(0, None)}
            other_seed = seed_of(seed, "evaluate: random selection")
            parts.append(_Part(rows, others, stored, chosen[stored], other_seed))
    if soft is not None:
        row = {"distilled, soft labels": slice(0, 1)}
        parts.insert(0, _Part(row, [soft], stored, own_protocol, seed))
    if others:
        full = (dataset.train_images, dataset.train_labels)
        matched = steps_matched(chosen[decoded], decoded, len(full[0]))
        full_seed = seed_of(seed, "evaluate: full data")
        row = {"full data": slice(0, 1)}
        parts.append(_Part(row, [full], len(full[0]), matched, full_seed))
    return parts


def _rows(
    part: _Part,
    model: str,
    dataset: Dataset,
    num_eval: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> list[Row]:
    """Train and test the networks of one part."""
    began = time.monotonic()
    trained = train_networks(
        part.sets,
        model,
        dataset,
        part.protocol,
        num_eval,
        part.seed,
        device=device,
        on_progress=lambda networks: advance(networks * part.images),
    )
    accuracies = tuple(tuple(100 * accuracy(net, dataset) for net in each) for each in trained)
    seconds = time.monotonic() - began
    rows = []
    for name, which in part.rows.items():
        mine = accuracies[which]
        rows.append(
            Row(
                name=name,
                model=model,
                protocol=part.protocol,
                images=part.images,
                ipc=part.stored / dataset.num_classes,
                ratio=part.stored / len(dataset.train_labels),
                accuracies=mine,
                seconds=seconds * len(mine) / len(accuracies),
                peak_memory=peak_memory(device),
            )
        )
    return rows


def _are_shares(soft: TrainingSet | None) -> bool:
    """Whether a cross-entropy can have these labels: none is negative."""
    return soft is not None and bool((soft[1] >= 0).all())


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
