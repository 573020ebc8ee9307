"""ddfast's losses in a training loop of your own: only the line with the loss is ddfast's.

    python examples/drop_in_losses.py --loss gradient    # as in DC: weight gradients
    python examples/drop_in_losses.py --loss mmd         # as in M3D: distributions of features

The loop, the optimiser and the network are plain torch. One synthetic image of each of
scikit-learn's digits is learned; each iteration has a fresh network and real images.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ddfast.data import ClassSampler, load
from ddfast.losses import gradient_distance, mmd


def network(generator: torch.Generator) -> nn.Sequential:
    """Any module will do."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.normal_(0, (2 / p[0].numel()) ** 0.5, generator=generator)
    return net


def by_gradients(net: nn.Sequential, real: Tensor, syn: Tensor) -> Tensor:
    """DC's loss. All classes' gradients would go in one call with `batched=True`."""
    parameters, total = list(net.parameters()), torch.zeros(())
    for c in range(10):
        found = []
        for images in (syn[c], real[c]):
            loss = nn.functional.cross_entropy(net(images), torch.full((len(images),), c))
            found.append(torch.autograd.grad(loss, parameters, create_graph=images.requires_grad))
        total = total + gradient_distance(found[0], found[1], metric="row_cosine")
    return total


def by_features(net: nn.Sequential, real: Tensor, syn: Tensor) -> Tensor:
    """M3D's loss with a Gaussian kernel; no matrix of pairs is stored, all classes in one call."""
    embed = net[:-1]
    with torch.no_grad():
        target = embed(real.flatten(0, 1)).unflatten(0, real.shape[:2])
    return mmd(embed(syn.flatten(0, 1)).unflatten(0, syn.shape[:2]), target, "gaussian").sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=["gradient", "mmd"], default="gradient")
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args()
    loss_of = {"gradient": by_gradients, "mmd": by_features}[options.loss]

    dataset, generator = load("digits"), torch.Generator().manual_seed(0)
    sampler = ClassSampler(dataset.train_labels, dataset.num_classes)
    syn = torch.randn(10, 1, 1, 8, 8, generator=generator, requires_grad=True)  # classes, ipc, ...
    optimiser = torch.optim.SGD(
        [syn], lr={"gradient": 0.1, "mmd": 10.0}[options.loss], momentum=0.5
    )
    for iteration in range(options.iterations):
        indices, _ = sampler.sample_all(64, generator)
        real = dataset.normalised(dataset.train_images[indices]).unflatten(0, (10, 64))
        loss = loss_of(network(generator), real, syn)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if iteration % 10 == 0 or iteration + 1 == options.iterations:
            print(f"iteration {iteration}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
