"""Operators `norm_relu_pool` and its derivatives: schemas, shapes, implementations, derivatives.

The chain: norm_relu_pool -> norm_relu_pool_bwd -> norm_relu_pool_tangent (with respect to grad) and
norm_relu_pool_tangent_bwd (with respect to everything else: second derivatives are symmetric), at
which it ends. Only x, mean and rstd are kept between the passes: everything else is recomputed.
`ddfast.layers` checks what a user passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import memory
from ddfast.ops.registry import TYPES, declare, derivative, end_of_chain
from ddfast.reference import norm_relu_pool as reference
from ddfast.reference.gradient_distance import accumulator
from ddfast.reference.norm_relu_pool import ACTIVATIONS, POOLS, memory_format

COMPILED = (torch.float32, torch.float64)  # half types: the reference answers


def _pooled_size(x: Tensor, pool: str) -> tuple[int, int, int, int]:
    images, channels, height, width = x.shape
    return (images, channels, *((height, width) if pool == "none" else (height // 2, width // 2)))


def _empty(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """An uninitialised CPU tensor of this size in x's dtype and memory format."""
    images, channels, height, width = size
    flat = memory.empty(images * channels * height * width, x.dtype)
    if memory_format(x) is torch.channels_last:
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(size)


def _readable(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(x))


def _beside(x: Tensor, other: Tensor | None) -> Tensor | None:
    """`other` in the dtype and memory format of x."""
    if other is None:
        return None
    return other.to(x.dtype).contiguous(memory_format=memory_format(x))


def _flat(x: Tensor, other: Tensor | None) -> Tensor | None:
    """A per-channel tensor as the compiled kernel reads it."""
    return None if other is None else other.to(x.dtype).contiguous()


