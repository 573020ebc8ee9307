"""The largest learning rate at which gradient descent on squares is stable, by the tangent kernel.

Gradient descent on half the mean of (f - y)^2 over n images and C classes follows the kernel
Theta = J J^T of the network's Jacobian J, and diverges where the learning rate passes
2 n C / lambda_max(Theta) (Lee et al., NeurIPS 2019). KIP's protocol takes that rate, estimated as
Lee et al. (Finite Versus Infinite Neural Networks, NeurIPS 2020) do: on 50 images, with the mean of
the kernel over classes, which is that of the sum of the outputs over sqrt(C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.evaluate.side_by_side import SideBySide
from ddfast.random import generator

__all__ = ["largest_rates"]

IMAGES = 50
BLOCK_BYTES = 1 << 28


def largest_rates(weights: SideBySide, dataset: Dataset, seed: int) -> Tensor:
    """Of each network, at every one of its weights: laid out as `weights.flat`.

    Args:
        weights: the networks, before their training.
        dataset: 50 of its training images, or all if there are fewer, drawn for the seed. (The
            published notebook takes 50 of those that it holds back.)

    Raises:
        ValueError: a network whose outputs do not depend on its weights.
    """
    random = generator(seed, "evaluate: images of the tangent kernel")
    chosen = torch.randperm(len(dataset.train_labels), generator=random)[:IMAGES]
    images = dataset.normalised(
        dataset.train_images[chosen].to(weights.flat.device), weights.flat.dtype
    )
    largest = torch.linalg.eigvalsh(tangent_kernels(weights, images))[:, -1]
    if not (largest > 0).all():
        raise ValueError("of_largest: a network's outputs do not depend on its weights")
    rates = 2 * len(images) * dataset.num_classes / largest
    return weights.spread(rates.to(weights.flat))


def tangent_kernels(weights: SideBySide, images: Tensor) -> Tensor:
    """(K, n, n) float64: of each network, the mean over classes of its empirical tangent kernel.

    Gradients are held of as many images as take 256 MiB, and computed again for every such block.
    """
    networks, count = len(weights.leaves[0]), len(images)
    at_once = max(1, BLOCK_BYTES // (weights.flat.numel() * weights.flat.element_size()))
    blocks = torch.arange(count).split(at_once)

    def jacobian(block: Tensor) -> Tensor:
        return torch.stack([_gradient(weights, images[i : i + 1]) for i in block.tolist()], 1)

    kernels = torch.empty(networks, count, count, dtype=torch.float64, device=images.device)
    for number, rows in enumerate(blocks):
        of_rows = jacobian(rows)
        for columns in blocks[: number + 1]:
            of_columns = of_rows if columns is rows else jacobian(columns)
            kernel = (of_rows @ of_columns.mT).double()
            kernels[:, rows[:, None], columns] = kernel
            kernels[:, columns[:, None], rows] = kernel.mT
    return kernels


def _gradient(weights: SideBySide, image: Tensor) -> Tensor:
    """(K, P): of the sum of each network's outputs over sqrt(C)."""
    logits = weights.logits(image.expand(len(weights.leaves[0]), *image.shape))
    return weights.by_network(weights.gradient(logits.sum((1, 2)) / math.sqrt(logits.shape[2])))
