"""Derivatives of a block's parameters: what is summed over the images of each segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.engine.chain import Block
from ddfast.ops import class_weight_grad as conv


def algorithm_of(block: Block, plane: Sequence[int], algorithm: str) -> str:
    """The algorithm asked for where this convolution can use it, else the best that it can."""
    if algorithm != "winograd":
        return algorithm
    fits = block.convolution.kernel_size == (3, 3) and block.padding == 1
    fits = fits and plane[0] % 4 == 0 and plane[1] % 4 == 0
    return algorithm if fits and block.convolution.weight.dtype == torch.float32 else "auto"


def segment_sum(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(N, width) -> (segments, width)."""
    return torch.stack([part.sum(0) for part in values.split(list(counts))])


def collect_first(
    found: dict[str, Tensor],
    block: Block,
    names: Sequence[str],
    gradients: tuple[Tensor, ...],
    counts: list[int],
) -> None:
    by_weight, *rows = gradients
    if not block.bias_counts:  # exactly zero: the norm subtracts the bias again
        rows[0] = torch.zeros_like(rows[0])
    if f"{block.name}.weight" in names:
        found[f"{block.name}.weight"] = by_weight
    owned = (f"{block.name}.bias", f"{block.norm_name}.weight", f"{block.norm_name}.bias")
    for name, row in zip(owned, rows, strict=True):
        if name in names:
            found[name] = segment_sum(row, counts)


def collect(
    found: dict[str, Tensor],
    block: Block,
    names: Sequence[str],
    x: Tensor,
    gz: Tensor,
    by_scale: Tensor,
    by_shift: Tensor,
    counts: list[int],
    algorithm: str,
) -> None:
    if f"{block.name}.weight" in names:
        kernel = list(block.convolution.kernel_size)
        kind = algorithm_of(block, x.shape[2:], algorithm)
        found[f"{block.name}.weight"] = conv.class_weight_grad(
            x, gz, counts, kernel, block.padding, kind
        )
    collect_rows(found, block, gz, (by_scale, by_shift), counts, names)


def collect_rows(
    found: dict[str, Tensor],
    block: Block,
    gz: Tensor,
    rows: Sequence[Tensor],
    counts: list[int],
    names: Sequence[str] | None = None,
) -> None:
    """The vectors of a block: its bias, and its norm's two from (N, channels) each."""

    def wanted(name: str) -> bool:
        return names is None or name in names

    if block.convolution.bias is not None and wanted(f"{block.name}.bias"):
        if block.bias_counts:
            by_bias = segment_sum(gz.sum((2, 3)), counts)
        else:  # exactly zero: the norm subtracts the bias again
            by_bias = gz.new_zeros(len(counts), gz.shape[1])
        found[f"{block.name}.bias"] = by_bias
    if block.norm is None or block.norm.weight is None:
        return
    for kind, row in zip(("weight", "bias"), rows, strict=True):
        if wanted(f"{block.norm_name}.{kind}"):
            found[f"{block.norm_name}.{kind}"] = segment_sum(row, counts)


def weight_grad_tangent(
    x: tuple[Tensor | None, Tensor | None],
    gz: tuple[Tensor, Tensor],
    counts: list[int],
    kernel: list[int],
    padding: int,
    algorithm: str,
) -> Tensor:
    """Of a weight gradient, from (value, tangent) of the layer's input and output's cotangent."""
    assert x[0] is not None
    found = conv.class_weight_grad(x[0], gz[1], counts, kernel, padding, algorithm)
    if x[1] is not None:
        found += conv.class_weight_grad(x[1], gz[0], counts, kernel, padding, algorithm)
    return found