def _call(
    compiled: Any,
    kernel: str,
    x: Tensor,
    settings: tuple[int, float, str, str],
    tensors: list[Tensor | None],
    tangents: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Hand everything to the compiled kernel, a missing tensor as address 0."""
    groups, eps, activation, pool = settings
    getattr(compiled, kernel)(
        TYPES[x.dtype],
        memory_format(x) is torch.channels_last,
        list(x.shape),
        groups,
        eps,
        ACTIVATIONS.index(activation),
        POOLS.index(pool),
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        # From one image to the next: 0 where all images share the tangent.
        [0 if t is None or t.dim() == 1 else x.shape[1] for t in tangents],
        torch.get_num_threads(),
    )


# --- forward ------------------------------------------------------------------------------------


def _forward_cpu(
    compiled: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in COMPILED:
        return reference.norm_relu_pool(x, weight, bias, groups, eps, activation, pool)
    x = _readable(x)
    weight, bias = _flat(x, weight), _flat(x, bias)
    out = _empty(x, _pooled_size(x, pool))
    mean, rstd = x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)
    tensors = [x, None, None, None, weight, bias, None, None, mean, rstd, out, None, None]
    _call(compiled, "norm_relu_pool", x, (groups, eps, activation, pool), tensors)
    return out, mean, rstd


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    pool: str,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], groups, dtype=accumulator(x.dtype))
    return _fake(x, _pooled_size(x, pool)), statistics, torch.empty_like(statistics)


def _fake(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


norm_relu_pool = declare(
    "norm_relu_pool(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, str activation, "
    "str pool) -> (Tensor out, Tensor mean, Tensor rstd)",
    reference=reference.norm_relu_pool,
    cpu=_forward_cpu,
    cuda=lambda kernels, *arguments: kernels.norm_relu_pool(*arguments),
    fake=_forward_fake,
    kernels="norm_relu_pool",
)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, groups, _, activation, pool = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.settings = groups, activation, pool


def _forward_backward(ctx: Any, grad: Tensor | None, *statistics: Tensor | None) -> tuple[Any, ...]:
    if any(s is not None for s in statistics):
        raise NotImplementedError(
            "ddfast::norm_relu_pool: mean and rstd have no derivative. Use the plain PyTorch "
            "definition in ddfast.reference.norm_relu_pool, where they have."
        )
    if grad is None:
        return (None,) * 7
    x, weight, bias, mean, rstd = ctx.saved_tensors
    by_x, by_weight, by_bias = norm_relu_pool_bwd(grad, x, weight, bias, mean, rstd, *ctx.settings)
    by_x = by_x if ctx.needs_input_grad[0] else None
    return (by_x, *_over_images(ctx.needs_input_grad[1:3], (weight, bias), (by_weight, by_bias)),
            None, None, None, None)  # fmt: skip


def _over_images(
    needed: tuple[bool, ...], of: tuple[Tensor | None, ...], rows: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """Gradients of parameters that all images share, from one row an image."""
    return [
        row.sum(0).to(tensor.dtype) if need and tensor is not None else None
        for need, tensor, row in zip(needed, of, rows, strict=True)
    ]


derivative("norm_relu_pool", _forward_backward, _forward_setup)


# --- its derivative -----------------------------------------------------------------------------


def _bwd_cpu(
    compiled: Any,
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
    settings = groups, activation, pool
    if x.dtype not in COMPILED:
        return reference.norm_relu_pool_bwd(grad, x, weight, bias, mean, rstd, *settings)
    x = _readable(x)
    weight, bias = _flat(x, weight), _flat(x, bias)
    mean, rstd, grad = mean.contiguous(), rstd.contiguous(), _beside(x, grad)  # type: ignore[assignment]
    out, by_weight, by_bias = _empty(x, x.shape), *_rows(x)
    tensors = [x, None, grad, None, weight, bias, None, None, mean, rstd, out, by_weight, by_bias]
    _call(compiled, "norm_relu_pool_bwd", x, (groups, 0.0, activation, pool), tensors)
    return out, by_weight, by_bias


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """One row of channels for each image, twice, in the accumulation dtype."""
    dtype = accumulator(x.dtype)
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def _bwd_fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (_fake(x, x.shape), *_rows(x))


norm_relu_pool_bwd = declare(
    "norm_relu_pool_bwd(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, int groups, str activation, str pool) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.norm_relu_pool_bwd,
    cpu=_bwd_cpu,
    cuda=lambda kernels, *arguments: kernels.norm_relu_pool_bwd(*arguments),
    fake=_bwd_fake,
    kernels="norm_relu_pool",
)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _bwd_backward(
    ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None
) -> tuple[Any, ...]:
    grad, x, weight, bias, mean, rstd = ctx.saved_tensors
    results: list[Any] = [None] * 9
    if along_x is None and along_weight is None and along_bias is None:
        return tuple(results)
    if along_x is None:
        along_x = torch.zeros_like(x)
    point = (x, along_x, weight, bias, along_weight, along_bias, mean, rstd, *ctx.settings)
    if ctx.needs_input_grad[0]:
        results[0] = norm_relu_pool_tangent(*point).to(grad.dtype)
    if any(ctx.needs_input_grad[1:4]):
        by_x, *rows = norm_relu_pool_tangent_bwd(grad, None, *point)
        results[1] = by_x if ctx.needs_input_grad[1] else None
        results[2:4] = _over_images(ctx.needs_input_grad[2:4], (weight, bias), tuple(rows))
    return tuple(results)


derivative("norm_relu_pool_bwd", _bwd_backward, _bwd_setup)


# --- along tangents -----------------------------------------------------------------------------


def _tangent_cpu(
    compiled: Any,
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
    affine = weight, bias, weight_tangent, bias_tangent
    settings = groups, activation, pool
    if x.dtype not in COMPILED:
        return reference.norm_relu_pool_tangent(x, tangent, *affine, mean, rstd, *settings)
    x = _readable(x)
    flat = [_flat(x, t) for t in affine]
    out = _empty(x, _pooled_size(x, pool))
    beside = [x, _beside(x, tangent), None, None]
    tensors = [*beside, *flat, mean.contiguous(), rstd.contiguous(), out, None, None]
    at = groups, 0.0, activation, pool
    _call(compiled, "norm_relu_pool_tangent", x, at, tensors, (flat[2], flat[3]))
    return out


def _tangent_fake(x: Tensor, *rest: Any) -> Tensor:
    return _fake(x, _pooled_size(x, rest[-1]))


norm_relu_pool_tangent = declare(
    "norm_relu_pool_tangent(Tensor x, Tensor tangent, Tensor? weight, Tensor? bias, "
    "Tensor? weight_tangent, Tensor? bias_tangent, Tensor mean, Tensor rstd, int groups, "
    "str activation, str pool) -> Tensor",
    reference=reference.norm_relu_pool_tangent,
    cpu=_tangent_cpu,
    cuda=lambda kernels, *arguments: kernels.norm_relu_pool_tangent(*arguments),
    fake=_tangent_fake,
    kernels="norm_relu_pool",
)

end_of_chain("norm_relu_pool_tangent", "third derivatives are not implemented")


def _tangent_bwd_cpu(
    compiled: Any,
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
    affine = weight, bias, weight_tangent, bias_tangent
    settings = groups, activation, pool
    if x.dtype not in COMPILED:
        return reference.norm_relu_pool_tangent_bwd(
            grad, grad_tangent, x, tangent, *affine, mean, rstd, *settings
        )
    x = _readable(x)
    flat = [_flat(x, t) for t in affine]
    beside = [x, *(_beside(x, t) for t in (tangent, grad, grad_tangent))]
    out, by_weight, by_bias = _empty(x, x.shape), *_rows(x)
    tensors = [*beside, *flat, mean.contiguous(), rstd.contiguous(), out, by_weight, by_bias]
    at = groups, 0.0, activation, pool
    _call(compiled, "norm_relu_pool_tangent_bwd", x, at, tensors, (flat[2], flat[3]))
    return out, by_weight, by_bias


def _tangent_bwd_fake(
    grad: Tensor, grad_tangent: Tensor | None, x: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (_fake(x, x.shape), *_rows(x))


norm_relu_pool_tangent_bwd = declare(
    "norm_relu_pool_tangent_bwd(Tensor grad, Tensor? grad_tangent, Tensor x, Tensor tangent, "
    "Tensor? weight, Tensor? bias, Tensor? weight_tangent, Tensor? bias_tangent, Tensor mean, "
    "Tensor rstd, int groups, str activation, str pool) "
    "-> (Tensor grad_x_tangent, Tensor grad_weight_tangent, Tensor grad_bias_tangent)",
    reference=reference.norm_relu_pool_tangent_bwd,
    cpu=_tangent_bwd_cpu,
    cuda=lambda kernels, *arguments: kernels.norm_relu_pool_tangent_bwd(*arguments),
    fake=_tangent_bwd_fake,
    kernels="norm_relu_pool",
)

end_of_chain("norm_relu_pool_tangent_bwd", "third derivatives are not implemented")


__all__ = [
    "norm_relu_pool",
    "norm_relu_pool_bwd",
    "norm_relu_pool_tangent",
    "norm_relu_pool_tangent_bwd",
]
