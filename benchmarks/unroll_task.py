"""The student that bench_unroll.py times and weighs, and the two eager ways of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.unroll import unroll

Result = tuple[str, list[Tensor]]
"""Which gradient it is, "exact" or "frozen"; loss, gradients of images and learning rate."""


@dataclass
class Student:
    """A ConvNet, synthetic images of all classes, all of them in every step, a target nearby."""

    net: nn.Module
    plain: nn.Sequential
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    batches: list[Tensor]
    lr: float = 0.01

    @staticmethod
    def made(
        width: int,
        steps: int,
        images: int = 100,
        device: str = "cpu",
        *,
        classes: int = 10,
        image: tuple[int, int, int] = (3, 32, 32),
        depth: int = 3,
    ) -> Student:
        random = torch.Generator().manual_seed(0)
        channels, *size = image
        net = nets.build(f"ConvNetD{depth}W{width}", channels, classes, size, random).to(device)
        # The same modules one after another, for what does not know ddfast's operators.
        plain = nn.Sequential(*net.features.children(), nn.Flatten(), net.classifier)
        start = nn.utils.parameters_to_vector(net.parameters()).detach()
        moved = torch.randn(start.shape, generator=random).to(device)
        x = torch.randn(images, *image, generator=random).to(device)
        labels = torch.arange(images, device=device) % classes
        rows = torch.arange(images, device=device)
        return Student(net, plain, start, start + 0.01 * moved, x, labels, [rows] * steps)

    def double(self) -> Student:
        return Student(
            self.net,
            self.plain,
            self.start.double(),
            self.target.double(),
            self.images.double(),
            self.labels,
            self.batches,
        )

    def loss_of(self, theta: Tensor) -> Tensor:
        return (theta - self.target).square().sum() / (self.start - self.target).square().sum()

    def plain_loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of plain torch modules with flat parameters."""
        shapes = [(name, p.shape) for name, p in self.plain.named_parameters()]
        parts = theta.split([shape.numel() for _, shape in shapes])
        weights = {name: part.view(s) for (name, s), part in zip(shapes, parts, strict=True)}
        return cross_entropy(torch.func.functional_call(self.plain, weights, (x,)), y)


def full_graph(student: Student) -> Result:
    """MTT's way: the graphs of all steps, one backward pass."""
    images = student.images.clone().requires_grad_()
    lr = torch.tensor(student.lr, device=images.device, requires_grad=True)
    theta = student.start.clone().requires_grad_()
    for rows in student.batches:
        loss = student.plain_loss(theta, images[rows], student.labels[rows])
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * g
    loss = student.loss_of(theta)
    return "exact", [loss.detach(), *torch.autograd.grad(loss, [images, lr])]


def two_passes(student: Student) -> Result:
    """TESLA's way: steps without a graph, then one double backward each, theta_i constant."""
    leaf = student.images.clone().requires_grad_()
    theta, total, history = student.start, torch.zeros_like(student.start), []
    for rows in student.batches:
        history.append(theta.detach().requires_grad_())
        loss = student.plain_loss(history[-1], student.images[rows], student.labels[rows])
        (g,) = torch.autograd.grad(loss, history[-1])
        total += g
        theta = theta - student.lr * g
    end = theta.clone().requires_grad_()
    loss = student.loss_of(end)
    (v,) = torch.autograd.grad(loss, end)
    by_images = torch.zeros_like(leaf)
    for rows, theta in zip(student.batches, history, strict=True):
        inner = student.plain_loss(theta, leaf[rows], student.labels[rows])
        (g,) = torch.autograd.grad(inner, theta, create_graph=True)
        by_images -= student.lr * torch.autograd.grad(g, leaf, v)[0]
    return "frozen", [loss.detach(), by_images, -torch.dot(v, total)]


def ddfast(student: Student, adjoint: str) -> Result:
    images = student.images.clone().requires_grad_()
    lr = torch.tensor(student.lr, dtype=images.dtype, device=images.device, requires_grad=True)
    loss = unroll(
        *(student.net, student.start, images, student.labels, lr, student.batches),
        *(student.loss_of, adjoint),
    )
    kind = "frozen" if adjoint == "frozen" else "exact"
    return kind, [loss.detach(), *torch.autograd.grad(loss, [images, lr])]


PROVIDERS: dict[str, Callable[[Student], Result]] = {
    "eager": full_graph,
    "eager, TESLA": two_passes,
    "ddfast": lambda student: ddfast(student, "exact"),
    "ddfast frozen": lambda student: ddfast(student, "frozen"),
    "ddfast graph": lambda student: ddfast(student, "graph"),
}
