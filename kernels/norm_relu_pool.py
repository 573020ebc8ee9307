"""Triton kernels of `norm_relu_pool`: forward, backward, tangent and tangent backward.

A program serves one unit of one image: a block of channels that are normalised one by one (instance
norm, no norm), or the channels of one group. Its pixels are indexed as (cell, corner), a cell being
the 2x2 window of the pool (one pixel where nothing is pooled), so that pooling is a sum or maximum
over the last axis of a tile (channels, cells, corners); cells cut off by an odd height or width are
there for the statistics and only not written. Where the unit fits into registers each input is
read once; otherwise in tiles, once more for every quantity that has to be known beforehand.

Both memory formats: a tensor is described by the distance of two images and one more step, that of
channels (pixels side by side) or that of pixels (channels side by side, channels_last).

No atomics and a fixed order of sums: the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddfast.kernels.norm_relu_pool_backward import backward_kernel, forward_kernel
from ddfast.kernels.norm_relu_pool_tangent import tangent_backward_kernel, tangent_kernel
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import memory_format

#: Elements of a tile that fit into registers, in float32: for rectifiers without max pooling and
#: groups, which take the fewest registers, and for everything else.
LIMITS = {
    "forward_kernel": (16384, 16384),
    "backward_kernel": (16384, 8192),
    "tangent_kernel": (16384, 8192),
    "tangent_backward_kernel": (8192, 4096),
}
TILE = 2048  # elements of a tile where the unit does not fit
PACKED = 2048  # elements up to which small planes are put together


class Tile(NamedTuple):
    """What a program works on: channels times cells, all of its unit at once if resident."""

    channels: int
    cells: int
    resident: bool
    warps: int


def choose_tile(
    kernel: str,
    channels: int,
    grouped: bool,
    cells: int,
    corners: int,
    last: bool,
    plain: bool,
    double: bool,
) -> Tile:
    """Block sizes, all powers of two.

    Args:
        channels: of a group if grouped, else of the image.
        cells: of a plane.
        corners: pixels of a cell.
        last: whether the channels lie side by side (channels_last).
        plain: a rectifier without max pooling.
        double: whether an element takes two registers.
    """
    limit = LIMITS[kernel][0 if plain and not grouped else 1] >> 2 * double
    most, plane = triton.next_power_of_2(channels), triton.next_power_of_2(cells) * corners
    if grouped:
        least = most
    elif last:
        # Eight float32 side by side make one sector; four leave the other half to a neighbour.
        least = min(most, 8 if 8 * plane <= limit else 4)
    else:
        least = 1
    resident = least * plane <= limit
    if resident:
        packed = (2 * PACKED if last else PACKED) >> double
        together = least if grouped else max(least, min(most, packed // plane))
    else:
        size = TILE >> double
        together = min(most, 16) if last else 1
        plane = max(corners, min(plane, size // together))
        if grouped and not last:
            together = max(1, min(most, size // plane))
    elements = together * plane << double
    warps = min(16, max(1, elements // (512 if resident else 256)))
    return Tile(together, plane // corners, resident, warps)


def _readable(t: Tensor, last: bool) -> tuple[Tensor, int, int]:
    """t, copied only if the kernels cannot describe it; elements between images, and the step."""
    if t.numel() == 0:
        return t, 0, 0
    _, channels, height, width = t.shape
    _, by_channel, by_row, by_column = t.stride()
    by_pixel = by_column if width > 1 else by_row
    rows_follow = height == 1 or width == 1 or by_row == width * by_column
    if last:
        side_by_side = channels == 1 or by_channel == 1
    else:
        side_by_side = height * width == 1 or by_pixel == 1
    if not (rows_follow and side_by_side):
        return _readable(t.contiguous(memory_format=_format(last)), last)
    return t, t.stride(0), by_pixel if last else by_channel


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _launch(
    kernel: Any,
    inputs: dict[str, Tensor],
    parameters: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    groups: int,
    activation: str,
    pool: str,
    **constants: Any,
) -> None:
    """Launch over all images and units.

    Args:
        inputs: x, and what has its size or the pooled one.
        parameters: weight and bias, and tangents of these, which may be one row per image.
        outputs: what is of x's or the pooled size first, then sums and statistics.
        constants: what else the kernel takes.
    """
    x = inputs["x"]
    if x.numel() == 0:
        for tensor in outputs.values():
            tensor.zero_()
        return
    images, channels, height, width = x.shape
    last = memory_format(x) is torch.channels_last
    corners = 1 if pool == "none" else 4
    across = width if pool == "none" else (width + 1) // 2
    cells = across * (height if pool == "none" else (height + 1) // 2)
    grouped = 0 < groups < channels
    per_group = channels // groups if grouped else channels
    plain = activation in ("relu", "leaky_relu") and pool != "max"
    double = accumulator(x.dtype) == torch.float64
    tile = choose_tile(kernel.__name__, per_group, grouped, cells, corners, last, plain, double)
    units = groups if grouped else triton.cdiv(channels, tile.channels)
    arguments: dict[str, Any] = inputs | outputs | constants
    described = inputs | {"out": next(iter(outputs.values()))}
    furthest = 0
    for name, tensor in described.items():
        readable, image, step = _readable(tensor, last)
        if name in inputs:
            arguments[name] = readable
        arguments |= {f"{name}_image": image, f"{name}_step": step}
        reach = (height * width, channels) if last else (channels, height * width)
        furthest = max(furthest, reach[0] * step + reach[1])
    for name, parameter in parameters.items():
        arguments[name] = x if parameter is None else parameter.contiguous()
        arguments[f"HAS_{name.upper()}"] = parameter is not None
        if name.endswith("tangent"):
            by_image = parameter is not None and parameter.dim() == 2
            arguments[f"{name}_image"] = channels if by_image else 0
    kernel[(images * units,)](
        **arguments,
        channels=channels,
        units=units,
        per_group=per_group,
        height=height,
        across=across,
        cells=cells,
        elements=height * width * (per_group if grouped else 1),
        NORM=groups > 0,
        GROUPED=grouped,
        RESIDENT=tile.resident,
        ACTIVATION=activation,
        POOL=pool,
        ODD=width % 2,
        LAST=last,
        OFFSET=tl.int32 if furthest < 2**31 else tl.int64,
        ACC=tl.float64 if double else tl.float32,
        CHANNELS=tile.channels,
        CELLS=tile.cells,
        num_warps=tile.warps,
    )


def _empty(x: Tensor, pool: str) -> Tensor:
    """Uninitialised, of the size of x, pooled, in its dtype and memory format."""
    images, channels, height, width = x.shape
    if pool != "none":
        height, width = height // 2, width // 2
    size = (images, channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def norm_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name; see ddfast/reference/norm_relu_pool.py, as for the others."""
    out = _empty(x, pool)
    mean = x.new_empty(x.shape[0], groups, dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    parameters: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
    outputs = {"out": out, "mean": mean, "rstd": rstd}
    _launch(forward_kernel, {"x": x}, parameters, outputs, groups, activation, pool, EPS=eps)
    return out, mean, rstd


def norm_relu_pool_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name."""
    outputs = _outputs("grad_x", "grad_weight", "grad_bias", x)
    _launch(
        backward_kernel,
        {"grad": grad, "x": x},
        {"weight": weight, "bias": bias},
        outputs,
        groups,
        activation,
        pool,
        mean=mean.contiguous(),
        rstd=rstd.contiguous(),
    )
    first, second, third = outputs.values()
    return first, second, third


def norm_relu_pool_tangent(
    x: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> Tensor:
    """The operator of the same name."""
    out = _empty(x, pool)
    _launch(
        tangent_kernel,
        {"x": x, "tangent": tangent},
        _parameters(weight, bias, weight_tangent, bias_tangent),
        {"out": out},
        groups,
        activation,
        pool,
        mean=mean.contiguous(),
        rstd=rstd.contiguous(),
    )
    return out


def norm_relu_pool_tangent_bwd(
    grad: Tensor,
    grad_tangent: Tensor | None,
    x: Tensor,
    tangent: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of the same name."""
    outputs = _outputs("out", "out_weight", "out_bias", x)
    _launch(
        tangent_backward_kernel,
        {
            "grad": grad,
            "grad_tangent": grad if grad_tangent is None else grad_tangent,
            "x": x,
            "tangent": tangent,
        },
        _parameters(weight, bias, weight_tangent, bias_tangent),
        outputs,
        groups,
        activation,
        pool,
        mean=mean.contiguous(),
        rstd=rstd.contiguous(),
        HAS_GRAD_TANGENT=grad_tangent is not None,
    )
    first, second, third = outputs.values()
    return first, second, third


def _outputs(by_x: str, by_weight: str, by_bias: str, x: Tensor) -> dict[str, Tensor]:
    sums = x.new_empty(2, *x.shape[:2], dtype=accumulator(x.dtype))
    return {by_x: _empty(x, "none"), by_weight: sums[0], by_bias: sums[1]}


def _parameters(
    weight: Tensor | None,
    bias: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "weight": weight,
        "bias": bias,
        "weight_tangent": weight_tangent,
        "bias_tangent": bias_tangent,
    }


def ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """(kernel, argument types, constants, options) of representative variants."""
    variants: list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]] = []
    planes = ("x", "grad", "tangent", "grad_tangent", "out", "grad_x")
    sums = (
        *("weight", "bias", "weight_tangent", "bias_tangent", "mean", "rstd"),
        *("grad_weight", "grad_bias", "out_weight", "out_bias"),
    )
    every: tuple[Any, ...] = (forward_kernel, backward_kernel)
    every += (tangent_kernel, tangent_backward_kernel)
    # dtype, groups of 64 channels, activation, pool, size, channels_last, kernels
    for dtype, groups, activation, pool, size, last, kernels in (
        ("fp32", 64, "relu", "average", 32, False, every),
        ("bf16", 64, "swish", "max", 32, True, every[3:]),
        ("fp64", 4, "sigmoid", "average", 15, False, every[1:2]),
    ):
        wide = "fp64" if dtype == "fp64" else "fp32"
        acc = tl.float64 if dtype == "fp64" else tl.float32
        types = dict.fromkeys(planes, f"*{dtype}") | dict.fromkeys(sums, f"*{wide}")
        for kernel in kernels:
            grouped = groups < 64
            plain = activation == "relu" and pool == "average"
            cells = ((size + 1) // 2) ** 2
            tile = choose_tile(
                kernel.__name__,
                16 if grouped else 64,
                grouped,
                cells,
                4,
                last,
                plain,
                dtype == "fp64",
            )
            constants: dict[str, object] = {
                name: True for name in kernel.arg_names if name.startswith("HAS_")
            }
            constants |= {"NORM": True, "GROUPED": grouped, "RESIDENT": tile.resident}
            constants |= {"ACTIVATION": activation, "POOL": pool, "ODD": size % 2, "LAST": last}
            constants |= {"OFFSET": tl.int64 if grouped else tl.int32, "ACC": acc}
            constants |= {"CHANNELS": tile.channels, "CELLS": tile.cells}
            if kernel is forward_kernel:
                constants["EPS"] = 1e-5
            integers = dict.fromkeys(kernel.arg_names, "i64" if grouped else "i32")
            if dtype == "bf16":  # A launch turns every size of one into a constant.
                constants = dict.fromkeys(integers.keys() - types.keys(), 1) | constants
            variants.append((kernel, integers | types, constants, {"num_warps": tile.warps}))
    return variants
