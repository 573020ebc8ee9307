"""ZCA whitening of images: four published ways that do not give the same pixels.

With x a channel-normalised image as a row of d numbers, N training images and U diag(e) U' the
eigendecomposition of their covariance, an image becomes (x - m) U diag(w) U':

=======  =========================================================================================
`kip`    first x is centred by its own mean and divided by its own length; no m; Cov = X'X / N;
         w = (e + 0.1 tr(Cov)/d)^(-1/2), but 1 beyond the rank N of fewer images than pixels
         (Nguyen et al., NeurIPS 2021)
`rfad`   no m; Cov = X'X / N; w = (e + 0.1 tr(Cov)/d)^(-1/2) (Loo et al., NeurIPS 2022; for SVHN it
         centres and divides each image, which is `kip`'s beginning)
`frepo`  m the mean image; Cov the covariance, over N; w as `rfad` (Zhou et al., NeurIPS 2022)
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

import torch
from torch import Tensor

from ddfast.data.dataset import Dataset
from ddfast.data.normalisation import normalise

__all__ = ["MODES", "Whitening", "fit_whitening", "whitened"]

MODES = ("kip", "rfad", "frepo", "mtt")

SHARE = 0.1  # of the mean eigenvalue that is added to all; in mtt the amount itself
MOST = 3 * 64 * 64  # numbers of an image; the matrix has as many rows and columns
CHUNK = 1 << 24  # numbers at a time


@dataclass(frozen=True, eq=False)
class Whitening:
    """A fitted transform of channel-normalised images.

    Attributes:
        mode: one of `MODES`, or any name for a transform of your own.
        shift: float32 `(d,)`, subtracted first.
        matrix: float32 `(d, d)`; rows of pixels, channel after channel, are multiplied by it.
        length: 0; or where each image is first centred by its own mean and divided by its own
            length, the mean such length of the training images.

    Raises:
        TypeError, ValueError: tensors that do not fit together or are not finite.
    """

    mode: str
    shift: Tensor
    matrix: Tensor
    length: float = 0.0

    def __post_init__(self) -> None:
        for name, tensor, dims in (("shift", self.shift, 1), ("matrix", self.matrix, 2)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                raise TypeError(f"{name} must be a float32 tensor")
            if tensor.shape != (len(self.shift),) * dims or not tensor.numel():
                raise ValueError(
                    f"{name} must have shape {(len(self.shift),) * dims}, got {tuple(tensor.shape)}"
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
        return ((rows - shift) @ matrix).view(images.shape).to(images.dtype)

    def inverse(self, images: Tensor) -> Tensor:
        """Whitened images as channel-normalised ones, for looking at them.

        Where each image was centred and divided by its length, which is lost, it gets the mean
        length of the training images.

        Args, Returns and Raises as for `__call__`.
        """
        rows = self._rows(images).double()
        shift, matrix = (tensor.double() for tensor in self._like(rows))
        found = torch.linalg.solve(matrix, rows, left=False) + shift
        if self.length:
            found = found * self.length
        return found.view(images.shape).to(images.dtype)

    def _rows(self, images: Tensor) -> Tensor:
        if images.dim() < 2 or images[0].numel() != self.size:
            raise ValueError(
                f"images must have {self.size} numbers each for this whitening, got "
                f"{tuple(images.shape)}"
            )
        rows = images.flatten(1)
        return rows if rows.dtype == torch.float64 else rows.float()

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
        TypeError, ValueError: images or constants that do not fit, an unknown mode, images of more
            than 3 x 64 x 64 numbers, or fewer than two images.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(
            f"images must be at least two, (N, channels, H, W), got {tuple(images.shape)}"
        )
    count, d = len(images), images[0].numel()
    if d > MOST:
        raise ValueError(
            f"images have {d} numbers each; whitening is offered up to {MOST}, 3 x 64 x 64"
        )
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
    values, vectors = torch.linalg.eigh(covariance)
    values.clamp_(min=0)
    if values.mean() <= rounding:
        raise ValueError("images are all alike, which leaves nothing to whiten")
    added = SHARE if mode == "mtt" else SHARE * values.mean()
    factors = (values + added).rsqrt()
    if mode == "kip" and count < d:
        factors[: d - count] = 1
    matrix = (vectors * factors) @ vectors.T
    if mode == "mtt":
        matrix *= scale[:, None]
    return Whitening(mode, middle.float(), matrix.float(), lengths / count)


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
