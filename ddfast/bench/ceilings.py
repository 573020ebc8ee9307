"""What this machine can do at most: how fast it copies, how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch.nn.functional import conv2d

from ddfast.bench.clock import Timer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Bytes read and written. A small copy stays in a cache, as a small case does.
COPIES = {"cpu": (1 << 20, 1 << 23, 1 << 26, 1 << 28), "cuda": (1 << 30,)}
SIDES = {"cpu": 1024, "cuda": 4096}
CALLS = 7


@dataclass(frozen=True)
class Ceilings:
    """Rates measured once, before everything else.

    Attributes:
        copies: GB/s of a copy, by the bytes that it reads and writes.
        products: GFLOP/s by element type, of a product of square matrices or of a convolution,
            whichever is faster: on a CPU they come from different libraries.
    """

    copies: dict[int, float]
    products: dict[str, float]


def copier(bytes_moved: int, device: str) -> Callable[[], object]:
    """A copy between two buffers that reads and writes so many bytes in all."""
    count = max(bytes_moved // 8, 1)
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    return lambda: target.copy_(source)


def multiplier(side: int, dtype: str, device: str) -> Callable[[], object]:
    """A product of two matrices of so many rows and columns."""
    a, b, c = (torch.ones(side, side, dtype=DTYPES[dtype], device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def convolver(dtype: str, device: str) -> tuple[Callable[[], object], int]:
    """A convolution of 3x3 without padding, and its floating-point operations."""
    images, width, side = 32, 128, 16
    x = torch.ones(images, width, side, side, dtype=DTYPES[dtype], device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(width, width, 3, 3, dtype=DTYPES[dtype], device=device)
    return lambda: conv2d(x, weight), 2 * images * (side - 2) ** 2 * width**2 * 9


def measure_ceilings(device: str, timer: Timer) -> Ceilings:
    """The fastest of some calls each: a ceiling is what the machine does undisturbed."""

    def fastest(f: Callable[[], object]) -> float:
        f()
        return max(min(timer(f) for _ in range(CALLS)), 1e-9)

    copies = {size: size / fastest(copier(size, device)) / 1e6 for size in COPIES[device]}
    side = SIDES[device]
    products = {
        dtype: 2 * side**3 / fastest(multiplier(side, dtype, device)) / 1e6 for dtype in DTYPES
    }
    if device == "cpu":
        for dtype in ("float32", "bfloat16"):
            convolution, flops = convolver(dtype, device)
            products[dtype] = max(products[dtype], flops / fastest(convolution) / 1e6)
    return Ceilings(copies, products)


def floor(ceilings: Ceilings, bytes: int, flops: int, dtype: str) -> tuple[float, str]:
    """The least milliseconds that a work can take, and what bounds it.

    Args:
        bytes: that it must move, at the rate of a copy of as many.
        flops: that it must do, at the rate of that element type's products.

    Returns:
        (milliseconds, "bandwidth" or "arithmetic").
    """
    moving = bytes / copy_rate(ceilings, bytes) / 1e6
    computing = flops / ceilings.products[dtype] / 1e6 if dtype in ceilings.products else 0.0
    return (moving, "bandwidth") if moving >= computing else (computing, "arithmetic")


def copy_rate(ceilings: Ceilings, bytes: int) -> float:
    """GB/s of a copy of so many bytes, between the measured ones on a doubly logarithmic line."""
    sizes = sorted(ceilings.copies)
    rates = [ceilings.copies[size] for size in sizes]
    return float(
        numpy.exp(numpy.interp(numpy.log(max(bytes, 1)), numpy.log(sizes), numpy.log(rates)))
    )


def in_words(ceilings: Ceilings) -> str:
    """One line."""
    copies = [f"{rate:.1f} GB/s ({size >> 20} MiB)" for size, rate in ceilings.copies.items()]
    products = [f"{dtype} {rate:.0f}" for dtype, rate in ceilings.products.items()]
    return f"copy {', '.join(copies)}; products in GFLOP/s: {', '.join(products)}"
