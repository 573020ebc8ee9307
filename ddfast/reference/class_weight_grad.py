"""The definition of `class_conv`, `class_input_grad` and `class_weight_grad`, in plain torch.

A convolution of stride 1 (or a linear layer) in which each class of images has a weight of its own:
images lie class after class, counts[c] of them belong to class c. With one class it is an ordinary
convolution. With y = class_conv(x, weight), the sum of y * grad is linear in each of x, weight and
grad, and the three functions are its partial derivatives:

    class_conv        by grad     (N, I, H, W), (C, O, I, kh, kw) -> (N, O, H', W')
    class_input_grad  by x        (N, O, H', W'), (C, O, I, kh, kw) -> (N, I, H, W)
    class_weight_grad by weight   (N, I, H, W), (N, O, H', W') -> (C, O, I, kh, kw)

H' = H + 2 padding - kh + 1, W' likewise. Linear layers: (N, I), (N, O), (C, O, I), no kernel and no
size. All dtypes (half precision is summed in float32); every order of derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.reference.gradient_distance import accumulator

ALGORITHMS = ("auto", "direct", "winograd")


def _check(
    names: tuple[str, str],
    tensors: tuple[Tensor, Tensor],
    counts: Sequence[int],
    padding: int,
    algorithm: str,
) -> bool:
    """Check what the three have in common; whether they are linear layers."""
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
        kinds = (3, 5) if name == "weight" else (2, 4)
        if tensor.dim() not in kinds:
            expected = "(C, O, I, kh, kw) or (C, O, I)"
            if name != "weight":
                letter = "I" if name == "x" else "O"
                expected = f"(N, {letter}, H, W) or (N, {letter})"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    first, second = tensors
    if second.dtype != first.dtype:
        raise TypeError(f"{names[1]}: got {second.dtype}, expected {first.dtype} as {names[0]}")
    if second.device != first.device:
        raise ValueError(f"{names[1]}: on {second.device}, expected {first.device} as {names[0]}")
    linear = first.dim() == 2
    if (second.dim() in (2, 3)) != linear:
        raise ValueError(
            f"{names[1]}: got {second.dim()} dimensions with a {first.dim()}-D {names[0]}: "
            "a linear layer and a convolution do not mix"
        )
    if padding < 0 or (linear and padding):
        expected = "0 for a linear layer" if linear else "0 or more"
        raise ValueError(f"padding: got {padding}, expected {expected}")
    for c, count in enumerate(counts):
        if count < 0:
            raise ValueError(f"counts[{c}]: got {count}, expected 0 or more")
    if sum(counts) != first.shape[0]:
        raise ValueError(
            f"counts: add up to {sum(counts)}, expected {first.shape[0]}, the images of {names[0]}"
        )
    if names[1] == "weight" and len(counts) != second.shape[0]:
        raise ValueError(f"counts: got {len(counts)} classes, expected {second.shape[0]} as weight")
    if names[1] == "grad" and second.shape[0] != first.shape[0]:
        raise ValueError(f"grad: got {second.shape[0]} images, expected {first.shape[0]} as x")
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"algorithm: got {algorithm!r}, expected one of {', '.join(map(repr, ALGORITHMS))}"
        )
    return linear


def winograd_applies(kernel: Sequence[int], size: Sequence[int], padding: int) -> bool:
    """Whether F(4x4, 3x3) can compute a convolution of planes of this size."""
    fits = len(size) == 2 and all(n > 0 and n % 4 == 0 for n in size)
    return fits and tuple(kernel) == (3, 3) and padding == 1


def _check_algorithm(
    algorithm: str, kernel: Sequence[int], size: Sequence[int], padding: int
) -> None:
    if algorithm == "winograd" and not winograd_applies(kernel, size, padding):
        raise ValueError(
            f"algorithm: 'winograd' with kernel {tuple(kernel)}, padding {padding} and planes of "
            f"{tuple(size)}, expected kernel (3, 3), padding 1 and sides divisible by 4"
        )


def _planes(size: Sequence[int], kernel: Sequence[int], padding: int) -> tuple[int, ...]:
    """Height and width of the result of a convolution."""
    planes = tuple(n + 2 * padding - k + 1 for n, k in zip(size, kernel, strict=True))
    if any(n < 1 for n in planes) or any(k < 1 for k in kernel) or any(n < 1 for n in size):
        raise ValueError(
            f"kernel: {tuple(kernel)} does not fit into planes of {tuple(size)} with padding "
            f"{padding}"
        )
    return planes


def conv_shape(
    x: Tensor, weight: Tensor, counts: Sequence[int], padding: int, algorithm: str
) -> tuple[int, ...]:
    """The shape of `class_conv`; raises ValueError or TypeError for what it does not take."""
    _check(("x", "weight"), (x, weight), counts, padding, algorithm)
    if weight.shape[2] != x.shape[1]:
        raise ValueError(f"weight: takes {weight.shape[2]} channels, expected {x.shape[1]} as x")
    planes = _planes(x.shape[2:], weight.shape[3:], padding)
    _check_algorithm(algorithm, weight.shape[3:], x.shape[2:], padding)
    return (x.shape[0], weight.shape[1], *planes)


def input_grad_shape(
    grad: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    size: Sequence[int],
    padding: int,
    algorithm: str,
) -> tuple[int, ...]:
    """The shape of `class_input_grad`; raises ValueError or TypeError for what it does not take."""
    linear = _check(("grad", "weight"), (grad, weight), counts, padding, algorithm)
    if weight.shape[1] != grad.shape[1]:
        raise ValueError(f"weight: gives {weight.shape[1]} channels, expected {grad.shape[1]}")
    if len(size) != (0 if linear else 2):
        expected = "()" if linear else "(H, W)"
        raise ValueError(f"size: got {tuple(size)}, expected {expected}")
    planes = _planes(size, weight.shape[3:], padding)
    if planes != tuple(grad.shape[2:]):
        raise ValueError(
            f"grad: got planes of {tuple(grad.shape[2:])}, expected {planes} for size {tuple(size)}"
        )
    _check_algorithm(algorithm, weight.shape[3:], size, padding)
    return (grad.shape[0], weight.shape[2], *size)


def weight_grad_shape(
    x: Tensor,
    grad: Tensor,
    counts: Sequence[int],
    kernel: Sequence[int],
    padding: int,
    algorithm: str,
) -> tuple[int, ...]:
    """The shape of `class_weight_grad`; raises ValueError or TypeError as the others."""
    linear = _check(("x", "grad"), (x, grad), counts, padding, algorithm)
    if len(kernel) != (0 if linear else 2):
        expected = "()" if linear else "(kh, kw)"
        raise ValueError(f"kernel: got {tuple(kernel)}, expected {expected}")
    planes = _planes(x.shape[2:], kernel, padding)
    if planes != tuple(grad.shape[2:]):
        raise ValueError(
            f"grad: got planes of {tuple(grad.shape[2:])}, expected {planes} for x of "
            f"{tuple(x.shape[2:])}"
        )
    _check_algorithm(algorithm, kernel, x.shape[2:], padding)
    return (len(counts), grad.shape[1], x.shape[1], *kernel)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of the result: channels_last where x is."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _joined(parts: list[Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    """The classes' results one after the other, in the dtype and memory format of `like`."""
    out = torch.cat(parts) if parts else like.new_zeros(list(shape))
    # Not `contiguous`, which leaves the strides as they are where two formats are the same memory.
    return out.to(like.dtype).clone(memory_format=memory_format(like))


