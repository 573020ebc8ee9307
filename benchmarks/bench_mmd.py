"""Squared maximum mean discrepancy (M3D's and other kernels): value, and gradient by x.

    python benchmarks/bench_mmd.py --out benchmarks/results/mmd.csv
    python benchmarks/bench_mmd.py --memory 10000 --out benchmarks/results/mmd_memory.json

The second form measures peak memory at n=m=10000, d=128 instead, in a process for each provider;
eager needs more than 7 GB there.

The baseline is the plain formula, |a|^2 + |b|^2 - 2ab, exponentials and means, with autograd, once
for each of the three matrices of pairs; for energy it is torch.cdist. "pooled" does it over one
matrix of all pooled rows, as M3D's code. GFLOP/s count four products of n x m x d for all
providers: distances of both sets and between them, each pair once, and the gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.bench import Case, commit, compiled, device_name, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.memory import peak_resident

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def by_formula(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances by one product."""
    norms = (a * a).sum(-1).unsqueeze(-1) + (b * b).sum(-1).unsqueeze(-2)
    return (norms - 2 * a @ b.mT).clamp_min(0)


def by_cdist(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b) ** 2


def values_of(kernel: str, squared: Tensor, h: Tensor) -> Tensor:
    if kernel == "energy":
        # What is added keeps the slope of the root finite on the diagonal.
        return -(squared + 1e-12).sqrt()
    return sum((torch.exp(-squared / (h * f)) for f in FACTORS), torch.zeros_like(squared))


def plain(
    distances: Callable[[Tensor, Tensor], Tensor], kernel: str, x: Tensor, y: Tensor
) -> Tensor:
    """MMD^2 of every class from the three matrices of pairs."""
    xx, xy, yy = (distances(a, b) for a, b in ((x, x), (x, y), (y, y)))
    rows = x.shape[-2] + y.shape[-2]
    total = sum(d.detach().sum((-2, -1), keepdim=True) for d in (xx, xy, xy, yy))
    h = total / (rows**2 - rows)
    means = [values_of(kernel, d, h).mean((-2, -1)) for d in (xx, xy, yy)]
    return means[0] - 2 * means[1] + means[2]


def pooled(kernel: str, x: Tensor, y: Tensor) -> Tensor:
    """The same from one matrix of all pairs of pooled rows, as M3D's code does it."""
    n, z = x.shape[-2], torch.cat([x, y], -2)
    squared = by_formula(z, z)
    rows = z.shape[-2]
    h = squared.detach().sum((-2, -1), keepdim=True) / (rows**2 - rows)
    values = values_of(kernel, squared, h)
    within = values[..., :n, :n].mean((-2, -1)) + values[..., n:, n:].mean((-2, -1))
    return within - 2 * values[..., :n, n:].mean((-2, -1))


def keops(kernel: str, x: Tensor, y: Tensor) -> Tensor:
    """The same with KeOps' lazy matrices."""
    from pykeops.torch import LazyTensor

    pooled = torch.cat([x, y], -2).detach()
    rows = pooled.shape[-2]
    centred = pooled - pooled.mean(-2, keepdim=True)
    h = 2 * rows * (centred**2).sum((-2, -1), keepdim=True) / (rows**2 - rows)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        left, right = LazyTensor(a.unsqueeze(-2)), LazyTensor(b.unsqueeze(-3))
        squared = ((left - right) ** 2).sum(-1)
        if kernel == "energy":
            values = -squared.sqrt()
        else:
            terms = [(-squared / LazyTensor((h * f).unsqueeze(-1))).exp() for f in FACTORS]
            values = sum(terms[1:], terms[0])
        total = values.sum(a.dim() - 1)
        return total.sum((-2, -1)) / (a.shape[-2] * b.shape[-2])

    return mean(x, x) - 2 * mean(x, y) + mean(y, y)


def has_keops() -> bool:
    try:
        import pykeops.torch  # noqa: F401
    except Exception:
        return False
    return True


