"""The functions of the official DC, DSA and DM scripts, under their names and signatures.

Replace `from utils import match_loss, DiffAugment, ParamDiffAug` by
`from ddfast.compat.dc import match_loss, DiffAugment, ParamDiffAug`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast import losses
from ddfast.augment import apply, check_images, offset_count, parse_strategy, shift_limit
from ddfast.reference.augment import OPERATIONS

__all__ = ["DiffAugment", "ParamDiffAug", "match_loss"]

#: Names of the official `--dis_metric` and of ours.
DISTANCES = {"ours": "row_cosine", "mse": "mse", "cos": "cosine"}


def match_loss(gw_syn: Sequence[Tensor], gw_real: Sequence[Tensor], args: Any) -> Tensor:
    """Distance between the network gradients of synthetic and real images.

    Args:
        gw_syn, gw_real: gradients in parameter shape, floating point.
        args: anything with `dis_metric`, "ours", "mse" or "cos"; its `device` is not needed.

    Returns:
        Scalar on the gradients' device, differentiable twice; float32 unless the gradients are
        float64.

    Raises:
        ValueError: unknown `dis_metric` (the official script exits), or shapes that differ.
        TypeError: not floating-point tensors.
    """
    if args.dis_metric not in DISTANCES:
        raise ValueError(
            f"args.dis_metric: got {args.dis_metric!r}, expected one of {', '.join(DISTANCES)}"
        )
    return losses.gradient_distance(
        list(gw_syn), list(gw_real), DISTANCES[args.dis_metric], eps=1e-6
    )


# --- augmentation -----------------------------------------------------------------------------


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


def DiffAugment(
    x: Tensor,
    strategy: str = "",
    seed: int = -1,
    param: ParamDiffAug | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The official augmentation: same signature, parameters and random numbers.

    With a seed, all images get the same operation and parameters (siamese), equal to those of the
    official code: draw k comes from a generator seeded with seed + k. Ours is a private generator,
    so the global state, which the official code reseeds each time, is not touched. A batch of one
    image works.

    With seed -1, the operation is drawn once and the parameters for each image, as the official
    code does: from torch's global generators (the CPU's, and that of x's device). This is the only
    function of ddfast that uses the global state; a `generator` replaces it.

    Args:
        x: (N, channels, height, width), floating point.
        strategy: operations joined by underscores; "", "none" or "None" returns x itself.
        seed: an integer >= 0, or -1.
        param: a `ParamDiffAug`; None: its defaults. As in the official code, its `Siamese` and
            `latestseed` are set.
        generator: only with seed -1.

    Returns:
        A contiguous tensor of x's shape and dtype; differentiable in x to every order.

    Raises:
        TypeError, ValueError: as `ddfast.augment.apply`; unknown operation or mode; negative seed.
    """
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
    return apply(x, draw.view(len(names), 1 if param.Siamese else x.shape[0], 4))


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