def class_conv(
    x: Tensor, weight: Tensor, counts: Sequence[int], padding: int = 0, algorithm: str = "auto"
) -> Tensor:
    """Each class's images convolved with the class's weight.

    Args:
        x: (N, I, H, W), class after class; or (N, I).
        weight: (C, O, I, kh, kw), or (C, O, I).
        counts: images of each class, C entries, 0 allowed.
        padding: zeros around each plane.
        algorithm: checked, and of no influence here.

    Returns:
        (N, O, H', W') or (N, O), channels_last if x is, else contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; "winograd" for
            anything but a 3x3 kernel, padding 1 and sides divisible by 4.
    """
    shape = conv_shape(x, weight, counts, padding, algorithm)
    wide = accumulator(x.dtype)
    parts = []
    for images, w in zip(x.to(wide).split(list(counts)), weight.to(wide), strict=True):
        if len(images) and x.dim() == 2:
            parts.append(images @ w.t())
        elif len(images):
            parts.append(functional.conv2d(images, w, padding=padding))
    return _joined(parts, shape, x)


def class_input_grad(
    grad: Tensor,
    weight: Tensor,
    counts: Sequence[int],
    size: Sequence[int],
    padding: int = 0,
    algorithm: str = "auto",
) -> Tensor:
    """The gradient of sum(class_conv(x, weight) * grad) with respect to x.

    Args:
        grad: (N, O, H', W') or (N, O).
        size: (H, W) of x, or ().

    Other arguments, result and errors as `class_conv`.
    """
    shape = input_grad_shape(grad, weight, counts, size, padding, algorithm)
    wide = accumulator(grad.dtype)
    parts = []
    for images, w in zip(grad.to(wide).split(list(counts)), weight.to(wide), strict=True):
        if len(images) and grad.dim() == 2:
            parts.append(images @ w)
        elif len(images):
            parts.append(functional.conv_transpose2d(images, w, padding=padding))
    return _joined(parts, shape, grad)


def class_weight_grad(
    x: Tensor,
    grad: Tensor,
    counts: Sequence[int],
    kernel: Sequence[int],
    padding: int = 0,
    algorithm: str = "auto",
) -> Tensor:
    """The gradient of sum(class_conv(x, weight) * grad) with respect to weight, contiguous.

    Args:
        x: (N, I, H, W) or (N, I).
        grad: (N, O, H', W') or (N, O).
        kernel: (kh, kw), or ().

    Other arguments and errors as `class_conv`. A class without images gets zeros.
    """
    shape = weight_grad_shape(x, grad, counts, kernel, padding, algorithm)
    wide = accumulator(x.dtype)
    parts = []
    for images, g in zip(
        x.to(wide).split(list(counts)), grad.to(wide).split(list(counts)), strict=True
    ):
        if not len(images):
            parts.append(images.new_zeros(shape[1:]))
        elif x.dim() == 2:
            parts.append(g.t() @ images)
        else:
            swapped = functional.conv2d(images.transpose(0, 1), g.transpose(0, 1), padding=padding)
            parts.append(swapped.transpose(0, 1))
    return torch.stack(parts).to(x.dtype) if parts else x.new_zeros(shape)
