"""Inversion: latents whose images look like given real ones.

IT-GAN starts from them, with one latent a real image. Verifiable there: Adam with learning rate 0.1
(in file names) and chunks of 500. The objective is not published; ours is the usual one, squared
errors of pixels and of the features of a network, each error a mean over its values.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddfast import nets
from ddfast.data.dataset import check_labels
from ddfast.generator.interface import frozen, normalised, place, signed
from ddfast.memory import DEFAULT, parse_memory
from ddfast.random import generator as make_generator

__all__ = ["Inversion", "invert"]

Features = Callable[[Tensor], Tensor]
Errors = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

CHUNK = 500
"""Images at once if the memory allows; the published number."""

BETAS = (0.9, 0.999)
SHARE = 0.5  # of the memory that goes to tensors kept for the backward pass


class Inversion(NamedTuple):
    """Latents and how near their images come, image by image.

    Attributes:
        latents: floating-point ``(N, latent_dim)``, in the dtype of the generator.
        pixel_errors: ``(N,)`` in that dtype, mean squared differences of pixels in [-1, 1].
        feature_errors: ``(N,)`` in that dtype, mean squared differences of features, over the mean
            square of all real features; 0 without features.
    """

    latents: Tensor
    pixel_errors: Tensor
    feature_errors: Tensor


def invert(
    generator: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 500,
    lr: float = 0.1,
    feature_weight: float = 0.1,
    net: nn.Module | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    starts: int = 100,
    seed: int = 0,
    chunk: int = CHUNK,
    memory: int | str = DEFAULT,
    progress: bool = False,
) -> Inversion:
    """Optimise a latent for each image so that the generator comes as near to it as it can.

    Every image is a problem of its own, so the chunk changes results by rounding at most. It starts
    from the best of `starts` random latents, goes `steps` steps of Adam with a learning rate that
    falls from `lr` to 0 along a cosine, and keeps the best latent on the way: never worse than the
    start.

    Args:
        generator: see `ddfast.generator.check_generator`; it is used in evaluation mode, its
            weights stay as they are.
        images: uint8, or floating-point in [-1, 1], ``(N, channels, H, W)``.
        labels: int64 ``(N,)``.
        steps: 0 for the best of the random latents.
        lr: of Adam.
        feature_weight: of the error of the features beside that of the pixels; 0 for pixels alone.
        net: a network with `embed(images)`, for normalised images; it is used in evaluation mode.
            None for a ConvNet with random weights from `seed`.
        mean, std: of the normalised space of `net`, one number a channel; None for 0.5, which
            leaves images in [-1, 1].
        starts: random latents to choose the start from.
        seed: of the random latents and the random network.
        chunk: at most so many images at once.
        memory: bytes that a chunk may take, or words such as "8GiB".
        progress: show a bar on stderr.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; it is named.
        FloatingPointError: an error is not finite.
    """
    dtype, device = place(generator)
    _check_images(images)
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected {len(images)} integers, one for each image")
    check_labels(labels, int(labels.max()) + 1 if len(labels) else 1, "labels")
    for name, value, least in (("steps", steps, 0), ("starts", starts, 1), ("chunk", chunk, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
    if not lr > 0:
        raise ValueError(f"lr: got {lr}, expected more than 0")
    if not feature_weight >= 0:
        raise ValueError(f"feature_weight: got {feature_weight}, expected at least 0")
    budget = parse_memory(memory)
    channels, height, width = images.shape[1:]
    if net is None:
        # As many blocks as leave planes of 4 to 7 pixels; published from 28 pixels on.
        depth = max(1, min(height, width).bit_length() - 3)
        net = nets.build(
            f"ConvNetD{depth}" + ("" if min(height, width) >= 28 else "W32"),
            channels,
            1,
            (height, width),
            make_generator(seed, "inversion: network"),
        ).to(device, dtype)
    half = [0.5] * channels
    means, stds = half if mean is None else mean, half if std is None else std

    def targets(rows: Tensor) -> Tensor:
        some = images[rows].detach().to(device)
        return signed(some, dtype) if some.dtype == torch.uint8 else some.to(dtype)

    def features(x: Tensor) -> Tensor:
        return net.embed(normalised(x, means, stds).to(dtype)).flatten(1)  # type: ignore[operator]

    with frozen(generator), frozen(net):
        if not len(images):
            empty = torch.empty(0, dtype=dtype, device=device)
            return Inversion(empty.view(0, _latent_dim(generator)), empty, empty)
        start = _starts(generator, targets, labels, starts, seed)
        each = _kept_bytes(generator, features, start, labels, feature_weight)
        most = int(SHARE * budget / each)
        if most < 1:
            raise ValueError(
                f"memory: the budget of {budget} bytes is too small, one image needs "
                f"{each / SHARE:.0f}"
            )
        pieces = torch.arange(len(images)).split(min(chunk, most))
        scale = _feature_scale(features, targets, pieces) if feature_weight else 1.0
        bar = tqdm(
            total=len(pieces) * (steps + 1),
            desc="inversion",
            unit="step",
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        with bar:
            found = [
                _optimised(
                    generator,
                    start[piece],
                    labels[piece].to(device),
                    _errors(targets(piece), features, feature_weight / scale),
                    scale,
                    steps,
                    lr,
                    bar,
                )
                for piece in pieces
            ]
    return Inversion(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _errors(goal: Tensor, features: Features, weight: float) -> Errors:
    """What compares generated images with `goal`: errors of pixels and features, and their sum."""
    with torch.no_grad():
        goal_features = features(goal) if weight else None

    def errors(made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixel = (made - goal).square().flatten(1).mean(1)
        if goal_features is None:
            return pixel, torch.zeros_like(pixel), pixel
        feature = (features(made) - goal_features).square().mean(1)
        return pixel, feature, pixel + weight * feature

    return errors


def _optimised(
    generator: nn.Module,
    start: Tensor,
    labels: Tensor,
    errors: Errors,
    scale: float,
    steps: int,
    lr: float,
    bar: tqdm,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best latents of one chunk on the way, and their errors."""
    latents = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([latents], lr, BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    best = start.clone()
    least = torch.full((3, len(start)), math.inf, dtype=start.dtype, device=start.device)
    for number in range(steps + 1):
        with torch.enable_grad():
            now = torch.stack(errors(generator(latents, labels)))
        if not torch.isfinite(now).all():
            raise FloatingPointError(f"inversion: an error is not finite at step {number}")
        better = now[2] < least[2]
        best = torch.where(better[:, None], latents.detach(), best)
        least = torch.where(better, now.detach(), least)
        if number < steps:
            # A sum: every image has its own gradient, whatever else is in the chunk.
            latents.grad = torch.autograd.grad(now[2].sum(), latents)[0]
            optimiser.step()
            schedule.step()
        bar.update()
        if number % 20 == 0:
            bar.set_postfix_str(f"pixel error {least[0].mean():.4g}", refresh=False)
    return best, least[0], least[1] / scale


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor) or not (
        images.is_floating_point() or images.dtype == torch.uint8
    ):
        what = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: got {what}, expected uint8 or floating-point in [-1, 1]")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, expected (N, channels, height, width)"
        )
    if images.is_floating_point() and len(images):
        low, high = images.aminmax()
        if not (low >= -1 - 1e-3 and high <= 1 + 1e-3):  # NaN is neither
            raise ValueError(
                f"images: got pixels from {low:.4g} to {high:.4g}, expected [-1, 1], where a "
                "generator's images lie"
            )