def with_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    value = f(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def drawn(options: argparse.Namespace, *shape: int, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + mean).to(options.device)


def case(
    options: argparse.Namespace,
    kernel: str,
    n: int,
    m: int,
    d: int,
    classes: int | None = None,
    mode: str = "backward",
    formulas: bool = True,
) -> Case:
    """One pair of sets, or of `classes` sets at once; `formulas`: with other plain ones."""
    leading = () if classes is None else (classes,)
    x = drawn(options, *leading, n, d, seed=0).requires_grad_()
    y = drawn(options, *leading, m, d, seed=1, mean=0.1)
    # The formula leaves rounding on the diagonal, which is too much under a root.
    best, other = (by_cdist, by_formula) if kernel == "energy" else (by_formula, by_cdist)
    names = {by_cdist: "eager, cdist", by_formula: "eager, formula"}

    def provider(f: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return sizing.work(f, [x.detach()], mode)

    providers = {
        "eager": provider(lambda t: plain(best, kernel, t, y)),
        "ddfast": provider(lambda t: losses.mmd(t, y, kernel)),
    }
    if formulas:
        providers[names[other]] = provider(lambda t: plain(other, kernel, t, y))
        providers["eager, pooled"] = provider(lambda t: pooled(kernel, t, y))
    if mode == "backward":
        providers["ddfast, without autograd"] = lambda: losses.mmd_and_gradient(
            x.detach(), y, kernel
        )
    if sizing.compiles(options, mode):
        fast = compiled(lambda a, b: plain(best, kernel, a, b))
        providers["torch.compile"] = provider(lambda t: fast(t, y))
    # On a CPU KeOps takes a minute where the rest takes a second.
    if has_keops() and (options.device == "cuda" or n * m * d <= 1000 * 1000 * 128):
        providers["KeOps"] = provider(lambda t: keops(kernel, t, y))

    def exact() -> list[Tensor]:
        wide = y.double()
        with ddfast.use_backend("reference"):
            return sizing.work(lambda t: losses.mmd(t, wide, kernel), [x.detach().double()], mode)()

    batch = "" if classes is None else f"C={classes}, "
    return Case(
        operator="mmd",
        name=f"{kernel}, {batch}n={n}, m={m}, d={d}",
        mode=mode,
        exact=exact,
        providers=providers,
        # Both sets read, the gradient by the first written.
        bytes=4 * ((2 if mode == "backward" else 1) * x.numel() + y.numel()),
        tolerance=1e-2 if kernel == "energy" else 1e-3,
        rounds=sizing.rounds(options, 15 if n * m * d * (classes or 1) < 3e8 else 5),
        device=options.device,
        flops=(8 if mode == "backward" else 6) * n * m * d * (classes or 1),
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    shapes = [
        ("gaussian", 64, 64, 2048, 10),
        ("gaussian", 1000, 1000, 128, None),
        ("energy", 1000, 1000, 128, None),
        ("gaussian", 1000, 1000, 2048, None),
        ("energy", 1000, 1000, 2048, None),
        ("gaussian", 4000, 4000, 128, None),
        ("energy", 4000, 4000, 128, None),
        ("gaussian", 4000, 4000, 2048, None),
    ]
    for shape in shapes[: 3 if options.quick else None]:
        made = case(options, *shape)
        yield dataclasses.replace(made, mode="value and gradient")


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    # M3D's: of each class the decoded images, four of each, beside as many real ones, at most.
    syn, d = 4 * size.ipc, size.width * sizing.feature_side(size) ** 2
    wanted, rows = dataclasses.replace(size, batch_real=syn), 2 * syn
    few, note = sizing.share(
        wanted,
        options,
        memory=4 * (3 * rows * d + 8 * rows**2),
        operations=4 * rows**2 * d,
        moved=4 * (6 * rows * d + 30 * rows**2),
    )
    for kernel in ("gaussian", "energy"):
        for mode in sizing.wanted(options, "forward", "backward"):
            shape = (few.batch_real, few.batch_real, d, few.classes)
            made = case(options, kernel, *shape, mode=mode, formulas=False)
            yield dataclasses.replace(made, size=sizing.label(size, note))


def peak(device: str) -> int:
    """Largest memory so far, in bytes: resident, or on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def memory_of(provider: str, device: str, rows: int, d: int = 128) -> dict[str, int]:
    """Peak over the inputs of one value and gradient, in a process that does nothing else."""
    options = argparse.Namespace(device=device)
    x, y = drawn(options, rows, d, seed=0), drawn(options, rows, d, seed=1)

    def once(a: Tensor, b: Tensor) -> None:
        leaf = a.detach().requires_grad_()
        f = {
            "eager": lambda t: plain(by_formula, "gaussian", t, b),
            "ddfast": lambda t: losses.mmd(t, b),
        }[provider]
        with_gradient(f, leaf)

    once(x[:300], y[:300])  # code and libraries, which are loaded once
    before = peak(device)
    once(x, y)
    return {"bytes": peak(device) - before}


def memory(device: str, rows: int, out: Path | None) -> None:
    """Print and write the peak of each provider, each measured in a process of its own."""
    found = {}
    for provider in ("ddfast", "eager"):
        call = f"memory_of({provider!r}, {device!r}, {rows})"
        code = "import json; from ddfast.benchmarks.bench_mmd import memory_of; "
        code += f"print(json.dumps({call}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode != 0:
            print(f"{provider}: failed: {done.stderr[-300:]}")
            continue
        found[provider] = json.loads(done.stdout)["bytes"]
        print(f"n=m={rows}, d=128, {provider}: {found[provider] / 2**20:.1f} MiB", flush=True)
    if len(found) == 2:
        print(f"eager takes {found['eager'] / max(found['ddfast'], 1):.0f} times as much")
    if out is not None:
        machine = {"device": device_name(device), "torch": torch.__version__, "commit": commit()}
        measured = [
            {"provider": name, "rows": rows, "width": 128, "above_inputs_mib": round(b / 2**20, 1)}
            for name, b in found.items()
        ]
        out.write_text(json.dumps([row | machine for row in measured], indent=2) + "\n")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--memory", type=int, metavar="ROWS", help="rows of each set")
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        parser.add_argument("--out", type=Path, help="a JSON file")
        chosen = parser.parse_args()
        memory(chosen.device, chosen.memory, chosen.out)
    else:
        run(cases, __doc__ or "")
