"""Differentiable siamese augmentation (DSA; Zhao and Bilen, ICML 2021) on compiled kernels.

    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    draw = dsa.draw(generator, size=(32, 32))       # one operation with its parameters
    real, syn = dsa(real, draw), dsa(syn, draw)     # the same for both: siamese

A draw is a small tensor, so it can be kept, sent and applied again. Each operation is one pass over
the images and exactly differentiable in them to every order; the parameters are constants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddfast.losses.dtypes import FLOATS
from ddfast.ops.augment import augment
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.augment import OPERATIONS

__all__ = ["DSA", "OPERATIONS", "apply"]


def parse_strategy(strategy: str | None) -> tuple[str, ...]:
    """The operations that a strategy such as "color_crop" names; none for "", "none" and None.

    Raises:
        TypeError: not a string. ValueError: an operation that does not exist.
    """
    if strategy is None:
        return ()
    if not isinstance(strategy, str):
        raise TypeError(f"strategy: got {type(strategy).__name__}, expected a string")
    if strategy.lower() in ("", "none"):
        return ()
    names = tuple(strategy.split("_"))
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(
                f"strategy: got {strategy!r} with unknown operation {name!r}, expected some of "
                f"{', '.join(OPERATIONS)} joined by underscores"
            )
    return names


def shift_limit(side: int, ratio: float) -> int:
    """Largest shift that crop draws, in pixels, for images of this side."""
    return int(side * ratio + 0.5)


def offset_count(side: int, ratio: float) -> int:
    """How many places cutout's centre may take along a side, from 0 on."""
    return side + 1 - int(side * ratio + 0.5) % 2


@dataclasses.dataclass(frozen=True)
class DSA:
    """A distribution over augmentations; the defaults are the published settings.

    Attributes:
        strategy: operations joined by underscores, from color, crop, cutout, flip, scale, rotate.
            "", "none" or None: the identity.
        mode: "S" applies one operation of the strategy, drawn uniformly; "M" all, in its order;
            "C", combined, is IDC's: flip and color, then one of crop, scale and rotate, then
            cutout, as far as the strategy names them.
        prob_flip: probability of a mirrored image.
        ratio_scale: each axis is sampled at a factor from 1/ratio_scale to ratio_scale.
        ratio_rotate: largest angle either way, in degrees.
        ratio_crop_pad: largest shift either way, as a share of the image's side.
        ratio_cutout: side of the erased square, as a share of the image's side.
        brightness: width of the interval around 0 that is added.
        saturation: saturation is multiplied by up to this.
        contrast: contrast is multiplied by a factor from this to this + 1.
        align_corners: True: scale and rotate as torch 1.2 did, for which the official code was
            written (its pixel centres, not its treatment of sides of one pixel). False: as the same
            code does on torch from 1.3 on.

    Raises:
        TypeError, ValueError: unknown operation or mode, parameter out of range.
    """

    strategy: str | None = "color_crop_cutout_flip_scale_rotate"
    mode: str = "S"
    prob_flip: float = 0.5
    ratio_scale: float = 1.2
    ratio_rotate: float = 15.0
    ratio_crop_pad: float = 0.125
    ratio_cutout: float = 0.5
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    align_corners: bool = False

    def __post_init__(self) -> None:
        parse_strategy(self.strategy)
        if self.mode not in ("S", "M", "C"):
            raise ValueError(
                f"mode: got {self.mode!r}, expected 'S' (one operation), 'M' (all) or 'C' (IDC's)"
            )
        for field in dataclasses.fields(self)[2:-1]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name}: got {value!r}, expected a number")
            if not 0 <= value <= 1e6:
                raise ValueError(f"{field.name}: got {value}, expected a number >= 0")
        if self.prob_flip > 1:
            raise ValueError(f"prob_flip: got {self.prob_flip}, expected a probability")
        if self.ratio_scale == 0:
            raise ValueError("ratio_scale: got 0, expected a number > 0")

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations of the strategy, in its order."""
        return parse_strategy(self.strategy)

    @property
    def passes(self) -> list[tuple[str, ...]]:
        """For each pass over the images the operations of which it applies one."""
        names = self.operations
        if self.mode == "M":
            return [(name,) for name in names]
        if self.mode == "S":
            return [names] if names else []
        one = tuple(name for name in names if name not in ("flip", "color", "cutout"))
        first = [(name,) for name in ("flip", "color") if name in names]
        last = [("cutout",)] if "cutout" in names else []
        return [*first, *([one] if one else []), *last]

    def draw(
        self,
        generator: torch.Generator,
        size: Sequence[int],
        count: int = 1,
        independent: bool = False,
    ) -> Tensor:
        """Draw operations and parameters.

        Args:
            generator: a CPU generator; the only source of randomness.
            size: (height, width) of the images, on which shifts and offsets depend.
            count: rows, each with parameters of its own. 1: siamese, one row for any number of
                images. Where one operation of several is drawn, all rows have the same one, as in
                the published code's augmentation of training batches.
            independent: each row draws an operation of its own, too (one row per class, say).

        Returns:
            (passes, count, 4), float64, on the CPU: passes 1 in mode "S", as many as operations in
            mode "M", 0 for the identity. The columns are explained in ddfast.reference.augment.

        Raises:
            TypeError, ValueError: not a CPU generator, size not two positive integers, count < 1.
        """
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, expected torch.Generator")
        if generator.device.type != "cpu":
            raise ValueError(f"generator: on {generator.device}, expected the CPU")
        if len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"size: got {size}, expected (height, width)")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count: got {count!r}, expected an integer >= 1")
        passes = self.passes
        # Always four numbers a row, so that how many are used up does not depend on the operation.
        shape = (len(passes), count, 4)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        record = np.zeros(shape)
        for i, names in enumerate(passes):
            chosen = (uniform[i, :, 0] * len(names)).astype(np.int64)
            chosen = chosen if independent else chosen[:1].repeat(count)
            for k in np.unique(chosen):
                where = chosen == k
                record[i, where, 0] = OPERATIONS.index(names[k])
                columns = self._parameters(names[k], uniform[i, where, 1:].T, tuple(size))
                for column, values in enumerate(columns, 1):
                    record[i, where, column] = values
        return torch.from_numpy(record)

    def _parameters(
        self, name: str, u: np.ndarray, size: tuple[int, ...]
    ) -> list[np.ndarray | float]:
        """An operation's parameters from u, (3, rows), uniform in [0, 1); missing ones are 0."""
        if name == "color":
            brightness, saturation = (u[0] - 0.5) * self.brightness, u[1] * self.saturation
            return [brightness, saturation, u[2] + self.contrast]
        if name == "crop":
            limits = [shift_limit(side, self.ratio_crop_pad) for side in size]
            return [np.floor(v * (2 * k + 1)) - k for v, k in zip(u[:2], limits, strict=True)]
        if name == "cutout":
            counts = [offset_count(side, self.ratio_cutout) for side in size]
            centre = [np.floor(v * n) for v, n in zip(u[:2], counts, strict=True)]
            return [*centre, self.ratio_cutout]
        if name == "flip":
            return [u[0] < self.prob_flip]
        if name == "scale":
            smallest = 1 / self.ratio_scale
            return [v * (self.ratio_scale - smallest) + smallest for v in u[:2]]
        return [(2 * u[0] - 1) * self.ratio_rotate * (math.pi / 180)]

    def __call__(self, x: Tensor, draw: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Augment a batch with what `draw` returned; see `apply`."""
        return apply(x, draw, counts, self.align_corners)


def check_images(x: Tensor) -> None:
    """Raise unless x is a batch of floating point images."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"x: got {found}, expected images in a floating dtype (normalise them first)"
        )
    refuse_transforms(x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, channels, height, width)")


