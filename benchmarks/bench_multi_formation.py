"""IDC's decoding: the enlarged crops of the synthetic images, and the gradient to the images.

    python benchmarks/bench_multi_formation.py --out benchmarks/results/multi_formation.csv

The baseline is what the official script does: pad, cut, concatenate, interpolate, with autograd.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.ops.multi_formation import multi_formation
from ddfast.reference import multi_formation as reference


def official(x: Tensor, factor: int) -> Tensor:
    height, width = x.shape[2:]
    tall, broad = -(-height // factor), -(-width // factor)
    if tall * factor != height or broad * factor != width:
        x = F.pad(x, (0, broad * factor - width, 0, tall * factor - height), value=0.5)
    crops = [
        x[:, :, p * tall : (p + 1) * tall, q * broad : (q + 1) * broad]
        for p in range(factor)
        for q in range(factor)
    ]
    return F.interpolate(torch.cat(crops), size=(height, width), mode="bilinear")


def ours(x: Tensor, factor: int) -> Tensor:
    result: Tensor = multi_formation(x, factor, "crop", 0.5)
    return result


def case(shape: tuple[int, ...], factor: int, mode: str, options: argparse.Namespace) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(options.device)

    def provider(decode: Callable[[Tensor, int], Tensor], x: Tensor = x) -> Callable[[], object]:
        # Linear in the images: the second derivative is by the cotangent of the result.
        return sizing.work(lambda t: decode(t, factor), [x], mode, linear=True)

    providers = {"eager": provider(official), "ddfast": provider(ours)}
    if sizing.compiles(options, mode):
        providers["torch.compile"] = provider(compiled(official))
    moved = x.nbytes * (1 + factor**2)  # the images and what they decode to, each way
    return Case(
        operator="multi_formation",
        name=f"{'x'.join(map(str, shape))}, factor {factor}",
        mode=mode,
        exact=provider(reference.multi_formation, x.double()),
        providers=providers,
        bytes=moved * {"forward": 1, "backward": 2, "double": 3}[mode],
        rounds=sizing.rounds(options, 9 if moved > 2e7 else 51),
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for mode, title in (("forward", "forward"), ("backward", "forward and backward")):
        shapes = [
            ((100, 3, 32, 32), 2),  # 10 classes, 10 images each
            ((10, 3, 32, 32), 2),
            ((100, 1, 28, 28), 2),
            ((20, 3, 224, 224), 3),
        ]
        for shape in shapes[: 3 if options.quick else None]:
            yield dataclasses.replace(case(*shape, mode, options), mode=title)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    factor = 2  # IDC's; 3 for images beyond 128 pixels
    each = 4 * size.ipc * size.channels * size.side**2 * (1 + factor**2)
    few, note = sizing.share(sizing.classes_only(size), options, memory=3 * each, moved=15 * each)
    shape = (few.classes * size.ipc, size.channels, size.side, size.side)
    for mode in sizing.wanted(options, *sizing.ORDERS):
        made = case(shape, factor, mode, options)
        yield dataclasses.replace(made, size=sizing.label(size, note))


if __name__ == "__main__":
    run(cases, __doc__ or "")