def _latent_dim(generator: nn.Module) -> int:
    return int(generator.latent_dim)  # type: ignore[arg-type]


@torch.no_grad()
def _starts(
    generator: nn.Module,
    targets: Callable[[Tensor], Tensor],
    labels: Tensor,
    starts: int,
    seed: int,
) -> Tensor:
    """For each image the nearest in pixels of `starts` random latents of its class."""
    dtype, device = place(generator)
    chosen = torch.empty(len(labels), _latent_dim(generator), dtype=dtype, device=device)
    labels = labels.cpu()
    for label in labels.unique().tolist():
        random = make_generator(seed, "inversion: starts", label)
        latents = torch.randn(starts, _latent_dim(generator), generator=random).to(device, dtype)
        made = torch.cat(
            [
                generator(some, torch.full((len(some),), label, device=device)).flatten(1)
                for some in latents.split(100)
            ]
        )
        members = (labels == label).nonzero()[:, 0]
        for some in members.split(CHUNK):
            distances = torch.cdist(targets(some).flatten(1), made.to(dtype))
            chosen[some] = latents[distances.argmin(1)]
    return chosen


def _kept_bytes(
    generator: nn.Module, features: Features, start: Tensor, labels: Tensor, feature_weight: float
) -> int:
    """Bytes an image that autograd keeps for the backward pass, of any generator and network."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    totals = []
    for count in (1, 3):  # the difference leaves out weights and buffers
        kept.clear()
        latents = start[:1].repeat(count, 1).requires_grad_()
        where = labels[:1].repeat(count).to(start.device)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            made = generator(latents, where)
            loss = made.square().sum()
            if feature_weight:
                loss = loss + features(made).square().sum()
        totals.append(sum(kept.values()))
        del made, loss
    return max(1, (totals[1] - totals[0]) // 2)


@torch.no_grad()
def _feature_scale(
    features: Features, targets: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]
) -> float:
    """The mean square of the real images' features."""
    total, count = 0.0, 0
    for piece in pieces:
        values = features(targets(piece))
        total += values.double().square().sum().item()
        count += values.numel()
    return max(total / count, 1e-12)
