"""Learn images, soft labels and a learning rate by what a student trained on them is worth.

    python examples/student_loss.py

`ddfast.unroll.unroll` trains a student for some steps on the synthetic set and gives the exact
gradient of any loss of its parameters, at the memory of one step. The loss here is one that no
method of ddfast has: smoothed cross-entropy on real images, with a price on the learning rate.
"""

from __future__ import annotations

import argparse

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.data import load
from ddfast.unroll import unroll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="of the student")
    options = parser.parse_args()

    dataset, generator = load("digits"), torch.Generator().manual_seed(0)
    net = nets.build("ConvNetD2W32", dataset.channels, dataset.num_classes, dataset.size)
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    sizes = [shape.numel() for shape in shapes]

    images = torch.randn(10, 1, 8, 8, generator=generator, requires_grad=True)
    logits = (3 * torch.eye(10)).requires_grad_()  # one soft label for each image
    log_lr = torch.tensor(0.05).log().requires_grad_()
    optimiser = torch.optim.Adam([images, logits, log_lr], lr=0.05)
    for iteration in range(options.iterations):
        nets.initialise(net, generator)  # a student with other weights each time
        start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        rows = torch.randint(len(dataset.train_labels), (256,), generator=generator)
        x = dataset.normalised(dataset.train_images[rows])
        y, lr = dataset.train_labels[rows], log_lr.exp()

        def loss_of(student: torch.Tensor, x=x, y=y, lr=lr) -> torch.Tensor:
            parts = [p.view(s) for p, s in zip(student.split(sizes), shapes, strict=True)]
            predicted = functional_call(net, dict(zip(names, parts, strict=True)), (x,))
            return cross_entropy(predicted, y, label_smoothing=0.1) + 0.1 * lr

        batches = [torch.arange(10)] * options.steps
        loss = unroll(net, start, images, logits, lr, batches, loss_of, soft="logits")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if iteration % 10 == 0 or iteration + 1 == options.iterations:
            print(f"iteration {iteration}: loss {loss.item():.4f}, learning rate {lr.item():.4f}")


if __name__ == "__main__":
    main()
