"""The gradient of MTT's loss through T steps of a student: one outer iteration's worth.

    python benchmarks/bench_unroll.py --out benchmarks/results/unroll.csv
    python benchmarks/bench_unroll.py --memory --out benchmarks/results/unroll_memory.json

ConvNet-3 with instance norm, 3x32x32, 100 images, all in every step; the loss is the distance of
the final parameters from given ones, the gradient that of the images and of the learning rate.
"eager" keeps the graphs of all steps as MTT's code does, "eager, TESLA" goes through each step
twice and freezes the parameters as TESLA's does. Each is judged by the float64 result of its own
kind: image by image, since a ReLU whose input rounds to the other side of zero moves an image's
gradient in any program; what is reported is the median over images. The eager graph is left out
where it would take more than --most GB.

The second form weighs instead: each provider and T in a process of its own, the peak of a whole
gradient over the peak of one with T = 1. --threads 1 throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ddfast.bench import Case, commit, device_name, run
from ddfast.benchmarks.matching_task import judged
from ddfast.benchmarks.unroll_task import PROVIDERS, Result, Student, ddfast
from ddfast.memory import peak_resident
from ddfast.unroll import estimate_memory

GRAPH = {64: 170e6, 128: 340e6}  # bytes that the eager graph takes per step and 100 images
SIZES = [(64, 5), (64, 10), (64, 20), (64, 40), (128, 5), (128, 10), (128, 20)]
WEIGHED = [(width, steps) for width in (64, 128) for steps in (5, 10, 20, 40, 80)]


def error(result: object, exact: object) -> float:
    """Of loss and learning rate, and the median over images; 1 where many images are off."""
    kind, found = result  # type: ignore[misc]
    wanted = exact[kind]  # type: ignore[index]
    by_lr = float((found[2].double() - wanted[2]).abs() / wanted[2].abs())
    return max(by_lr, judged(found[:2], wanted[:2]))


def case(width: int, steps: int, options: argparse.Namespace) -> Case:
    student = Student.made(width, steps, device=options.device)

    def exact() -> dict[str, list[torch.Tensor]]:
        wide = student.double()
        wide.net.double()
        results: list[Result] = [ddfast(wide, adjoint) for adjoint in ("exact", "frozen")]
        wide.net.float()
        return dict(results)

    names = list(PROVIDERS)
    if steps * GRAPH[width] > options.most * 1e9:
        names = [name for name in names if name not in ("eager", "ddfast graph")]
    return Case(
        operator="unroll",
        name=f"ConvNet-3 width {width}, 100 images, T = {steps}",
        mode="forward + backward",
        exact=exact,
        providers={name: lambda f=PROVIDERS[name]: f(student) for name in names},  # type: ignore[misc]
        bytes=8 * student.images.numel(),
        rounds=3 if steps * width > 640 else 5,
        device=options.device,
        tolerance=1e-2,
        error=error,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    options.most = 10.0
    for width, steps in SIZES[:2] if options.quick else SIZES:
        yield case(width, steps, options)


def weigh(provider: str, width: int, steps: int) -> dict[str, int]:
    """Peaks of this process: before, after a gradient of one step, after one of all."""
    torch.set_num_threads(1)
    student = Student.made(width, steps)
    before = peak_resident()
    PROVIDERS[provider](Student.made(width, 1))
    one = peak_resident()
    PROVIDERS[provider](student)
    return {"before": before, "one_step": one, "all_steps": peak_resident()}


def memory(arguments: list[str]) -> None:
    """The peaks of all providers and T, printed and written to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs="*", default=None)
    parser.add_argument("--most", type=float, default=8.0, help="GB that a graph may take")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.memory:
        provider, width, steps = options.memory
        print(json.dumps(weigh(provider, int(width), int(steps))))
        return
    rows = []
    for width, steps in WEIGHED:
        for provider in ("eager", "eager, TESLA", "ddfast", "ddfast frozen"):
            if provider == "eager" and steps * GRAPH[width] > options.most * 1e9:
                continue
            words = [sys.executable, __file__, "--memory", provider, str(width), str(steps)]
            done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
            found = json.loads(done.stdout) if done.returncode == 0 else {}
            row = {"provider": provider, "width": width, "steps": steps}
            for name, start in (("above_one_step", "one_step"), ("above_inputs", "before")):
                value = found["all_steps"] - found[start] if found else None
                row[f"{name}_mib"] = "" if value is None else round(value / 2**20, 1)
            row["estimated_mib"] = ""
            if provider.startswith("ddfast"):
                student = Student.made(width, steps)
                kind = "frozen" if "frozen" in provider else "exact"
                reckoned = estimate_memory(student.net, (3, 32, 32), 100, steps, kind)
                row["estimated_mib"] = round(reckoned / 2**20, 1)
            row |= {"device": device_name("cpu"), "commit": commit()}
            print(row, flush=True)
            rows.append(row)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        memory(sys.argv[1:])
    else:
        run(cases, __doc__ or "")
