"""What a generator must be able to do, whoever made it, and where its images meet the real ones.

A generator is a ``torch.nn.Module`` with an attribute ``latent_dim``, called with latents
``(N, latent_dim)`` and labels, int64 ``(N,)``. It returns images ``(N, channels, H, W)`` in [-1, 1]
which, in evaluation mode, depend on their own latent and label alone, differentiably in the latent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ddfast.data import Dataset
from ddfast.random import generator as make_generator

__all__ = ["check_generator", "frozen", "normalised", "place", "signed"]

ROUNDING = 1e-3  # how far beyond [-1, 1] a pixel may lie


def check_generator(generator: nn.Module, dataset: Dataset) -> None:
    """Raise unless a module can serve as a generator of the images of this data set.

    Two latents go through it in evaluation mode, and a gradient comes back; the module is left as
    it was.

    Args:
        generator: any module.
        dataset: says what the images must be like.

    Raises:
        TypeError: not a module, or one without an integer `latent_dim`.
        ValueError: it cannot be called as it must be, or its images are not what they must be; the
            message says what it got and what was expected.
    """
    if not isinstance(generator, nn.Module):
        raise TypeError(
            f"generator: got {type(generator).__name__}, expected a torch.nn.Module that makes "
            "images from (latents, labels)"
        )
    dim = getattr(generator, "latent_dim", None)
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise TypeError(
            f"generator: its attribute latent_dim is {dim!r}, expected the number of values in a "
            "latent, an integer of at least 1"
        )
    dtype, device = place(generator)
    latents = torch.randn(2, dim, generator=make_generator(0, "check generator"))
    latents = latents.to(device, dtype).requires_grad_()
    labels = torch.tensor([dataset.num_classes - 1, 0], device=device)
    with frozen(generator), torch.enable_grad():
        try:
            images = generator(latents, labels)
            again = generator(latents[:1], labels[:1])
        except Exception as error:
            raise ValueError(
                f"generator: called with latents {tuple(latents.shape)} and labels "
                f"{labels.tolist()} it failed: {error}"
            ) from error
        _check_images(images, (2, dataset.channels, *dataset.size))
        if not torch.allclose(images[:1], again, rtol=0, atol=ROUNDING):
            raise ValueError(
                "generator: an image changes with the others in its batch, or from call to call; "
                "in evaluation mode it must depend on its own latent and label alone"
            )
        gradient = None
        if images.requires_grad:
            # Not the plain sum, which a normalised output would not change at all.
            weights = torch.linspace(-1, 1, images.numel(), device=device, dtype=images.dtype)
            loss = (images * weights.view_as(images)).sum()
            gradient = torch.autograd.grad(loss, latents, allow_unused=True)[0]
    if gradient is None or not gradient.any():
        raise ValueError("generator: its images do not depend differentiably on the latents")
    if not torch.isfinite(gradient).all():
        raise ValueError("generator: the gradient of its images is not finite")


def _check_images(images: object, shape: tuple[int, ...]) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"generator: it returned {what}, expected a floating-point tensor")
    if images.shape != shape:
        raise ValueError(
            f"generator: it returned images of shape {tuple(images.shape)}, expected {shape} for "
            "this data set"
        )
    if not torch.isfinite(images).all():
        raise ValueError("generator: it returned pixels that are not finite")
    low, high = images.min().item(), images.max().item()
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise ValueError(
            f"generator: it returned pixels from {low:.4g} to {high:.4g}, expected [-1, 1]"
        )


@contextlib.contextmanager
def frozen(generator: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode, its parameters without gradients; as before afterwards.

    Args:
        generator: any module.
    """
    modes = [(module, module.training) for module in generator.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in generator.parameters()]
    try:
        generator.eval().requires_grad_(False)
        yield generator
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def place(generator: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype that a generator's latents need, and the device that it is on."""
    for tensor in generator.parameters():
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.float32, torch.device("cpu")


def signed(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [-1, 1], as a generator makes them.

    Args:
        images: uint8 of any shape.
        dtype: a floating-point type.

    Returns:
        A new tensor of the same shape in ``dtype``.

    Raises:
        TypeError: images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: got {images.dtype}, expected torch.uint8")
    return images.to(dtype).div_(127.5).sub_(1)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images in [-1, 1] in a data set's normalised space; differentiable.

    Args:
        images: floating-point ``(N, channels, H, W)``.
        mean, std: one number a channel, for pixels scaled to 0..1, as in
            :func:`ddfast.data.normalise`.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: mean or std of the wrong length.
    """
    for what, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[1]:
            raise ValueError(f"{what}: got {len(values)} numbers, expected {images.shape[1]}")
    # ((x + 1) / 2 - mean) / std in one multiplication and one addition.
    scale = [0.5 / s for s in std]
    shift = [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
    columns = (images.new_tensor(values).view(-1, 1, 1) for values in (shift, scale))
    return torch.addcmul(next(columns), images, next(columns))
