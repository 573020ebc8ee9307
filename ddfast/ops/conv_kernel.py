"""Operator `conv_kernel`: schema, shapes, implementations, the first derivative.

The NNGP or NTK matrix of convolutional ReLU networks; `ddfast.reference.conv_kernel` has the maths,
`ddfast.kernel_matrix` is what a user calls. The chain is `conv_kernel` -> `conv_kernel_bwd`, which
raises when it is differentiated. The compiled kernels answer in float64 where x or y is float64,
else in float32; gradients come back in the dtypes of x and y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.ops.registry import declare, derivative, end_of_chain
from ddfast.reference import conv_kernel as reference
from ddfast.reference import conv_kernel_bwd as reference_bwd
from ddfast.reference.dense_kernel import KINDS, common_dtype

READOUTS = ("flatten", "gap")


def check_pair(x: Tensor, y: Tensor | None) -> None:
    """Refuse two sets of which no kernel matrix can be made.

    Raises:
        ValueError: images of different shapes, or on different devices.
    """
    if y is None:
        return
    if y.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"y: got images of shape {tuple(y.shape[1:])}, expected {tuple(x.shape[1:])} as in x"
        )
    if y.device != x.device:
        raise ValueError(f"y: on {y.device}, expected {x.device}, where x is")


def check(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
) -> None:
    """Refuse what is no network or no pair of image sets.

    Raises:
        TypeError: x or y is not of a floating dtype.
        ValueError: a shape, size, name or variance that does not fit; the message names it.
    """
    for name, t in (("x", x), ("y", y)):
        if t is None:
            continue
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: got {t.dtype}, expected a floating dtype")
        if t.dim() != 4 or 0 in t.shape[1:]:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected (n, C, H, W)")
    check_pair(x, y)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if readout not in READOUTS:
        raise ValueError(f"readout: got {readout!r}, expected one of {', '.join(READOUTS)}")
    height, width = x.shape[2:]
    for layer, pooled in enumerate(pools):
        if pooled and min(height, width) < 2:
            raise ValueError(
                f"pools: got a pool after layer {layer}, where images of {tuple(x.shape[2:])} are "
                f"{height} x {width}, expected at least 2 x 2"
            )
        height, width = (height // 2, width // 2) if pooled else (height, width)
    for name, value in (("weight_var", weight_var), ("bias_var", bias_var)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: got {value}, expected a finite number, 0 or more")


def _wide(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both sets in the dtype that is computed in, contiguous."""
    dtype = common_dtype(x, y)
    return x.to(dtype).contiguous(), None if y is None else y.to(dtype).contiguous()


def _call_compiled(
    compiled: Any,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
    *results: Tensor | None,
) -> None:
    """Hand contiguous sets to the compiled kernel; results: out, or grad and the gradients."""
    compiled.conv_kernel(
        x.dtype == torch.float64,
        [x.shape[0], (x if y is None else y).shape[0], *x.shape[1:]],
        kind == "ntk",
        list(pools),
        readout == "gap",
        weight_var,
        bias_var,
        [0 if t is None else t.data_ptr() for t in (x, y, *results)],
        torch.get_num_threads(),
    )


# --- the matrix ---------------------------------------------------------------------------------


def _reference(x: Tensor, y: Tensor | None, *network: Any) -> Tensor:
    check(x, y, *network)
    return reference.conv_kernel(*_wide(x, y), *network)


def _cpu(compiled: Any, x: Tensor, y: Tensor | None, *network: Any) -> Tensor:
    if not network[1]:  # no layers: one product
        return _reference(x, y, *network)
    check(x, y, *network)
    x, y = _wide(x, y)
    out = x.new_empty(x.shape[0], (x if y is None else y).shape[0])
    _call_compiled(compiled, x, y, *network, out)
    return out


def _cuda(kernels: Any, x: Tensor, y: Tensor | None, *network: Any) -> Any:
    check(x, y, *network)
    return kernels.conv_kernel(*_wide(x, y), *network)


def _fake(x: Tensor, y: Tensor | None, *network: Any) -> Tensor:
    check(x, y, *network)
    wide, _ = _wide(x, y)
    return wide.new_empty(x.shape[0], (x if y is None else y).shape[0])


conv_kernel = declare(
    "conv_kernel(Tensor x, Tensor? y, str kind, bool[] pools, str readout, float weight_var, "
    "float bias_var) -> Tensor",
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="conv_kernel",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *ctx.network = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y = ctx.saved_tensors
    by_x, by_y = ctx.needs_input_grad[:2]
    dx, dy = conv_kernel_bwd(grad, x, y, *ctx.network, by_x, by_y)
    none = (None,) * len(ctx.network)
    return dx if by_x else None, dy if by_y else None, *none


derivative("conv_kernel", _backward, _setup)


# --- first derivative ---------------------------------------------------------------------------


def _bwd_check(grad: Tensor, x: Tensor, y: Tensor | None, *network: Any) -> None:
    check(x, y, *network)
    expected = x.shape[0], (x if y is None else y).shape[0]
    if grad.shape != expected:
        raise ValueError(f"grad: got shape {tuple(grad.shape)}, expected {tuple(expected)}")


def _as_inputs(
    gradients: tuple[Tensor, Tensor], x: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx, dy = gradients
    return dx.to(x.dtype), dy.to(x.dtype if y is None else y.dtype)


def _bwd_reference(
    grad: Tensor, x: Tensor, y: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    _bwd_check(grad, x, y, *arguments[:5])
    wide, other = _wide(x, y)
    found = reference_bwd.conv_kernel_bwd(grad.to(wide.dtype), wide, other, *arguments)
    return _as_inputs(found, x, y)


def _bwd_cpu(
    compiled: Any, grad: Tensor, x: Tensor, y: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *network, by_x, by_y = arguments
    if not network[1]:
        return _bwd_reference(grad, x, y, *arguments)
    _bwd_check(grad, x, y, *network)
    wide, other = _wide(x, y)
    dx = torch.empty_like(wide) if by_x else None
    dy = torch.empty_like(other) if by_y and other is not None else None
    if dx is not None or dy is not None:
        grad = grad.to(wide.dtype).contiguous()
        _call_compiled(compiled, wide, other, *network, grad, dx, dy)
    found = [wide.new_empty(0) if t is None else t for t in (dx, dy)]
    return _as_inputs((found[0], found[1]), x, y)


def _bwd_cuda(
    kernels: Any, grad: Tensor, x: Tensor, y: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    _bwd_check(grad, x, y, *arguments[:5])
    return _as_inputs(kernels.conv_kernel_bwd(grad, *_wide(x, y), *arguments), x, y)


def _bwd_fake(grad: Tensor, x: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    *network, by_x, by_y = arguments
    _bwd_check(grad, x, y, *network)
    dx = x.new_empty(x.shape if by_x else (0,))
    return dx, x.new_empty(0) if y is None else y.new_empty(y.shape if by_y else (0,))


conv_kernel_bwd = declare(
    "conv_kernel_bwd(Tensor grad, Tensor x, Tensor? y, str kind, bool[] pools, str readout, "
    "float weight_var, float bias_var, bool by_x, bool by_y) -> (Tensor dx, Tensor dy)",
    reference=_bwd_reference,
    cpu=_bwd_cpu,
    cuda=_bwd_cuda,
    fake=_bwd_fake,
    kernels="conv_kernel",
)
end_of_chain("conv_kernel_bwd", "the second derivative of conv_kernel is not implemented")
