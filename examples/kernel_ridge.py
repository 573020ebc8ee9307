"""Kernel ridge regression with the kernel of an infinitely wide network, and a set learned for it.

    python examples/kernel_ridge.py

`kernel_matrix` gives the neural tangent kernel, `krr_predict` the regression; both can be
differentiated, so that ten images can be learned from which the regression predicts all others
(this is KIP; `ddfast distill kip` does it in blocks that fit the memory).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ddfast.data import load, random_selection
from ddfast.kernel_matrix import kernel_matrix
from ddfast.losses import krr_loss, krr_predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--depth", type=int, default=3, help="ReLU layers of the network")
    options = parser.parse_args()

    dataset, generator = load("digits"), torch.Generator().manual_seed(0)
    x_train, x_test = (dataset.normalised(x) for x in (dataset.train_images, dataset.test_images))
    targets = torch.eye(10)[dataset.train_labels] - 0.1  # centred
    pixels, classes = random_selection(dataset, 1, generator)
    support, labels = dataset.normalised(pixels), torch.eye(10)[classes] - 0.1

    def kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
        return kernel_matrix(x, y, kind="ntk", net="fc", depth=options.depth)

    def accuracy(support: Tensor) -> float:
        predicted = krr_predict(kernel(support), kernel(x_test, support), labels)
        return 100 * (predicted.argmax(1) == dataset.test_labels).double().mean().item()

    print(f"ten random images: {accuracy(support):.1f} % of the test images")
    support.requires_grad_()
    optimiser = torch.optim.Adam([support], lr=0.05)
    for _ in range(options.iterations):
        rows = torch.randint(len(x_train), (256,), generator=generator)
        loss = krr_loss(kernel(support), kernel(x_train[rows], support), labels, targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"ten learned images: {accuracy(support.detach()):.1f} % of the test images")


if __name__ == "__main__":
    main()