def apply(
    x: Tensor,
    draw: Tensor,
    counts: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Apply drawn operations to a batch of images.

    Fills are zeros, in normalised space the data set's mean colour. Color's means are each image's
    own. Differentiable in x to every order; `draw` is a constant.

    Args:
        x: (N, channels, height, width); float32, float64, bfloat16 or float16.
        draw: float64 (passes, rows, 4) from `DSA.draw`; rows: 1 for all images, or N, or see
            counts.
        counts: row i serves the next counts[i] images, the classes of a batch, say.
        align_corners: as in `DSA`.

    Returns:
        x's shape and dtype, contiguous; x itself if there are no passes.

    Raises:
        TypeError: x not a floating point tensor, draw not a tensor.
        ValueError: shapes, counts or rows that do not fit; a row that is not a valid operation.
    """
    check_images(x)
    if not isinstance(draw, Tensor):
        raise TypeError(
            f"draw: got {type(draw).__name__}, expected the tensor that DSA.draw returns"
        )
    if draw.dim() != 3 or draw.shape[2] != 4 or draw.dtype != torch.float64:
        raise ValueError(
            f"draw: got {draw.dtype} of shape {tuple(draw.shape)}, expected float64 "
            "(passes, rows, 4)"
        )
    if draw.device.type != "cpu":
        raise ValueError(f"draw: on {draw.device}, expected the CPU; parameters stay on the host")
    if draw.requires_grad:
        raise ValueError("draw: requires a gradient, but the parameters are not differentiated")
    if counts is not None:
        counts = list(counts)
        if len(counts) != draw.shape[1]:
            raise ValueError(f"counts: got {len(counts)}, expected {draw.shape[1]}, one per row")
        if any(not isinstance(c, int) or c < 0 for c in counts) or sum(counts) != x.shape[0]:
            raise ValueError(
                f"counts: got {counts}, expected integers >= 0 with sum {x.shape[0]}, the images"
            )
        if len(counts) > 1:
            draw = draw.repeat_interleave(torch.tensor(counts), 1, output_size=x.shape[0])
    elif draw.shape[1] not in (1, x.shape[0]):
        raise ValueError(
            f"draw: got {draw.shape[1]} rows, expected 1 or {x.shape[0]}, the number of images, "
            "or counts to say which row serves which"
        )
    for record in draw.unbind(0):
        x = augment(x, record, align_corners, True)
    return x
