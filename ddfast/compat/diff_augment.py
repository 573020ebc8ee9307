"""`DiffAugment` of the official scripts: their parameters and their random numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from ddfast.augment import apply, check_images, offset_count, parse_strategy, shift_limit
from ddfast.reference.augment import OPERATIONS

__all__ = ["ParamDiffAug", "diff_augment"]


class ParamDiffAug:
    """The parameters of `DiffAugment` under their official names; set what you want changed."""

    def __init__(self) -> None:
        self.aug_mode = "S"
        self.prob_flip = 0.5
        self.ratio_scale = 1.2
        self.ratio_rotate = 15.0
        self.ratio_crop_pad = 0.125
        self.ratio_cutout = 0.5
        self.brightness = 1.0
        self.saturation = 2.0
        self.contrast = 0.5
        # Left behind by DiffAugment, as in the official code.
        self.Siamese = False
        self.latestseed = -1


def diff_augment(
    x: Tensor,
    strategy: str,
    seed: int,
    param: ParamDiffAug | None,
    generator: torch.Generator | None,
    align_corners: bool,
) -> Tensor:
    """`ddfast.compat.dc.DiffAugment`, and with `align_corners` that of MTT: see there."""
    names = parse_strategy(strategy)
    seed = operator.index(seed)
    if seed < -1:
        raise ValueError(f"seed: got {seed}, expected an integer >= 0, or -1")
    if seed != -1 and generator is not None:
        raise ValueError(f"generator: given together with seed {seed}; pass one of the two")
    param = ParamDiffAug() if param is None else param
    if param.aug_mode not in ("S", "M"):
        raise ValueError(f"param.aug_mode: got {param.aug_mode!r}, expected 'S' or 'M'")
    if not names:
        return x
    check_images(x)  # before a number is drawn
    param.Siamese, param.latestseed = seed != -1, seed
    private: dict[torch.device, torch.Generator] = {}

    def next_generator(device: torch.device) -> torch.Generator | None:
        if not param.Siamese:
            return generator
        if device not in private:
            private[device] = torch.Generator(device)
        param.latestseed += 1
        return private[device].manual_seed(param.latestseed - 1)

    if param.aug_mode == "S":
        source = next_generator(torch.device("cpu"))
        device = "cpu" if source is None else source.device
        chosen = torch.randint(0, len(names), (1,), generator=source, device=device)
        names = (names[int(chosen)],)
    rows = [_draw(name, x, param, next_generator) for name in names]
    draw = torch.tensor(rows, dtype=torch.float64)
    draw = draw.view(len(names), 1 if param.Siamese else x.shape[0], 4)
    return apply(x, draw, align_corners=align_corners)


def _draw(
    name: str,
    x: Tensor,
    param: ParamDiffAug,
    next_generator: Callable[[torch.device], torch.Generator | None],
) -> list[list[float]]:
    """Rows of a record: one operation with the numbers that the official code would draw for x."""
    images, _, height, width = x.shape
    cpu = torch.device("cpu")
    drawn = images
    if param.Siamese:
        # The first number of a draw counts. On the CPU it does not depend on how many follow;
        # elsewhere nobody promises that.
        drawn = 1 if x.device == cpu else max(1, images)

    def uniform(dtype: torch.dtype, device: torch.device) -> Tensor:
        source = next_generator(device)
        device = device if source is None else source.device
        return torch.rand(drawn, dtype=dtype, device=device, generator=source)

    def integers(low: int, high: int) -> Tensor:
        source = next_generator(x.device)
        device = x.device if source is None else source.device
        return torch.randint(low, high, (drawn,), device=device, generator=source)

    # Parameters are computed in the official code's dtypes, so that they are equal to the last bit.
    values: list[Tensor]
    constants = [0.0, 0.0, 0.0]
    if name == "color":
        values = [
            (uniform(x.dtype, x.device) - 0.5) * param.brightness,
            uniform(x.dtype, x.device) * param.saturation,
            uniform(x.dtype, x.device) + param.contrast,
        ]
    elif name == "crop":
        limits = [shift_limit(side, param.ratio_crop_pad) for side in (height, width)]
        values = [integers(-limit, limit + 1) for limit in limits]
    elif name == "cutout":
        counts = [offset_count(side, param.ratio_cutout) for side in (height, width)]
        values = [integers(0, count) for count in counts]
        constants[2] = param.ratio_cutout
    elif name == "flip":
        # Drawn on x's device but in the default dtype, whatever x's is.
        values = [uniform(torch.float32, x.device) < param.prob_flip]
    elif name == "scale":
        smallest = 1.0 / param.ratio_scale
        spread = param.ratio_scale - smallest
        values = [uniform(torch.float32, cpu) * spread + smallest for _ in range(2)]
    else:
        values = [(uniform(torch.float32, cpu) - 0.5) * 2 * param.ratio_rotate / 180 * math.pi]
    columns = [value.tolist() for value in values]
    operation, rest = OPERATIONS.index(name), constants[len(columns) :]
    rows = [[operation, *row, *rest] for row in zip(*columns, strict=True)]
    return rows[:1] if param.Siamese else rows
