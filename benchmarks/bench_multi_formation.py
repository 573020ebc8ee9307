"""IDC's decoding: the enlarged crops of the synthetic images, and the gradient to the images.

    python benchmarks/bench_multi_formation.py --out benchmarks/results/multi_formation.csv

The baseline is what the official script does: pad, cut, concatenate, interpolate, with autograd.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.bench import Case, compiled, run
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


def case(shape: tuple[int, ...], factor: int, gradient: bool, options: argparse.Namespace) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(options.device)
    larger = (shape[0] * factor**2, *shape[1:])
    cotangent = torch.rand(larger, generator=generator).to(options.device)
    leaf = x.clone().requires_grad_()

    def provider(decode: Callable[[Tensor, int], Tensor]) -> Callable[[], object]:
        if not gradient:
            return lambda: decode(x, factor)

        def both() -> tuple[Tensor, Tensor]:
            out = decode(leaf, factor)
            return out, torch.autograd.grad(out, leaf, cotangent)[0]

        return both

    def exact() -> object:
        forth = reference.multi_formation(x.double(), factor)
        if not gradient:
            return forth
        return forth, reference.multi_formation_adjoint(cotangent.double(), factor)

    providers = {"eager": provider(official), "ddfast": provider(ours)}
    if not options.no_compile and not options.quick:
        providers["torch.compile"] = provider(compiled(official))
    moved = x.nbytes + cotangent.nbytes
    return Case(
        operator="multi_formation",
        name=f"{'x'.join(map(str, shape))}, factor {factor}",
        mode="forward and backward" if gradient else "forward",
        exact=exact,
        providers=providers,
        bytes=moved * (2 if gradient else 1),
        rounds=9 if moved > 1e8 else 51,
        device=options.device,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for gradient in (False, True):
        yield case((100, 3, 32, 32), 2, gradient, options)  # 10 classes, 10 images each
        yield case((10, 3, 32, 32), 2, gradient, options)
        yield case((100, 1, 28, 28), 2, gradient, options)
        if not options.quick:
            yield case((20, 3, 224, 224), 3, gradient, options)


if __name__ == "__main__":
    run(cases, __doc__ or "")
