"""What every reader returns: a training and a test split of labelled uint8 images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddfast.data.normalisation import normalise

if TYPE_CHECKING:
    from ddfast.data.whitening import Whitening

__all__ = ["Dataset", "check_labels"]


def _some(values: list[str]) -> str:
    return ", ".join(values[:10]) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise unless ``labels`` is a 1-D int64 tensor of classes in ``[0, num_classes)``."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{what} must be int64, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"{what} must have shape (N,), got {tuple(labels.shape)}")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        place = int(outside.nonzero()[0])
        raise ValueError(
            f"{what} must lie in 0..{num_classes - 1} for {num_classes} classes, "
            f"got {int(labels[place])} at position {place}"
        )


def _check_images(images: Tensor, what: str) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{what} must be uint8 with values 0..255 (they are normalised on the fly), "
            f"got {images.dtype}"
        )
    if images.dim() != 4:
        raise ValueError(
            f"{what} must have shape (N, channels, height, width), got {tuple(images.shape)}"
        )
    if 0 in images.shape:
        raise ValueError(f"{what} is empty: shape {tuple(images.shape)}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, checked when made.

    Attributes:
        name: the canonical name (see :func:`ddfast.data.load`).
        train_images: uint8 ``(N, channels, H, W)``.
        train_labels: int64 ``(N,)`` in ``[0, num_classes)``; every class occurs.
        test_images: uint8 ``(M, channels, H, W)``.
        test_labels: int64 ``(M,)``; a class may be missing.
        class_names: one name a class.
        mean, std: one number a channel, for pixels scaled to 0..1; normalised images are
            ``(x / 255 - mean) / std``.
        test_split: what the test images are, ``"test"`` or (see :func:`ddfast.data.hold_out`)
            ``"validation"``.
        whitening: None, or what normalised images are transformed by, see
            :func:`ddfast.data.whitened`.

    Raises:
        TypeError: images that are not uint8, labels that are not int64.
        ValueError: shapes, lengths, labels or statistics that do not fit together, or classes
            without a training image; the message names the argument or the classes.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_split: str = "test"
    whitening: Whitening | None = None

    def __post_init__(self) -> None:
        # Lists are welcome; what is kept is immutable and of plain types.
        object.__setattr__(self, "class_names", tuple(str(name) for name in self.class_names))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if not self.class_names:
            raise ValueError("class_names is empty: a data set needs at least one class")
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            _check_images(images, f"{split}_images")
            check_labels(labels, self.num_classes, f"{split}_labels")
            if len(images) != len(labels):
                raise ValueError(
                    f"{split}_images and {split}_labels differ in length: "
                    f"{len(images)} and {len(labels)}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                "train_images and test_images differ in (channels, height, width): "
                f"{tuple(self.train_images.shape[1:])} and {tuple(self.test_images.shape[1:])}"
            )
        counts = torch.bincount(self.train_labels, minlength=self.num_classes)
        missing = [f"{c} ({self.class_names[c]})" for c in (counts == 0).nonzero()[:, 0].tolist()]
        if missing:
            raise ValueError(f"train_labels has no image of class {_some(missing)}")
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"{what} must have one number for each of {self.channels} channels, "
                    f"got {len(values)}"
                )
            if not all(math.isfinite(value) for value in values):
                raise ValueError(f"{what} must be finite, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}")
        numbers = self.train_images[0].numel()
        if self.whitening is not None and self.whitening.size != numbers:
            raise ValueError(
                f"whitening is for images of {self.whitening.size} numbers, these have {numbers}"
            )

    @property
    def num_classes(self) -> int:
        """As many as there are class names."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Of each image."""
        return int(self.train_images.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.train_images.shape[2]), int(self.train_images.shape[3])

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images as networks see them: :func:`ddfast.data.normalise`, then whitened if need be.

        Args:
            images: uint8 ``(N, channels, H, W)``, on any device.
            dtype: a floating-point type.

        Returns:
            A new tensor of the same shape in ``dtype``.
        """
        found = normalise(images, self.mean, self.std, dtype)
        return found if self.whitening is None else self.whitening(found)

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"Dataset({self.name!r}: {len(self.train_labels)} train and {len(self.test_labels)} "
            f"{self.test_split} images of {self.num_classes} classes, "
            f"{self.channels}x{height}x{width})"
        )
