"""ZCA whitening of images: four published ways that do not give the same pixels.

With x a channel-normalised image as a row of d numbers, N training images and U diag(e) U' the
eigendecomposition of their covariance, an image becomes (x - m) U diag(w) U':

=======  =========================================================================================
`kip`    first x is centred by its own mean and divided by its own length; no m; Cov = X'X / N;
         w = (e + 0.1 tr(Cov)/d)^(-1/2), but 1 beyond the rank N of fewer images than pixels
         (Nguyen et al., NeurIPS 2021)
`rfad`   no m; Cov = X'X / N; w = (e + 0.1 tr(Cov)/d)^(-1/2) (Loo et al., NeurIPS 2022; for SVHN it
         centres and divides each image, which is `kip`'s beginning)
`frepo`  m the mean image; Cov the covariance, over N; w as `rfad`; images of more than 64 pixels a
         side in blocks of 64 x 64, all by the mean of the blocks' covariances (Zhou et al.,
         NeurIPS 2022)
`mtt`    of pixels scaled to 0..1 in place of x; m the mean image; Cov over N - 1;
         w = (e + 0.1)^(-1/2) (Cazenavette et al., CVPR 2022; kornia's)
=======  =========================================================================================

Sums and eigenvalues are float64's, and the images are transformed in their own dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.normalisation import normalise

__all__ = ["MODES", "Whitening", "fit_whitening", "whitened"]

MODES = ("kip", "rfad", "frepo", "mtt")

Recipe = Literal["none", "kip", "rfad", "frepo", "mtt"]
"""One of `MODES`, or that images are not whitened."""

BLOCK = 64  # pixels a side, in `frepo`
SHARE = 0.1  # of the mean eigenvalue that is added to all; in mtt the amount itself
MOST = 3 * 64 * 64  # numbers of an image or block; the matrix has as many rows and columns
CHUNK = 1 << 24  # numbers at a time


@dataclass(frozen=True, eq=False)
class Whitening:
    """A fitted transform of channel-normalised images.

    Attributes:
        mode: one of `MODES`, or any name for a transform of your own.
        shift: float32 `(d,)`, subtracted first.
        matrix: float32 `(d, d)`; rows of pixels, channel after channel, are multiplied by it.
            With blocks `(b, b)`, b the numbers of one.
        block: pixels a side of the square blocks that are multiplied, each for itself; 0 for whole
            images.
        length: 0; or where each image is first centred by its own mean and divided by its own
            length, the mean such length of the training images.

    Raises:
        TypeError, ValueError: tensors that do not fit together or are not finite.
    """

    mode: str
    shift: Tensor
    matrix: Tensor
    length: float = 0.0
    block: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 0:
            raise ValueError(f"block must be an integer of at least 0, got {self.block!r}")
        for name, tensor, dims in (("shift", self.shift, 1), ("matrix", self.matrix, 2)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                raise TypeError(f"{name} must be a float32 tensor")
            side = len(self.matrix) if self.block and name == "matrix" else len(self.shift)
            if tensor.shape != (side,) * dims or not tensor.numel():
                raise ValueError(
                    f"{name} must have shape {(side,) * dims}, got {tuple(tensor.shape)}"
                )
            if self.block and (side % self.block**2 or len(self.shift) % side):
                raise ValueError(
                    f"{name} has {side} numbers a row, which blocks of {self.block} pixels a side "
                    "do not divide"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has values that are not finite")
            own = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            object.__setattr__(self, name, own)
        if not isinstance(self.mode, str):
            raise TypeError(f"mode must be a string, got {self.mode!r}")
        if not (math.isfinite(self.length) and self.length >= 0):
            raise ValueError(f"length must be finite and at least 0, got {self.length}")

    @property
    def size(self) -> int:
        """Numbers of an image."""
        return len(self.shift)

    def __call__(self, images: Tensor) -> Tensor:
        """Channel-normalised images as whitened ones.

        Args:
            images: floating-point `(N, channels, H, W)`.

        Returns:
            A new tensor of the same shape and dtype. An image of one value everywhere, which has
            no length, counts as zero where images are divided by it.

        Raises:
            ValueError: images of another size.
        """
        rows = self._rows(images)
        if self.length:
            rows = _of_unit_length(rows)
        shift, matrix = self._like(rows)
        found = self._whole(self._parts(rows - shift, images) @ matrix, images)
        return found.view(images.shape).to(images.dtype)

    def inverse(self, images: Tensor) -> Tensor:
        """Whitened images as channel-normalised ones, for looking at them.

        Where each image was centred and divided by its length, which is lost, it gets the mean
        length of the training images.

        Args, Returns and Raises as for `__call__`.
        """
        rows = self._rows(images).double()
        shift, matrix = (tensor.double() for tensor in self._like(rows))
        parts = torch.linalg.solve(matrix, self._parts(rows, images), left=False)
        found = self._whole(parts, images) + shift
        if self.length:
            found = found * self.length
        return found.view(images.shape).to(images.dtype)

    def _rows(self, images: Tensor) -> Tensor:
        if images.dim() < 2 or images[0].numel() != self.size:
            raise ValueError(
                f"images must have {self.size} numbers each for this whitening, got "
                f"{tuple(images.shape)}"
            )
        if self.block and (images.dim() != 4 or any(s % self.block for s in images.shape[2:])):
            raise ValueError(
                f"images must be (N, channels, H, W) with sides that are multiples of {self.block} "
                f"for this whitening, got {tuple(images.shape)}"
            )
        rows = images.flatten(1)
        return rows if rows.dtype == torch.float64 else rows.float()

    def _parts(self, rows: Tensor, images: Tensor) -> Tensor:
        """What the matrix multiplies: rows of whole images, or of blocks."""
        return _blocks(rows.view(images.shape), self.block) if self.block else rows

    def _whole(self, parts: Tensor, images: Tensor) -> Tensor:
        """`_parts` undone."""
        if not self.block:
            return parts
        count, channels, height, width = images.shape
        side = self.block
        grid = (count, height // side, width // side, channels, side, side)
        return parts.view(grid).permute(0, 3, 1, 4, 2, 5).reshape(count, -1)

    def _like(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.shift.to(rows), self.matrix.to(rows)

    def __repr__(self) -> str:
        return f"Whitening({self.mode!r}, {self.size} numbers an image)"


def fit_whitening(
    images: Tensor, mean: Sequence[float], std: Sequence[float], mode: str, unit: bool | None = None
) -> Whitening:
    """The whitening of training images.

    Args:
        images: uint8 `(N, channels, H, W)`; read in chunks.
        mean, std: by which channels are normalised first, see `ddfast.data.normalise`.
        mode: one of `MODES`.
        unit: whether each image is first centred and divided by its length; None: as published.

    Raises:
        TypeError, ValueError: images or constants that do not fit, an unknown mode, fewer than two
            images, or images of more than 3 x 64 x 64 numbers; in mode `frepo` such whose sides
            are no multiples of 64 pixels.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(
            f"images must be at least two, (N, channels, H, W), got {tuple(images.shape)}"
        )
    refusal = problem(images.shape[1:], mode)
    if refusal:
        raise ValueError(f"images {refusal}")
    count, d = len(images), images[0].numel()
    block = BLOCK if mode == "frepo" and max(images.shape[2:]) > BLOCK else 0
    if block:
        return _fitted_to_blocks(images, mean, std, block)
    unit = mode == "kip" if unit is None else unit
    total, squares, lengths = torch.zeros(d).double(), torch.zeros(d, d).double(), 0.0
    for chunk in images.split(max(1, CHUNK // d)):
        rows = normalise(chunk, mean, std, torch.float64).flatten(1)
        if unit:
            lengths += (rows - rows.mean(1, keepdim=True)).norm(dim=1).sum().item()
            rows = _of_unit_length(rows)
        total += rows.sum(0)
        squares.addmm_(rows.T, rows)
    middle, covariance = total / count, squares / count
    rounding = 1e-12 * covariance.diagonal().mean()
    scale = torch.tensor([float(s) for s in std]).double().repeat_interleave(d // len(std))
    if mode in ("frepo", "mtt"):
        covariance -= torch.outer(middle, middle)
    else:
        middle = torch.zeros_like(middle)
    if mode == "mtt":
        covariance *= count / (count - 1) * torch.outer(scale, scale)
    values, vectors = _spectrum(covariance, rounding)
    added = SHARE if mode == "mtt" else SHARE * values.mean()
    factors = (values + added).rsqrt()
    if mode == "kip" and count < d:
        factors[: d - count] = 1
    matrix = (vectors * factors) @ vectors.T
    if mode == "mtt":
        matrix *= scale[:, None]
    return Whitening(mode, middle.float(), matrix.float(), lengths / count)


def problem(image: Sequence[int], mode: str) -> str:
    """Why images (channels, H, W) cannot be whitened by a mode: what to say of them, or nothing."""
    d = math.prod(image)
    if mode == "frepo" and max(image[1:]) > BLOCK:
        if any(side % BLOCK for side in image[1:]):
            return f"are {image[1]}x{image[2]}; mode frepo has blocks of {BLOCK} pixels a side"
        d = image[0] * BLOCK**2
    if d > MOST:
        return f"have {d} numbers each; whitening is offered up to {MOST}, 3 x 64 x 64"
    return ""


def _fitted_to_blocks(
    images: Tensor, mean: Sequence[float], std: Sequence[float], block: int
) -> Whitening:
    """FRePo's of large images: less the mean image, one covariance for all blocks.

    The mean of the blocks' covariances is that of all blocks as rows, of which each position has
    lost its own mean.
    """
    size = images.shape[1] * block**2
    total = torch.zeros(images.shape[1:]).double()
    squares, rows = torch.zeros(size, size).double(), 0
    chunks = images.split(max(1, CHUNK // images[0].numel()))
    for chunk in chunks:
        total += normalise(chunk, mean, std, torch.float64).sum(0)
    middle = total / len(images)
    for chunk in chunks:
        parts = _blocks(normalise(chunk, mean, std, torch.float64) - middle, block)
        squares.addmm_(parts.T, parts)
        rows += len(parts)
    rounding = 1e-12 * (middle.square().mean() + squares.diagonal().mean() / rows)
    values, vectors = _spectrum(squares / rows, rounding)
    matrix = (vectors * (values + SHARE * values.mean()).rsqrt()) @ vectors.T
    return Whitening("frepo", middle.flatten().float(), matrix.float(), block=block)


def _spectrum(covariance: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below 0, and eigenvectors; refused where all is rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    values.clamp_(min=0)
    if values.mean() <= rounding:
        raise ValueError("images are all alike, which leaves nothing to whiten")
    return values, vectors


def _blocks(images: Tensor, side: int) -> Tensor:
    """(N, channels, H, W) as a row for each block, row of blocks after row of blocks."""
    parts = images.unfold(2, side, side).unfold(3, side, side)
    return parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * side**2)


def whitened(dataset: Dataset, mode: str) -> Dataset:
    """The data set whose `normalised` images are whitened, as its training images say.

    Args:
        dataset: without whitening.
        mode: one of `MODES`, or "none", which gives the data set as it is. RFAD's of SVHN centres
            and divides each image, as published.

    Raises:
        ValueError: an unknown mode, images too large, a data set that is whitened already.
    """
    if mode == "none":
        return dataset
    if dataset.whitening is not None:
        raise ValueError(f"{dataset.name} is whitened already, by {dataset.whitening!r}")
    unit = True if (mode, dataset.name) == ("rfad", "SVHN") else None
    found = fit_whitening(dataset.train_images, dataset.mean, dataset.std, mode, unit)
    return dataclasses.replace(dataset, whitening=found)


def _of_unit_length(rows: Tensor) -> Tensor:
    """Rows minus their means, divided by what length is left."""
    rows = rows - rows.mean(1, keepdim=True)
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1)
