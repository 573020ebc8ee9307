"""How many images go through a network at once within a memory budget."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

DEFAULT = 1 << 30
"""Bytes. On a CPU larger batches gain nothing; a fixed number keeps results the same everywhere."""

# Peak bytes of a pass over the bytes of one copy of every layer's output, with a margin. Measured
# on ConvNets, AlexNet, VGG11, ResNet18, MLP and LeNet (a test measures some again).
FORWARD = 1.0  # without gradients: 0.2 to 0.9 measured
FIRST_ORDER = 2.0  # forward and backward: 0.7 to 1.8
SECOND_ORDER = 4.5  # gradient of a distance between weight gradients: 1.5 to 3.9


def parse_memory(budget: int | str) -> int:
    """Bytes in a budget such as "8GiB", "500MB", "2G" or a plain number.

    KB, MB, GB and TB are powers of 1000; KiB, MiB, ... and K, M, ... are powers of 1024.

    Raises:
        ValueError: no such amount.
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?\s*", str(budget), re.IGNORECASE)
    if not match or isinstance(budget, bool):
        raise ValueError(f"memory: got {budget!r}, expected an amount such as 8GiB or 500MB")
    number, unit, suffix = match.groups()
    base = 1000 if unit and (suffix or "").upper() == "B" else 1024
    amount = int(float(number) * base ** UNITS[unit.upper()])
    if amount < 1:
        raise ValueError(f"memory: got {budget!r}, expected more than nothing")
    return amount


def activation_bytes(net: nn.Module, image: tuple[int, int, int]) -> int:
    """Bytes of all layers' outputs, one copy each, for one image.

    Args:
        net: any network; what runs is a copy on the meta device.
        image: (channels, H, W).
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * output.element_size()

    parameter = next(net.parameters())
    shadow = copy.deepcopy(net).to("meta").eval()
    for module in shadow.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        shadow(torch.empty((1, *image), dtype=parameter.dtype, device="meta"))
    return total + 2 * parameter.element_size() * image[0] * image[1] * image[2]


def images_at_once(each: int, budget: int, cost: float) -> int:
    """Images that fit into `budget` bytes when a pass needs `cost` times `each` bytes an image.

    Raises:
        ValueError: not even one.
    """
    if cost * each > budget:
        raise ValueError(
            f"memory: the budget of {budget} bytes is too small, one image needs {cost * each:.0f}"
        )
    return int(budget / (cost * each))


def peak_resident() -> int:
    """Bytes of main memory that this process has had at most; 0 where the system does not say.

    On Linux from /proc: `getrusage` of a process counts, too, what the one that started it had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_words(size: float) -> str:
    """So many bytes as "1.2 GiB": `size` with one decimal from GiB on, and none below."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
