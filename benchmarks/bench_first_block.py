"""A network's first block, convolution to pool: forward, and the gradient of its weights.

    python benchmarks/bench_first_block.py

The convolution's result is many times as large as the images and as the block's result. "eager" is
torch's convolution, group norm, ReLU and pool one after the other, which keep it for the gradient;
"ddfast, two operators" has torch's convolution and `norm_relu_pool`; "ddfast" keeps a slab of it in
the cache and computes it again. There is no gradient of the images.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast.bench import Case, compiled, run
from ddfast.bench.sizes import Size
from ddfast.benchmarks import sizing
from ddfast.layers import norm_relu_pool
from ddfast.ops.first_block import first_block


def in_steps(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    z = F.conv2d(x, weight, bias, padding=1)
    return F.avg_pool2d(F.relu(F.group_norm(z, z.shape[1], scale, shift)), 2)


def two_operators(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return norm_relu_pool(F.conv2d(x, weight, bias, padding=1), scale, shift, len(scale))


def ours(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out: Tensor = first_block(
        x, weight, bias, scale, shift, 1, len(scale), 1e-5, "relu", "average"
    )[0]
    return out


def case(
    images: int, channels: int, width: int, side: int, mode: str, options: argparse.Namespace
) -> Case:
    """A 3x3 convolution with so many outputs on square images."""
    x = sizing.drawn((images, channels, side, side), 0).to(options.device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = sizing.drawn((width, channels, 3, 3), 1).to(x)
    bias, scale, shift = (sizing.drawn([width], k).to(x) for k in (2, 3, 4))
    # The norm takes the bias out again: its gradient is zero but for rounding, so not asked for.
    given = [weight, scale + 2, shift]

    def of_leaves(f: Callable[..., Tensor], x: Tensor = x) -> Callable[..., Tensor]:
        b = bias.to(x)
        return lambda w, scale, shift: f(x, w, b, scale, shift)

    providers: dict[str, Callable[[], object]] = {
        name: sizing.work(of_leaves(f), given, mode)
        for name, f in (
            ("eager", in_steps),
            ("ddfast", ours),
            ("ddfast, two operators", two_operators),
        )
    }
    if sizing.compiles(options, mode):
        fast = compiled(in_steps)
        providers["torch.compile"] = sizing.work(of_leaves(fast), given, mode)

    def exact() -> list[Tensor]:
        wide = x.double()
        return sizing.work(of_leaves(in_steps, wide), [t.double() for t in given], mode)()

    out = images * width * (side // 2) ** 2
    products = {"forward": 1, "backward": 2}[mode]  # the second is the gradient of the weight
    return Case(
        operator="first_block",
        name=f"{images}x{channels}x{side}x{side} -> {width}",
        mode=mode,
        exact=exact,
        providers=providers,
        bytes=4 * products * (x.numel() + out),  # images and result, in the gradient once more
        tolerance=1e-3,
        error=sizing.norm_error,
        rounds=sizing.rounds(options),
        device=options.device,
        flops=products * 18 * channels * width * images * side**2,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for images in (64,) if options.quick else (64, 256):
        for mode in ("forward", "backward"):
            yield case(images, 3, 128, 32, mode, options)


def sized(size: Size, options: argparse.Namespace) -> Iterator[Case]:
    image = 4 * size.width * size.side**2  # of the convolution's result
    few, note = sizing.share(
        sizing.batch_only(size),
        options,
        memory=16 * image * size.batch_real,
        moved=30 * image * size.batch_real,
        seconds=2,
    )
    for mode in sizing.wanted(options, "forward", "backward"):
        made = case(few.batch_real, size.channels, size.width, size.side, mode, options)
        yield dataclasses.replace(made, size=sizing.label(size, note))


if __name__ == "__main__":
    run(cases, __doc__ or "")
