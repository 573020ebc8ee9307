"""Differentiable siamese augmentation: forward, and its derivatives by the images.

    python benchmarks/bench_augment.py --out benchmarks/results/augment.csv

The baseline does what the official scripts do on each call: it reseeds the global generator before
each draw, draws for every image and keeps the first, builds theta from Python lists and indexes
with meshgrids. "torch given parameters" is the best plain torch for one draw that is already known,
and what torch.compile gets. "ddfast" draws from a private generator and then applies that known
draw, so that results can be compared; "ddfast DiffAugment" draws the same numbers as the baseline.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.augment import DSA, OPERATIONS
from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.compat.dc import DiffAugment, ParamDiffAug

SEED = 8  # mirrors, shifts both ways, erases a full square


# --- as the official scripts do -----------------------------------------------------------------


class Siamese:
    """Draws for all images with a global generator that is reseeded every time."""

    def __init__(self, x: Tensor, seed: int) -> None:
        self.n, self.device, self.seed = x.shape[0], x.device, seed

    def reseed(self) -> None:
        torch.random.manual_seed(self.seed)
        self.seed += 1

    def uniform(self, *shape: int, device: torch.device | str) -> Tensor:
        self.reseed()
        values = torch.rand(self.n, *shape, device=device)
        values[:] = values[
            0
        ].clone()  # the official script leaves the clone out and fails for n = 1
        return values

    def integers(self, low: int, high: int) -> Tensor:
        self.reseed()
        values = torch.randint(low, high, (self.n, 1, 1), device=self.device)
        values[:] = values[0].clone()
        return values

    def mesh(self, *sizes: int) -> tuple[Tensor, ...]:
        places = [torch.arange(size, device=self.device) for size in (self.n, *sizes)]
        return torch.meshgrid(*places, indexing="ij")


def color(x: Tensor, draws: Siamese) -> Tensor:
    x = x + (draws.uniform(1, 1, 1, device=x.device) - 0.5) * 1.0
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (draws.uniform(1, 1, 1, device=x.device) * 2.0) + mean
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    return (x - mean) * (draws.uniform(1, 1, 1, device=x.device) + 0.5) + mean


def crop(x: Tensor, draws: Siamese) -> Tensor:
    height, width = x.shape[2:]
    down, right = (int(size * 0.125 + 0.5) for size in (height, width))
    shift_i, shift_j = draws.integers(-down, down + 1), draws.integers(-right, right + 1)
    batch, i, j = draws.mesh(height, width)
    i = torch.clamp(i + shift_i + 1, 0, height + 1)
    j = torch.clamp(j + shift_j + 1, 0, width + 1)
    padded = F.pad(x, [1, 1, 1, 1])
    return padded.permute(0, 2, 3, 1).contiguous()[batch, i, j].permute(0, 3, 1, 2)


def cutout(x: Tensor, draws: Siamese) -> Tensor:
    sizes = x.shape[2:]
    sides = [int(size * 0.5 + 0.5) for size in sizes]
    centres = [
        draws.integers(0, size + 1 - side % 2) for size, side in zip(sizes, sides, strict=True)
    ]
    batch, *places = draws.mesh(*sides)
    i, j = (
        torch.clamp(place + centre - side // 2, 0, size - 1)
        for place, centre, side, size in zip(places, centres, sides, sizes, strict=True)
    )
    mask = torch.ones(x.shape[0], *sizes, dtype=x.dtype, device=x.device)
    mask[batch, i, j] = 0
    return x * mask.unsqueeze(1)


def flip(x: Tensor, draws: Siamese) -> Tensor:
    return torch.where(draws.uniform(1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def resample(x: Tensor, theta: list[list[list[Tensor | int]]]) -> Tensor:
    matrices = torch.tensor(theta, dtype=torch.float)
    matrices[:] = matrices[0].clone()
    grid = F.affine_grid(matrices.to(x.dtype), list(x.shape), align_corners=False).to(x.device)
    return F.grid_sample(x, grid, align_corners=False)


def scale(x: Tensor, draws: Siamese) -> Tensor:
    sx, sy = (draws.uniform(device="cpu") * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2))
    return resample(x, [[[sx[n], 0, 0], [0, sy[n], 0]] for n in range(x.shape[0])])


def rotate(x: Tensor, draws: Siamese) -> Tensor:
    angle = (draws.uniform(device="cpu") - 0.5) * 2 * 15 / 180 * math.pi
    theta: list[list[list[Tensor | int]]] = [
        [
            [torch.cos(angle[n]), torch.sin(-angle[n]), 0],
            [torch.sin(angle[n]), torch.cos(angle[n]), 0],
        ]
        for n in range(x.shape[0])
    ]
    return resample(x, theta)


OFFICIAL = (color, crop, cutout, flip, scale, rotate)


def official(x: Tensor, operation: int) -> Tensor:
    """One call: the operation is drawn, too, from a strategy that has only this one."""
    draws = Siamese(x, SEED)
    draws.reseed()
    torch.randint(0, 1, size=(1,))
    return OFFICIAL[operation](x, draws).contiguous()


# --- with known parameters ----------------------------------------------------------------------


def parameters(operation: int, size: tuple[int, int]) -> list[float]:
    """The three parameters that the draws above lead to."""
    sources = [torch.Generator().manual_seed(SEED + 1 + k) for k in range(3)]
    name = OPERATIONS[operation]
    if name in ("crop", "cutout"):
        numbers = []
        for side, source in zip(size, sources[:2], strict=True):
            k, square = int(side * 0.125 + 0.5), int(side * 0.5 + 0.5)
            low, high = (-k, k + 1) if name == "crop" else (0, side + 1 - square % 2)
            numbers.append(float(torch.randint(low, high, (1,), generator=source)))
        return [*numbers, 0.5 if name == "cutout" else 0.0]
    u, v, w = (torch.rand(1, generator=source) for source in sources)
    if name == "color":
        return [float(u - 0.5), float(v * 2), float(w + 0.5)]
    if name == "flip":
        return [float(u < 0.5), 0.0, 0.0]
    if name == "scale":
        return [float(t * (1.2 - 1 / 1.2) + 1 / 1.2) for t in (u, v)] + [0.0]
    return [float((u - 0.5) * 2 * 15 / 180 * math.pi), 0.0, 0.0]


def given(x: Tensor, operation: int, p: Tensor) -> Tensor:
    """Plain torch without draws, indices and grids that repeat for every image."""
    name, (height, width) = OPERATIONS[operation], x.shape[2:]
    if name == "color":
        x = x + p[0]
        mean = x.mean(1, keepdim=True)
        x = mean + p[1] * (x - mean)
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + p[2] * (x - mean)
    if name == "flip":
        return torch.where(p[0] > 0, x.flip(3), x)
    if name in ("crop", "cutout"):
        i, j = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        if name == "crop":
            i, j = i + p[0].long(), j + p[1].long()
            mask = ((i >= 0) & (i < height))[:, None] & ((j >= 0) & (j < width))
            moved = x.index_select(2, i.clamp(0, height - 1))
            return moved.index_select(3, j.clamp(0, width - 1)) * mask
        inside = []
        for place, centre, size in ((i, p[0], height), (j, p[1], width)):
            side = int(size * 0.5 + 0.5)
            start = centre.long() - side // 2
            inside.append((place >= start) & (place < start + side))
        return x * ~(inside[0][:, None] & inside[1])
    zero = torch.zeros_like(p[0])
    if name == "scale":
        rows = [torch.stack([p[0], zero, zero]), torch.stack([zero, p[1], zero])]
    else:
        cos, sin = torch.cos(p[0]), torch.sin(p[0])
        rows = [torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])]
    grid = F.affine_grid(torch.stack(rows)[None], [1, 1, height, width], align_corners=False)
    return F.grid_sample(x, grid.expand(x.shape[0], -1, -1, -1), align_corners=False)


# --- cases --------------------------------------------------------------------------------------


def case(
    shape: tuple[int, ...], operations: list[int], mode: str, options: argparse.Namespace
) -> Case:
    """One batch through each of the operations in turn."""
    x = sizing.drawn(shape, 0).to(options.device)
    size = (shape[2], shape[3])
    # One turn of a small batch would mostly time caches that the provider before it has emptied.
    turns = 1 if options.quick else max(1, 200_000 // x.numel())
    values = [torch.tensor(parameters(k, size), device=options.device) for k in range(6)]
    draws = [torch.tensor([[[k, *parameters(k, size)]]], dtype=torch.float64) for k in range(6)]

    def every(f: Callable[[Tensor, int], Tensor], images: Tensor = x) -> Callable[[], object]:
        # Linear in the images: the second derivative is by the cotangent of the result.
        by_operation = [
            sizing.work(lambda t, k=k: f(t, k), [images], mode, linear=True) for k in operations
        ]
        called = False

        def work() -> object:
            nonlocal called
            kept: list[Tensor] = []
            for each in by_operation * (turns if called else 1):
                results = each()
                if not called:  # only the first call's results are looked at
                    kept += results
            called = True
            return kept

        return work

    source, param = torch.Generator().manual_seed(0), ParamDiffAug()
    augmentations = [DSA(name) for name in OPERATIONS]

    def ours(t: Tensor, k: int) -> Tensor:
        augmentations[k].draw(source, size)
        return augmentations[k](t, draws[k])

    providers = {
        "eager": every(official),
        "torch given parameters": every(lambda t, k: given(t, k, values[k])),
        "ddfast": every(ours),
        "ddfast DiffAugment": every(lambda t, k: DiffAugment(t, OPERATIONS[k], SEED, param)),
    }
    if sizing.compiles(options, mode):
        fast = [compiled(lambda t, p, k=k: given(t, k, p)) for k in range(6)]
        providers["torch.compile"] = every(lambda t, k: fast[k](t, values[k]))
    names = "six operations" if len(operations) == 6 else OPERATIONS[operations[0]]
    batches = {"forward": 1, "backward": 2, "double": 3}[mode]  # each one read and one written
    return Case(
        operator="augment",
        name=f"{'x'.join(map(str, shape))}, {names}" + (f", {turns} times" if turns > 1 else ""),
        mode=mode,
        exact=every(official, x.double()),
        providers=providers,
        bytes=turns * len(operations) * batches * 2 * 4 * x.numel(),
        rounds=sizing.rounds(options, 15 if x.numel() > 2e6 else 25),
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    every = list(range(6))
    titles = {"backward": "forward and gradient", "forward": "forward"}
    for shape in ((256, 3, 32, 32), (10, 3, 32, 32), (64, 3, 128, 128)):
        if shape[3] > 32 and options.quick:
            continue
        for mode, title in titles.items():
            yield dataclasses.replace(case(shape, every, mode, options), mode=title)
    if not options.quick:
        for k in every:
            made = case((256, 3, 32, 32), [k], "backward", options)
            yield dataclasses.replace(made, mode=titles["backward"])


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    # Forth and back, six operations of some ten passes each.
    each = 4 * size.batch_real * size.channels * size.side**2
    few, note = sizing.share(sizing.batch_only(size), options, memory=8 * each, moved=120 * each)
    shape = (few.batch_real, size.channels, size.side, size.side)
    for mode in sizing.wanted(options, *sizing.ORDERS):
        made = case(shape, list(range(6)), mode, options)
        yield dataclasses.replace(made, size=sizing.label(size, note))


if __name__ == "__main__":
    run(cases, __doc__ or "")
