"""The networks whose kernels there are: what their names say, and what they need of an image."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

#: Convolutional networks by name: which layers a 2 x 2 pool follows, and the readout.
#: KIP's ConvNet has a convolution without a pool in front of three with one (Nguyen et al., NeurIPS
#: 2021). Myrtle-5, 7 and 10 (Shankar et al., ICML 2020) have three groups of convolutions with a
#: pool between the groups.
PRESETS: dict[str, tuple[tuple[bool, ...], str]] = {
    "kip_convnet": ((False, True, True, True), "flatten"),
    "myrtle5": ((False, True, True, False), "gap"),
    "myrtle7": ((False, True, False, True, False, False), "gap"),
    "myrtle10": ((False, False, True, False, False, True, False, False, False), "gap"),
}
NETS = ("fc", "conv", *PRESETS)


def checked_depth(depth: int, net: str) -> int:
    """depth as an int, or the error that names what is wrong with it."""
    try:
        if isinstance(depth, bool):
            raise TypeError
        number = operator.index(depth)
    except TypeError:
        raise TypeError(f"depth: got {depth!r}, expected an integer") from None
    least = 0 if net == "fc" else 1
    if number < least:
        raise ValueError(f"depth: got {number}, expected at least {least} for net={net!r}")
    return number


def checked_pools(depth: int, pool: bool | Sequence[bool]) -> list[bool]:
    """Whether a pool follows each layer, or the error that names what is wrong."""
    if isinstance(pool, bool):
        return [pool] * depth
    if isinstance(pool, str) or not isinstance(pool, Sequence):
        raise TypeError(f"pool: got {pool!r}, expected a bool or a sequence of them")
    if not all(isinstance(p, bool) for p in pool):
        raise TypeError(f"pool: got {pool!r}, expected bools")
    if len(pool) != depth:
        raise ValueError(f"pool: got {len(pool)} bools, expected {depth}, one for each layer")
    return list(pool)


def convolutions(
    net: str, depth: int, pool: bool | Sequence[bool], readout: str
) -> tuple[list[bool], str]:
    """The pools and the readout of a convolutional network.

    Raises:
        TypeError, ValueError: as `kernel_matrix`.
    """
    if net not in PRESETS:
        return checked_pools(checked_depth(depth, net), pool), readout
    if (depth, pool, readout) != (3, True, "flatten"):
        raise ValueError(
            f"net: {net!r} has a depth, pools and a readout of its own; got depth={depth!r}, "
            f"pool={pool!r}, readout={readout!r}, expected the defaults"
        )
    pools, readout = PRESETS[net]
    return list(pools), readout


def check_size(net: str, pools: Sequence[bool], size: tuple[int, int]) -> None:
    """Refuse images that are too small for the pools."""
    least = 2 ** sum(pools)
    if min(size) < least:
        raise ValueError(
            f"x: got images of {size[0]} x {size[1]}, expected at least {least} x {least} for the "
            f"{sum(pools)} pools of net={net!r}"
        )


def check_variances(weight_var: float, bias_var: float) -> tuple[float, float]:
    """Both as floats: weights with a variance above zero, biases with one of zero or more."""
    for name, value, least in (
        ("weight_var", weight_var, "above 0"),
        ("bias_var", bias_var, ">= 0"),
    ):
        if isinstance(value, bool) or not hasattr(type(value), "__float__"):
            raise TypeError(f"{name}: got {value!r}, expected a number")
        number = float(value)
        if not math.isfinite(number) or number < 0 or (number == 0 and least == "above 0"):
            raise ValueError(f"{name}: got {value!r}, expected a finite number {least}")
    return float(weight_var), float(bias_var)
