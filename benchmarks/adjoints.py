"""MTT with the exact gradient and with TESLA's frozen one, at equal steps, and how they differ.

    python benchmarks/adjoints.py digits 1 --out adjoints.csv

Two runs from the same images, one led by each gradient, with the same experts, epochs, minibatches
and augmentations. Every few iterations both gradients are computed at the run's state: printed are
the loss and, of the images' gradients, their cosine and the ratio of their norms. At the end come
the mean loss of the last tenth of the iterations and the accuracy of five networks on a fifth of
the training images, which is held out. The settings are the method's defaults, see accuracy.py.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from ddfast import data, methods
from ddfast.artefact import Artefact
from ddfast.benchmarks.accuracy import MODEL, dataset_of, settings_of, train_experts
from ddfast.evaluate import evaluate
from ddfast.memory import DEFAULT
from ddfast.methods import mtt
from ddfast.methods.trajectory_matching import gradients, segment

COLUMNS = ["led by", "iteration", "loss", "cosine", "norm ratio"]


def compared(run: methods.Run) -> dict[str, Any]:
    """Loss and both gradients of the images at the run's present state."""
    part, found = segment(run), {}
    for adjoint in ("exact", "frozen"):
        losses, by_name = gradients(run, part, adjoint=adjoint)
        found[adjoint] = by_name["images"].flatten()
    exact, frozen = found["exact"], found["frozen"]
    return {
        "iteration": run.iteration,
        "loss": losses[0].item(),
        "cosine": cosine_similarity(exact, frozen, dim=0).item(),
        "norm ratio": (frozen.norm() / exact.norm()).item(),
    }


def led_by(
    adjoint: str, dataset: data.Dataset, settings: dict[str, Any], every: int
) -> list[dict[str, Any]]:
    """A whole run; prints as it goes."""
    config = methods.resolve(mtt.Config(**settings, adjoint=adjoint), dataset)
    run = methods.start(config, dataset, DEFAULT)
    mtt.check(run)
    run.say = print
    rows, losses = [], []
    for run.iteration in range(config.iterations):
        if run.iteration % every == 0 or run.iteration == config.iterations - 1:
            rows.append({"led by": adjoint, **compared(run)})
            print(" ".join(f"{name} {_short(value)}" for name, value in rows[-1].items()))
        losses.append(mtt.step(run)[0].item())
    artefact = Artefact(
        **config.distilled(run.tensors, run.state),
        labels=run.labels,
        space=config.space,
        decoder=run.decoder,
        mean=dataset.mean,
        std=dataset.std,
        class_names=dataset.class_names,
        dataset=dataset.name,
        method="mtt",
        config=methods.as_json(config),
        seed=config.seed,
    )
    report = evaluate(artefact, dataset, MODEL, mtt.PROTOCOL, baselines=False, progress=False)
    last = losses[-max(1, len(losses) // 10) :]
    print(
        f"led by {adjoint}: loss {sum(last) / len(last):.4g} in the last tenth of "
        f"{len(losses)} iterations, lr {artefact.lr:.4g}, accuracy {report.rows[0].accuracy}"
    )
    return rows


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=["digits", "generated"])
    parser.add_argument("ipc", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--syn_steps", type=int)
    parser.add_argument("--lr_teacher", type=float)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="CSV to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = data.hold_out(dataset_of(options.dataset), 0.2, 0)
    given = {name: getattr(options, name) for name in ("iterations", "syn_steps", "lr_teacher")}
    settings = settings_of("mtt", options.dataset, options.ipc)
    settings |= {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        settings["experts"] = str(Path(folder, "experts"))
        train_experts("mtt", dataset, settings)
        rows = [
            row
            for adjoint in ("exact", "frozen")
            for row in led_by(adjoint, dataset, settings, options.every)
        ]
    if options.out:
        with open(options.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
