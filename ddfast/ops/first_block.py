"""Operators `first_block` and `first_block_bwd`: a network's first block, its middle recomputed.

First derivatives with respect to everything but the images; the second is refused, and so is the
gradient of the images (use `class_conv` and `norm_relu_pool` for those). The compiled kernel keeps
the convolution's result in a slab that fits the cache; elsewhere the block is made of the two
operators.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import class_weight_grad as conv
from ddfast.ops import memory
from ddfast.ops import norm_relu_pool as norm
from ddfast.ops.registry import TYPES, declare, derivative, end_of_chain
from ddfast.reference import first_block as reference
from ddfast.reference.class_weight_grad import conv_shape
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import ACTIVATIONS, POOLS, memory_format

MOST_CHANNELS = 4
"""Of the images, up to which the compiled kernel answers: beyond, a slab saves little."""


def _compiled_takes(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.shape[1] <= MOST_CHANNELS


def _shape(x: Tensor, weight: Tensor, padding: int, pool: str) -> tuple[int, int, int, int]:
    """Of the block's result; raises what a convolution of these does."""
    shape = conv_shape(x, weight.unsqueeze(0), [x.shape[0]], padding, "direct")
    height, width = shape[2:]
    if pool != "none":
        height, width = height // 2, width // 2
    return x.shape[0], weight.shape[0], height, width


def _call(
    compiled: Any,
    x: Tensor,
    weight: Tensor,
    tensors: list[Tensor | None],
    counts: list[int],
    padding: int,
    settings: tuple[int, float, str, str],
) -> None:
    groups, eps, activation, pool = settings
    compiled.first_block(
        TYPES[x.dtype],
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        [0, *itertools.accumulate(counts)],
        [x.shape[1], weight.shape[0], *x.shape[2:], *weight.shape[2:], padding],
        groups,
        eps,
        ACTIVATIONS.index(activation),
        POOLS.index(pool),
        torch.get_num_threads(),
    )


def _flat(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.to(x.dtype).contiguous() for p in parameters]


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _channels_last(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    n, channels, height, width = shape
    flat = memory.empty(n * channels * height * width, dtype)
    return flat.view(n, height, width, channels).permute(0, 3, 1, 2)


# --- forward --------------------------------------------------------------------------------------


def _composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    padding: int,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    z = _convolved(x, weight, bias, padding)
    return norm.norm_relu_pool(z, norm_weight, norm_bias, *settings)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    z = conv.class_conv(x, weight.unsqueeze(0), [x.shape[0]], padding, "auto")
    return z if bias is None else z.add_(bias.view(1, -1, 1, 1))


def _forward_cpu(
    compiled: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    padding: int,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = groups, eps, activation, pool
    if not _compiled_takes(x):
        return _composed(x, weight, bias, norm_weight, norm_bias, padding, *settings)
    out = _channels_last(_shape(x, weight, padding, pool), x.dtype)
    mean, rstd = x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)
    tensors = [_last(x), *_flat(x, weight, bias, norm_weight, norm_bias), mean, rstd, out]
    _call(compiled, x, weight, tensors, [x.shape[0]], padding, settings)
    return out.contiguous(memory_format=memory_format(x)), mean, rstd


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    padding: int,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(
        _shape(x, weight, padding, pool),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )
    mean = x.new_empty(x.shape[0], groups, dtype=accumulator(x.dtype))
    return out, mean, torch.empty_like(mean)


first_block = declare(
    "first_block(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "int padding, int groups, float eps, str activation, str pool) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.first_block,
    cpu=_forward_cpu,
    cuda=lambda kernels, *arguments: _composed(*arguments),
    fake=_forward_fake,
    kernels="norm_relu_pool",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.padding, ctx.groups, _, ctx.activation, ctx.pool = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, mean, rstd)


def _backward(ctx: Any, grad: Tensor | None, *statistics: Tensor | None) -> tuple[Any, ...]:
    if ctx.needs_input_grad[0]:
        raise NotImplementedError(
            "ddfast::first_block has no gradient with respect to the images; use class_conv and "
            "norm_relu_pool, or the plain PyTorch definition in ddfast.reference"
        )
    if any(s is not None for s in statistics):
        raise NotImplementedError("ddfast::first_block: mean and rstd have no derivative")
    if grad is None:
        return (None,) * 10
    x, weight, *parameters, mean, rstd = ctx.saved_tensors
    by_weight, *rows = first_block_bwd(
        *(grad, x, weight, *parameters, mean, rstd, [x.shape[0]]),
        *(ctx.padding, ctx.groups, ctx.activation, ctx.pool),
    )
    by_parameters = [
        row.sum(0).to(p.dtype) if p is not None and needed else None
        for row, p, needed in zip(rows, parameters, ctx.needs_input_grad[2:5], strict=True)
    ]
    by_weight = by_weight[0].to(weight.dtype) if ctx.needs_input_grad[1] else None
    return None, by_weight, *by_parameters, *[None] * 5


derivative("first_block", _backward, _setup)


# --- its gradient ---------------------------------------------------------------------------------


def _composed_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    counts: list[int],
    padding: int,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = _convolved(x, weight, bias, padding)
    gz, by_norm_weight, by_norm_bias = norm.norm_relu_pool_bwd(
        grad, z, norm_weight, norm_bias, mean, rstd, groups, activation, pool
    )
    kernel = list(weight.shape[2:])
    by_weight = conv.class_weight_grad(x, gz, counts, kernel, padding, "auto")
    by_bias = gz.to(mean.dtype).sum((2, 3))
    return by_weight, by_bias, by_norm_weight, by_norm_bias


def _bwd_cpu(
    compiled: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    counts: list[int],
    padding: int,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = groups, activation, pool
    if not _compiled_takes(x):
        return _composed_bwd(
            *(grad, x, weight, bias, norm_weight, norm_bias, mean, rstd, counts, padding),
            *settings,
        )
    by_weight = x.new_empty(len(counts), *weight.shape)
    rows = [x.new_empty(x.shape[0], weight.shape[0]) for _ in range(3)]
    tensors = [
        *(_last(x), *_flat(x, weight, bias, norm_weight, norm_bias)),
        *(mean.contiguous(), rstd.contiguous(), _last(grad.to(x.dtype)), by_weight, *rows),
    ]
    _call(compiled, x, weight, tensors, counts, padding, (groups, 0.0, activation, pool))
    return by_weight, rows[0], rows[1], rows[2]


def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    counts: list[int],
    padding: int,
    groups: int,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    rows = [x.new_empty(x.shape[0], weight.shape[0], dtype=wide) for _ in range(3)]
    return x.new_empty(len(counts), *weight.shape), rows[0], rows[1], rows[2]


first_block_bwd = declare(
    "first_block_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor mean, Tensor rstd, int[] counts, int padding, int groups, "
    "str activation, str pool) "
    "-> (Tensor by_weight, Tensor by_bias, Tensor by_norm_weight, Tensor by_norm_bias)",
    reference=reference.first_block_bwd,
    cpu=_bwd_cpu,
    cuda=lambda kernels, *arguments: _composed_bwd(*arguments),
    fake=_bwd_fake,
    kernels="norm_relu_pool",
)

end_of_chain("first_block_bwd", "the second derivative of first_block is not implemented")
