"""Kernel ridge regression block by block: neither kernels nor their graphs of all targets at once.

The gradient needs no factorisation's derivative and, of the matrix K_ts, one block of rows at a
time. With A = K_ss + reg tr(K_ss)/n I, alpha = A^-1 Y_s and R = dL/dP, both of which a block's own
rows determine,

    dL/dK_ts = R alpha',    B = A^-1 sum over blocks of K_ts' R = dL/dY_s,
    dL/dK_ss = G + reg tr(G)/n I,  G = -(B alpha' + alpha B')/2,

so that each block of the kernel is computed and differentiated once and forgotten. What is solved
is float64's; kernels have the dtype of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ddfast.memory import images_at_once
from ddfast.reference import krr as reference

__all__ = [
    "Kernel",
    "Targets",
    "predictions",
    "regression_gradient",
    "rows_at_once",
    "solved_labels",
]

Targets = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Blocks of images and their labels, (m, C); called once for each pass over them."""


class Kernel(Protocol):
    """(n, ...), (m, ...) -> (n, m), differentiable; without the second, the first with itself."""

    def __call__(self, x: Tensor, y: Tensor | None = None, /) -> Tensor: ...


def regression_gradient(
    kernel: Kernel,
    support: Tensor,
    labels: Tensor,
    blocks: Iterable[tuple[Tensor, Tensor]],
    count: int,
    reg: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the prediction of targets, mean of (P - Y_t)^2 / 2 over all of them, and gradients.

    The slow equivalent is `ddfast.losses.krr_loss` of whole matrices with autograd.

    Args:
        support: (n, ...) images.
        labels: (n, C), of any floating dtype.
        blocks: images (m, ...) and labels (m, C), with no graph.
        count: rows of all blocks.
        reg: as in `krr_loss`.

    Returns:
        The loss, 0-d float64; its gradients by support, in its dtype, and by labels, in float64.
    """
    leaf = support.detach().requires_grad_()
    with torch.enable_grad():
        k_ss = kernel(leaf)
    factors = reference.factorise(reference.ridge(k_ss.detach().double(), reg))
    alpha = reference.solve(*factors, labels.detach().double())
    loss = alpha.new_zeros(())
    by_support, right = torch.zeros_like(leaf), torch.zeros_like(alpha)
    for images, targets in blocks:
        with torch.enable_grad():
            k_ts = kernel(images, leaf)
        rows = k_ts.detach().double()
        residual = rows @ alpha - targets.double()
        loss += residual.square().sum() / (2 * count * alpha.shape[1])
        residual /= count * alpha.shape[1]
        right += (residual.mT @ rows).mT
        by_support += torch.autograd.grad(k_ts, leaf, (residual @ alpha.mT).to(k_ts.dtype))[0]
    by_labels = reference.solve(*factors, right)
    by_k_ss = reference.by_ridge(by_labels, alpha, reg).to(k_ss.dtype)
    by_support += torch.autograd.grad(k_ss, leaf, by_k_ss)[0]
    return loss, by_support.detach(), by_labels


@torch.no_grad()
def predictions(
    kernel: Kernel, support: Tensor, labels: Tensor, blocks: Iterable[Tensor], reg: float
) -> Iterator[Tensor]:
    """What the regression predicts for each block of images: (m, C) float64."""
    factors = reference.factorise(reference.ridge(kernel(support).double(), reg))
    alpha = reference.solve(*factors, labels.double())
    for images in blocks:
        yield kernel(images, support).double() @ alpha


@torch.no_grad()
def solved_labels(kernel: Kernel, support: Tensor, targets: Targets, reg: float) -> Tensor:
    """`ddfast.losses.label_solve` of all targets, with one block of them at a time in memory.

    Args:
        targets: called once.

    Returns:
        (n, C) float64.
    """
    system = reference.ridge(kernel(support).double(), reg)
    factors = reference.factorise(system)
    kept, count = None, 0
    for images, labels in targets():
        rows = reference.solve(*factors, kernel(images, support).double().mT).mT
        rows = torch.cat([rows, labels.double()], 1)
        kept = reference.triangle(rows if kept is None else torch.cat([kept, rows]))
        count += len(images)
    if kept is None:
        raise ValueError("targets: no block of images, expected at least one")
    digits = max(count, len(support), reference.condition(system))
    return reference.least_squares(kept, len(support), digits)


def rows_at_once(support: Tensor, columns: int, memory: int) -> int:
    """Targets of a block, so that images and rows of the kernel with their graph fit the memory.

    Args:
        support: (n, ...) images, in the kernel's dtype.
        columns: of the labels.
        memory: bytes.

    Raises:
        ValueError: not even one fits.
    """
    n, size = len(support), support.element_size()
    image, row = 4 * support[0].numel() * size, n * (6 * size + 3 * 8) + 4 * 8 * columns
    return images_at_once(image + row, memory, 1.0)
