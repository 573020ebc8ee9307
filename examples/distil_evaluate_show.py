"""Distil, evaluate beside random selection and full data, save the picture: all from Python.

    python examples/distil_evaluate_show.py --out runs/example

The folder holds the run. Interrupt it and start it again: it goes on with the same bits. The file
`distilled.safetensors` carries its preprocessing, and can be read anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ddfast.artefact import Artefact
from ddfast.data import load
from ddfast.distill import distill
from ddfast.evaluate import evaluate
from ddfast.methods import find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="dm")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--iterations", type=int, help="default: those published")
    parser.add_argument("--epochs", type=int, help="of the evaluation; default: those published")
    parser.add_argument("--out", default="runs/example")
    options = parser.parse_args()

    dataset, method = load("digits"), find(options.method)
    config = method.config(ipc=options.ipc, iterations=options.iterations)
    distill(method.name, dataset, config, options.out)

    file = Path(options.out) / "distilled.safetensors"
    artefact = Artefact.load(file)
    print(artefact)
    print(f"{artefact.picture(Path(options.out) / 'digits.png')} shows the images")
    report = evaluate(
        artefact,
        dataset,
        models=["ConvNetD2W32", "MLP"],
        protocol=method.protocol,
        num_eval=3,
        selections=2,
        epochs=options.epochs,
        out=options.out,
    )
    print(report.to_markdown())
    best = report.row("distilled", "ConvNetD2W32")
    print(f"{best.mean:.1f} % with {len(artefact.images)} images")


if __name__ == "__main__":
    main()
