"""The matching losses of the official IDC script, under their names and signatures.

Replace the definitions in `condense.py` by
`from ddfast.compat.idc import add_loss, dist, matchloss, remove_aug`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddfast import losses

__all__ = ["add_loss", "dist", "matchloss", "remove_aug"]

#: Names of the official `--metric` and of ours.
METRICS = {"mse": "mse", "l1": "l1", "l1_mean": "l1", "cos": "row_cosine"}


def dist(x: Tensor, y: Tensor, method: str = "mse") -> Tensor:
    """Distance of two tensors of one shape.

    Args:
        x, y: (rows, ...), floating point.
        method: "mse", squares summed; "l1", absolute values summed; "l1_mean", their mean over each
            row, summed; "cos", 1 - cosine of each row, summed.

    Returns:
        0-d, differentiable twice in both; float64 if either is, else float32.

    Raises:
        TypeError, ValueError: an unknown method (the official function fails), and as
            `ddfast.losses.gradient_distance`.
    """
    if method not in METRICS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METRICS)}")
    if method == "cos":  # a row of one number has a cosine here, which row_cosine leaves out
        x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
    found = losses.gradient_distance([x], [y], METRICS[method], eps=1e-6)
    return found / (x.numel() / x.shape[0]) if method == "l1_mean" else found


def add_loss(loss_sum: Tensor | None, loss: Tensor) -> Tensor:
    """A sum that has not begun yet, or that goes on.

    Args:
        loss_sum: 0-d, floating point, or None.
        loss: 0-d, floating point.

    Returns:
        0-d.
    """
    return loss if loss_sum is None else loss_sum + loss


def matchloss(
    args: Any,
    img_real: Tensor,
    img_syn: Tensor,
    lab_real: Tensor,
    lab_syn: Tensor,
    model: Any,
) -> Tensor | None:
    """Distance of the gradients, or features, of real and synthetic images of a class.

    Args:
        args: with `match`, "grad" or "feat", and `metric`, see `dist`. For "grad" with `bias` and
            `fc`: whether tensors of one dimension, and of two, count. For "feat" with `idx_from`
            and `idx_to`, for the model's `get_feature(images, idx_from, idx_to)`, whose features
            are compared in their means.
        img_real, img_syn: (n, channels, H, W) and (m, channels, H, W), floating point.
        lab_real, lab_syn: (n,) and (m,), int64.
        model: a classifier, a module.

    Returns:
        0-d, with a graph to `img_syn`; None if no tensor counts.

    Raises:
        ValueError: unknown `args.match` or `args.metric`.
    """
    loss: Tensor | None = None
    if args.match == "feat":
        with torch.no_grad():
            targets = model.get_feature(img_real, args.idx_from, args.idx_to)
        for target, found in zip(
            targets, model.get_feature(img_syn, args.idx_from, args.idx_to), strict=True
        ):
            loss = add_loss(loss, dist(target.mean(0), found.mean(0), args.metric))
        return loss
    if args.match != "grad":
        raise ValueError(f"args.match: got {args.match!r}, expected 'grad' or 'feat'")
    parameters = [
        p for p in model.parameters() if (p.dim() != 1 or args.bias) and (p.dim() != 2 or args.fc)
    ]
    if not parameters:
        return None
    criterion = nn.CrossEntropyLoss()
    real = torch.autograd.grad(criterion(model(img_real), lab_real), parameters)
    syn = torch.autograd.grad(criterion(model(img_syn), lab_syn), parameters, create_graph=True)
    if args.metric in ("mse", "l1"):  # sums over all tensors in one pass
        return losses.gradient_distance(syn, real, METRICS[args.metric])
    for s, r in zip(syn, real, strict=True):
        loss = add_loss(loss, dist(s, r, args.metric))
    return loss


def remove_aug(augtype: str, remove_aug: str) -> str:
    """The names of a strategy but some.

    Args:
        augtype: joined by underscores, such as "color_crop_cutout".
        remove_aug: those to leave out, likewise.
    """
    removed = remove_aug.split("_")
    return "_".join(name for name in augtype.split("_") if name not in removed)
