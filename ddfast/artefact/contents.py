"""A distilled set with its preprocessing and its recipe; all of it is checked when it is made."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast._version import __version__
from ddfast.data.dataset import check_labels
from ddfast.data.normalisation import denormalise
from ddfast.data.whitening import Whitening
from ddfast.synthetic import check_decoder, decode, grid, labelled

__all__ = ["SPACES", "Artefact"]

SPACES = ("normalised", "pixel")
"""What numbers the images of an artefact may be, see :class:`Artefact`."""


def _versions() -> dict[str, str]:
    return {"ddfast": __version__, "torch": str(torch.__version__)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Artefact:
    """A distilled set with all that is needed to use it and to make it again; checked when made.

    Tensors are copied to the CPU; mappings and sequences become plain values that survive JSON.

    Attributes:
        images: float32 `(N, channels, H, W)`, finite.
        labels: int64 `(N,)` in `[0, num_classes)`; with a decoder of shared bases, one for each
            row of the coefficients.
        space: `"normalised"` for `(pixel / 255 - mean) / std` per channel, `"pixel"` for
            `pixel / 255`.
        whitening: None, or by what normalised images were transformed: the images are in its space,
            and whatever network or kernel they are used with has to see others through it, too.
        mean, std: the constants of the data set it was made from, one number a channel.
        class_names: one name a class, in the order of the labels.
        dataset: name of the data set.
        method: name of the method.
        config: settings of the method, plain values.
        seed: of the run.
        soft_labels: None, or float32 `(N, num_classes)`, finite.
        lr: None, or the learning rate that was learned with the images, above 0; several of them
            where the method learned one for each training step.
        decoder: None, or how `decoded` makes the images to train on from those stored: plain
            values for `ddfast.synthetic.decode`.
        decoder_tensors: float32 of any shape, by name, what the decoder needs beside the images;
            finite.
        versions: of ddfast and torch.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: shapes, labels or statistics that do not fit together; a pixel that is not
            finite, with its class.
    """

    images: Tensor
    labels: Tensor
    space: str
    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str]
    dataset: str
    method: str
    config: Mapping[str, Any]
    seed: int
    soft_labels: Tensor | None = None
    lr: float | Sequence[float] | None = None
    decoder: Mapping[str, Any] | None = None
    decoder_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    whitening: Whitening | None = None
    versions: Mapping[str, str] = field(default_factory=_versions)

    def __post_init__(self) -> None:
        for name in ("dataset", "method", "space"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}")
        if isinstance(self.class_names, str) or not self.class_names:
            raise ValueError(f"class_names must name each class, got {self.class_names!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        self._keep("class_names", tuple(str(name) for name in self.class_names))
        self._keep("config", _plain("config", self.config))
        self._keep("versions", _plain("versions", self.versions))
        if self.decoder is not None:
            self._keep("decoder", _plain("decoder", self.decoder))
        _check_tensor("images", self.images, torch.float32, "(N, channels, H, W)", 4)
        check_labels(self.labels, self.num_classes, "labels")
        rows = self._rows()
        if len(self.labels) != rows:
            raise ValueError(f"images and labels differ in length: {rows} and {len(self.labels)}")
        for name in ("images", "labels"):
            self._keep(name, _own(getattr(self, name)))
        _check_statistics(self)
        self._check_finite("images", self.images)
        if self.soft_labels is not None:
            _check_tensor(
                "soft_labels", self.soft_labels, torch.float32, "(N, number of classes)", 2
            )
            if self.soft_labels.shape != (len(self.labels), self.num_classes):
                raise ValueError(
                    f"soft_labels must have shape {(len(self.labels), self.num_classes)}, "
                    f"got {tuple(self.soft_labels.shape)}"
                )
            self._keep("soft_labels", _own(self.soft_labels))
            self._check_finite("soft_labels", self.soft_labels)
        if self.lr is not None:
            self._keep_lr(self.lr)
        if self.decoder is not None:
            check_decoder(self.decoder, (self.images.shape[2], self.images.shape[3]))
        self._check_whitening()

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_whitening(self) -> None:
        if self.whitening is None:
            return
        if not isinstance(self.whitening, Whitening):
            raise TypeError(f"whitening must be a Whitening, got {type(self.whitening).__name__}")
        numbers = self.channels * self.size[0] * self.size[1]
        if self.space != "normalised" or self.whitening.size != numbers:
            raise ValueError(
                f"whitening is for normalised images of {self.whitening.size} numbers, these are "
                f"{self.space} and have {numbers}"
            )

    def _keep_lr(self, lr: float | Sequence[float]) -> None:
        many = isinstance(lr, Sequence)
        values = tuple(float(value) for value in lr) if isinstance(lr, Sequence) else (float(lr),)
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"lr must be finite and above 0, got {lr}")
        self._keep("lr", values if many else values[0])

    def _rows(self) -> int:
        """How many labels there must be; keeps and checks the tensors of the decoder."""
        kept = {}
        for name, tensor in self.decoder_tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                raise TypeError(f"decoder_tensors: {name} must be a float32 tensor")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"decoder_tensors: {name} has values that are not finite")
            kept[name] = _own(tensor)
        self._keep("decoder_tensors", kept)
        rows = labelled(self.decoder)
        if rows != "images" and rows not in kept:
            raise ValueError(f"decoder_tensors: {rows} is missing, which the decoder needs")
        return len(self.images if rows == "images" else kept[rows])

    def _check_finite(self, what: str, values: Tensor) -> None:
        bad = ~torch.isfinite(values.flatten(1)).all(1)
        if bad.any():
            place = int(bad.nonzero()[0])
            if len(values) != len(self.labels):  # bases, which belong to no class
                raise ValueError(f"{what} has values that are not finite: number {place}")
            label = int(self.labels[place])
            raise ValueError(
                f"{what} has values that are not finite: number {place}, of class {label} "
                f"({self.class_names[label]}), is the first of {int(bad.sum())}"
            )

    @property
    def num_classes(self) -> int:
        """As many as there are class names."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Of each image."""
        return int(self.images.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, of what is decoded."""
        if self.decoder is not None and "height" in self.decoder:
            return int(self.decoder["height"]), int(self.decoder["width"])
        return int(self.images.shape[2]), int(self.images.shape[3])

    @property
    def stored_numbers(self) -> int:
        """Numbers that the set consists of, labels aside: images and tensors of the decoder."""
        tensors = [self.images, *self.decoder_tensors.values()]
        return sum(tensor.numel() for tensor in tensors)

    def decoded(self) -> Artefact:
        """The set to train on, with no decoder of its own; this one if it needs no decoding."""
        if self.decoder is None:
            return self
        per_class = torch.bincount(self.labels, minlength=self.num_classes).tolist()
        order = torch.argsort(self.labels, stable=True)
        tensors = {"images": self.images, **self.decoder_tensors}
        rows = labelled(self.decoder)
        tensors[rows] = tensors[rows][order]
        images, sources = decode(self.decoder, tensors.pop("images"), per_class, tensors)
        sources = order[sources]
        soft = None if self.soft_labels is None else self.soft_labels[sources]
        return replace(
            self,
            images=images,
            labels=self.labels[sources],
            soft_labels=soft,
            decoder=None,
            decoder_tensors={},
        )

    def picture(self, path: str | os.PathLike[str]) -> Path:
        """Write a picture of the set, see :func:`ddfast.synthetic.grid`.

        It shows the stored images; where networks make images of them, those, 20 a class at most.
        """
        made, most = (self.decoded(), 20) if self.decoder_tensors else (self, None)
        if self.whitening is not None:
            made = made.decoded()
        images = made.normalised(self.mean, self.std)
        return grid(images, made.labels, self.mean, self.std, path, per_row=most)

    def to_pixels(self) -> Tensor:
        """The images as uint8 `(N, channels, H, W)`, rounded and clamped to 0..255."""
        if self.whitening is not None:
            return self.unwhitened().to_pixels()
        if self.space == "normalised":
            return denormalise(self.images, self.mean, self.std)
        return denormalise(self.images, [0.0] * self.channels, [1.0] * self.channels)

    def unwhitened(self) -> Artefact:
        """The set with images as they look; this one if they are not whitened.

        Not to be trained on: whitening may have lost the contrast of each image, see
        `ddfast.data.Whitening.inverse`.
        """
        if self.whitening is None:
            return self
        made = self.decoded()
        return replace(made, images=self.whitening.inverse(made.images), whitening=None)

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """The images normalised with other constants, float32 `(N, channels, H, W)`.

        The very same bits if they are normalised with these already. Else they go through pixels
        scaled to 0..1, neither rounded nor clamped: a distilled image may leave that range.
        Whitened ones are un-whitened first.

        Args:
            mean, std: one number a channel, for pixels scaled to 0..1.

        Raises:
            ValueError: not one number a channel.
        """
        if self.whitening is not None:
            return self.unwhitened().normalised(mean, std)
        target = tuple(float(value) for value in mean), tuple(float(value) for value in std)
        if len(target[0]) != self.channels or len(target[1]) != self.channels:
            raise ValueError(
                f"mean and std must have one number for each of {self.channels} channels, "
                f"got {len(target[0])} and {len(target[1])}"
            )
        if self.space == "normalised" and target == (self.mean, self.std):
            return self.images
        unit = self.images.double()
        if self.space == "normalised":
            unit = unit * _columns(self.std) + _columns(self.mean)
        shift, scale = (_columns(values) for values in target)
        return ((unit - shift) / scale).float()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file at `path`, see :func:`ddfast.artefact.save`."""
        from ddfast.artefact.file import save  # which imports this module

        return save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Artefact:
        """Read the file at `path`, see :func:`ddfast.artefact.load`."""
        from ddfast.artefact.file import load

        return load(path)

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        return (
            f"Artefact({self.method} on {self.dataset}: {len(self.images)} {self.space} images "
            f"of {self.num_classes} classes, {channels}x{height}x{width})"
        )


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, outside any graph."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check_tensor(what: str, value: object, dtype: torch.dtype, shape: str, dims: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{what} must be {str(dtype)[6:]}, got {str(value.dtype)[6:]}")
    if value.dim() != dims or 0 in value.shape:
        raise ValueError(f"{what} must have shape {shape}, not empty, got {tuple(value.shape)}")


def _check_statistics(artefact: Artefact) -> None:
    for name in ("mean", "std"):
        values = getattr(artefact, name)
        try:
            numbers = tuple(float(value) for value in values)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a sequence of numbers, got {values!r}") from None
        if len(numbers) != artefact.channels:
            raise ValueError(
                f"{name} must have one number for each of {artefact.channels} channels, "
                f"got {len(numbers)}"
            )
        if not all(math.isfinite(number) and (name == "mean" or number > 0) for number in numbers):
            wanted = "finite" if name == "mean" else "finite and above 0"
            raise ValueError(f"{name} must be {wanted}, got {numbers}")
        artefact._keep(name, numbers)


def _plain(name: str, value: object) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must consist of plain values: {error}") from None
    if not isinstance(plain, dict):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
    return plain


def _columns(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float64).view(-1, 1, 1)
