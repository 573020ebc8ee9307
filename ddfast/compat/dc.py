"""The functions of the official DC, DSA and DM scripts, under their names and signatures.

Replace `from utils import match_loss, DiffAugment, ParamDiffAug` by
`from ddfast.compat.dc import match_loss, DiffAugment, ParamDiffAug`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ddfast import losses

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
