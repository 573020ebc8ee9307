"""What is measured: the same work done by several providers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddfast.testing import error, flatten

MODES = ("forward", "backward", "double", "iteration")


@dataclass
class Case:
    """The same work done by several providers.

    Attributes:
        operator: what is measured, as `ddfast bench --list` names it.
        name: shapes and settings, unique within an operator and mode.
        mode: "forward"; "backward", value and gradient; "double", gradient of a function of a
            gradient; "iteration", a method's outer iteration; or a text of the benchmark's own.
        exact: called once; the result in float64 that every provider is judged by.
        providers: name -> function without arguments; the first is the baseline. A function may
            have an attribute `clock`, which returns seconds and replaces the usual one.
        bytes: the fewest bytes the work must move, inputs read once and outputs written once.
        flops: floating-point operations of the work, where arithmetic can bound it.
        tolerance: largest allowed error, by default relative to the largest entry of each result.
        rounds: calls of each provider that are timed.
        device: "cpu" or "cuda".
        error: another measure of a result's error than that, from (result, exact).
        dtype: element type of the arithmetic: "float32", "bfloat16" or "float64".
        size: the named size that the shapes come from, and what was left out so that it fits.
    """

    operator: str
    name: str
    mode: str
    exact: Callable[[], object]
    providers: dict[str, Callable[[], object]]
    bytes: int
    flops: int = 0
    tolerance: float = 1e-4
    rounds: int = 15
    device: str = "cpu"
    error: Callable[[Any, Any], float] | None = None
    dtype: str = "float32"
    size: str = ""


def relative_error(result: object, exact: object) -> float:
    """Largest error over all tensors, each relative to its own largest entry."""
    worst = 0.0
    for ours, wanted in zip(flatten(result), flatten(exact), strict=True):  # type: ignore[arg-type]
        scale = float(wanted.detach().abs().max()) if wanted.numel() else 1.0
        worst = max(worst, error(ours, wanted) / (scale or 1.0))
    return worst


def has_nan(result: object) -> bool:
    """Whether a tensor of a result, in lists or mappings or not, holds a NaN.

    The largest of some errors can miss it, for NaN is not larger than anything.
    """
    if isinstance(result, Tensor):
        return bool(result.isnan().any())
    if isinstance(result, Mapping):
        return any(map(has_nan, result.values()))
    return isinstance(result, (list, tuple)) and any(map(has_nan, result))


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` under torch.compile, for one shape: no silent switch to dynamic shapes.

    What other cases have compiled of the same function for their shapes is forgotten: those would
    count as recompilations, of which torch stops after a few and goes on without a word as if the
    function had not been compiled.
    """
    torch._dynamo.reset()
    torch._dynamo.config.automatic_dynamic_shapes = False
    return torch.compile(f, fullgraph=False)
