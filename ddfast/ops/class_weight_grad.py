"""Operators `class_conv`, `class_input_grad` and `class_weight_grad`: convolutions by class.

The partial derivatives of one trilinear form, see `ddfast.reference.class_weight_grad`: the
derivatives of each are the two others, so every order is right. The compiled kernels read and write
channels_last memory; contiguous tensors are converted. Half precision is left to the reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import memory
from ddfast.ops.registry import TYPES, declare, derivative
from ddfast.reference import class_weight_grad as reference

BY_GRAD, BY_INPUT, BY_WEIGHT = range(3)  # csrc/cpu/kernels.h
HALVES = (torch.bfloat16, torch.float16)


def uses_winograd(
    algorithm: str,
    product: int,
    dtype: torch.dtype,
    channels: tuple[int, int],
    kernel: Sequence[int],
    size: Sequence[int],
    padding: int,
    counts: Sequence[int],
) -> bool:
    """Whether the compiled kernels take F(4x4, 3x3); "auto": where it was measured to be faster.

    In float32 Winograd's error is about 2e-6 of the result's largest entry, a direct sum's 4e-7.
    Measured with AVX-512 against the direct kernels: 1.1 to 2.3 times as fast from 16 channels on,
    if a class has 8 tiles of 4x4 pixels or more (16 on 4x4 planes, where the direct kernels skip
    most of the padding): with fewer, transforming the class's weights takes longer than it saves.
    Weight gradients gain from the first tile on.

    Args:
        product: BY_GRAD, BY_INPUT or BY_WEIGHT.
        channels: (I, O).
        size: (H, W) of x.
    """
    if algorithm != "auto":
        return algorithm == "winograd"
    if dtype != torch.float32 or not reference.winograd_applies(kernel, size, padding):
        return False
    if min(channels) < 16:
        return False
    classes = sum(count > 0 for count in counts)
    tiles = sum(counts) * size[0] * size[1] // 16
    return product == BY_WEIGHT or tiles >= classes * (16 if tuple(size) == (4, 4) else 8)


def _last(x: Tensor) -> Tensor:
    """x with its channels side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def _images(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised images with channels side by side."""
    n, channels, *planes = shape
    flat = memory.empty(n * channels * planes[0] * planes[1] if planes else n * channels, dtype)
    return flat.view(n, *planes, channels).movedim(-1, 1)


def _in_format(images: Tensor, like: Tensor) -> Tensor:
    """The result of `_images` in the memory format of `like`."""
    if reference.memory_format(like) == torch.channels_last:
        return images
    if images.dim() == 4 and (images.shape[1] == 1 or images.shape[2:].numel() == 1):
        return images.movedim(1, -1).view(images.shape)  # the same memory in both formats
    return images.contiguous()


def _compute(
    compiled: Any,
    product: int,
    images: Tensor,
    other: Tensor,
    out: Tensor,
    counts: list[int],
    channels: tuple[int, int],
    kernel: Sequence[int],
    size: Sequence[int],
    padding: int,
    algorithm: str,
) -> None:
    """Run the compiled kernel on channels_last images, contiguous weights, into `out`."""
    winograd = uses_winograd(
        algorithm, product, images.dtype, channels, kernel, size, padding, counts
    )
    compiled.class_conv(
        TYPES[images.dtype],
        product,
        winograd,
        images.data_ptr(),
        other.data_ptr(),
        out.data_ptr(),
        [0, *itertools.accumulate(counts)],
        [*channels, *(size or (1, 1)), *(kernel or (1, 1)), padding],
        torch.get_num_threads(),
    )


# --- by the result --------------------------------------------------------------------------------


def _conv_cpu(
    compiled: Any, x: Tensor, weight: Tensor, counts: list[int], padding: int, algorithm: str
) -> Tensor:
    if x.dtype in HALVES:
        return reference.class_conv(x, weight, counts, padding, algorithm)
    shape = reference.conv_shape(x, weight, counts, padding, algorithm)
    out = _images(shape, x.dtype)
    size, kernel, channels = x.shape[2:], weight.shape[3:], (x.shape[1], shape[1])
    _compute(
        compiled, BY_GRAD, _last(x), weight.contiguous(), out, counts,
        channels, kernel, size, padding, algorithm,
    )  # fmt: skip
    return _in_format(out, x)


def _conv_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.class_conv(*arguments)


def _conv_fake(
    x: Tensor, weight: Tensor, counts: list[int], padding: int, algorithm: str
) -> Tensor:
    shape = reference.conv_shape(x, weight, counts, padding, algorithm)
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x)
    )


class_conv = declare(
    "class_conv(Tensor x, Tensor weight, int[] counts, int padding, str algorithm) -> Tensor",
    reference=reference.class_conv,
    cpu=_conv_cpu,
    cuda=_conv_cuda,
    fake=_conv_fake,
    kernels="class_weight_grad",
)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.counts, ctx.padding, ctx.algorithm = inputs
    ctx.size, ctx.kernel = x.shape[2:], weight.shape[3:]
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    by_x = by_weight = None
    if ctx.needs_input_grad[0]:
        by_x = class_input_grad(grad, weight, ctx.counts, ctx.size, ctx.padding, ctx.algorithm)
    if ctx.needs_input_grad[1]:
        by_weight = class_weight_grad(x, grad, ctx.counts, ctx.kernel, ctx.padding, ctx.algorithm)
    return by_x, by_weight, None, None, None


# --- by the images --------------------------------------------------------------------------------


def _input_grad_cpu(
    compiled: Any,
    grad: Tensor,
    weight: Tensor,
    counts: list[int],
    size: list[int],
    padding: int,
    algorithm: str,
) -> Tensor:
    if grad.dtype in HALVES:
        return reference.class_input_grad(grad, weight, counts, size, padding, algorithm)
    shape = reference.input_grad_shape(grad, weight, counts, size, padding, algorithm)
    out = _images(shape, grad.dtype)
    kernel, channels = weight.shape[3:], (shape[1], grad.shape[1])
    _compute(
        compiled, BY_INPUT, _last(grad), weight.contiguous(), out, counts,
        channels, kernel, size, padding, algorithm,
    )  # fmt: skip
    return _in_format(out, grad)


def _input_grad_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.class_input_grad(*arguments)


def _input_grad_fake(
    grad: Tensor, weight: Tensor, counts: list[int], size: list[int], padding: int, algorithm: str
) -> Tensor:
    shape = reference.input_grad_shape(grad, weight, counts, size, padding, algorithm)
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=reference.memory_format(grad)
    )


class_input_grad = declare(
    "class_input_grad(Tensor grad, Tensor weight, int[] counts, int[] size, int padding, "
    "str algorithm) -> Tensor",
    reference=reference.class_input_grad,
    cpu=_input_grad_cpu,
    cuda=_input_grad_cuda,
    fake=_input_grad_fake,
    kernels="class_weight_grad",
)


def _input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, ctx.counts, _, ctx.padding, ctx.algorithm = inputs
    ctx.kernel = weight.shape[3:]
    ctx.save_for_backward(grad, weight)


def _input_grad_backward(ctx: Any, x: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    by_grad = by_weight = None
    if ctx.needs_input_grad[0]:
        by_grad = class_conv(x, weight, ctx.counts, ctx.padding, ctx.algorithm)
    if ctx.needs_input_grad[1]:
        by_weight = class_weight_grad(x, grad, ctx.counts, ctx.kernel, ctx.padding, ctx.algorithm)
    return by_grad, by_weight, None, None, None, None


# --- by the weights -------------------------------------------------------------------------------


def _weight_grad_cpu(
    compiled: Any,
    x: Tensor,
    grad: Tensor,
    counts: list[int],
    kernel: list[int],
    padding: int,
    algorithm: str,
) -> Tensor:
    if x.dtype in HALVES:
        return reference.class_weight_grad(x, grad, counts, kernel, padding, algorithm)
    shape = reference.weight_grad_shape(x, grad, counts, kernel, padding, algorithm)
    out = memory.empty(math.prod(shape), x.dtype).view(shape)
    _compute(
        compiled, BY_WEIGHT, _last(x), _last(grad), out, counts,
        (x.shape[1], grad.shape[1]), kernel, x.shape[2:], padding, algorithm,
    )  # fmt: skip
    return out


def _weight_grad_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.class_weight_grad(*arguments)


def _weight_grad_fake(
    x: Tensor, grad: Tensor, counts: list[int], kernel: list[int], padding: int, algorithm: str
) -> Tensor:
    return x.new_empty(reference.weight_grad_shape(x, grad, counts, kernel, padding, algorithm))


class_weight_grad = declare(
    "class_weight_grad(Tensor x, Tensor grad, int[] counts, int[] kernel, int padding, "
    "str algorithm) -> Tensor",
    reference=reference.class_weight_grad,
    cpu=_weight_grad_cpu,
    cuda=_weight_grad_cuda,
    fake=_weight_grad_fake,
    kernels="class_weight_grad",
)


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, ctx.counts, _, ctx.padding, ctx.algorithm = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(x, grad)


def _weight_grad_backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
    x, grad = ctx.saved_tensors
    by_x = by_grad = None
    if ctx.needs_input_grad[0]:
        by_x = class_input_grad(grad, weight, ctx.counts, ctx.size, ctx.padding, ctx.algorithm)
    if ctx.needs_input_grad[1]:
        by_grad = class_conv(x, weight, ctx.counts, ctx.padding, ctx.algorithm)
    return by_x, by_grad, None, None, None, None


derivative("class_conv", _conv_backward, _conv_setup)
derivative("class_input_grad", _input_grad_backward, _input_grad_setup)
derivative("class_weight_grad", _weight_grad_backward, _weight_grad_setup)
