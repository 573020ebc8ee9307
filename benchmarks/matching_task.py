"""The work that the benchmarks of matching time and peak_memory.py weighs, and the eager way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddfast import engine, losses, nets
from ddfast.augment import DSA
from ddfast.benchmarks.bench_gradient_distance import eager as distance_of_class

STRATEGY = "color_crop_cutout_flip_scale_rotate"

SIZES = {  # image side, network, real images per class
    "full": (32, "ConvNet", 256),
    "s16": (16, "ConvNetW64", 64),
    "s8": (8, "ConvNetW64", 64),
    "64x64": (64, "ConvNetD4", 256),
}


class Task:
    """Images, a network twice (ddfast's, and plain torch modules with its weights), gradients."""

    def __init__(self, size: str, classes: int, ipc: int, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(0)
        side, name, self.batch = SIZES[size]
        self.classes, self.ipc, self.size = classes, ipc, (side, side)
        self.net = nets.build(name, 3, classes, side, random).to(device)
        layers = [*self.net.features.children(), nn.Flatten(), self.net.classifier]
        self.plain = nn.Sequential(*layers)
        self.names = engine.weight_names(self.net)
        self.real = torch.randn(self.batch, 3, side, side, generator=random).to(device)
        shape = (classes * ipc, 3, side, side)
        self.syn = torch.randn(shape, generator=random).to(device).requires_grad_()
        self.real_labels = torch.arange(classes, device=device).repeat_interleave(self.batch)
        self.labels = torch.arange(classes, device=device).repeat_interleave(ipc)
        self.device = device

    def reals(self) -> list[Tensor]:
        """Each class's real images: the same, shifted, so that little memory holds many classes."""
        return [self.real.roll(c, 3) for c in range(self.classes)]

    @functools.cached_property
    def targets(self) -> list[Tensor]:
        """Real gradients of every class, (classes, *shape)."""
        x = torch.cat(self.reals())
        counts = [self.batch] * self.classes
        return engine.segment_gradients(self.net, x, self.real_labels, counts, self.names)

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Losses and image gradient in float64, by autograd."""
        wide = [g.double() for g in self.targets]
        return engine.match_gradients(
            *(self.net.double(), self.syn.detach().double(), self.labels),
            *([self.ipc] * self.classes, wide, self.names),
            path="general",
        )

    # --- the official scripts' way --------------------------------------------------------------

    def eager_real(self, x: Tensor, c: int) -> list[Tensor]:
        labels = torch.full((len(x),), c, device=self.device)
        loss = cross_entropy(self.plain(x), labels)
        grads = torch.autograd.grad(loss, list(self.plain.parameters()))
        return [g.detach().clone() for g in grads]

    def eager_syn(self, s: Tensor, c: int, real: list[Tensor]) -> Tensor:
        labels = torch.full((len(s),), c, device=self.device)
        loss = cross_entropy(self.plain(s), labels)
        grads = torch.autograd.grad(loss, list(self.plain.parameters()), create_graph=True)
        return distance_of_class(list(grads), real)

    def eager_backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        self.syn.grad = None
        loss.backward()  # reaches the weights too, as the official scripts do
        for p in self.plain.parameters():
            p.grad = None
        assert self.syn.grad is not None
        return loss.detach(), self.syn.grad

    def of_class(self, c: int) -> Tensor:
        return self.syn[c * self.ipc : (c + 1) * self.ipc]


def class_loop(task: Task, targets: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """A user's own loop over classes with the drop-in loss, gradients to the images only."""
    parameters = [p for p in task.plain.parameters() if p.dim() > 1]
    by_images, total = [], torch.zeros((), device=task.device)
    for c, target in enumerate(targets):
        s = task.of_class(c).detach().requires_grad_()
        labels = torch.full((len(s),), c, device=task.device)
        loss = cross_entropy(task.plain(s), labels)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        value = losses.gradient_distance(grads, [t for t in target if t.dim() > 1])
        by_images.append(torch.autograd.grad(value, s)[0])
        total = total + value.detach()
    return total, torch.cat(by_images)


def operation_of(c: int) -> str:
    """The augmentation of class c: every operation in turn."""
    return STRATEGY.split("_")[c % 6]


def draws_of(classes: int, size: tuple[int, int]) -> Tensor:
    """A draw for each class of its operation, (1, classes, 4)."""
    draws = []
    for c in range(classes):
        draw = DSA(operation_of(c)).draw(torch.Generator().manual_seed(c), size)
        draw[..., 0] = DSA(STRATEGY).operations.index(operation_of(c))
        draws.append(draw)
    return torch.cat(draws, 1)


def judged(result: object, exact: object) -> float:
    """Error of a loss, and of an image gradient the median over images; 1 where it fails."""
    (loss, gradient), (wanted, by_images) = result, exact  # type: ignore[misc]
    worst = float((loss.double().sum() - wanted.sum()).abs() / wanted.sum().abs())
    error = (gradient.double() - by_images).flatten(1).norm(dim=1)
    error = error / by_images.flatten(1).norm(dim=1)
    if float((error > 0.05).double().mean()) > 0.2:
        return 1.0
    return max(worst, float(error.median()))
