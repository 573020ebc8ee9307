"""Stand-in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax


@dataclass(frozen=True)
class Tangent:
    slope: Tensor
    by_images: Tensor
    by_parameters: Tensor | None
    by_labels: Tensor | None


class Student:
    def __init__(self, net: nn.Module, memory=None, path="auto", algorithm="auto"):
        self.net = net
        self.size = sum(p.numel() for p in net.parameters())

    def _loss(self, theta, x, y):
        shapes = [(n, p.shape) for n, p in self.net.named_parameters()]
        parts = theta.split([s.numel() for _, s in shapes])
        z = torch.func.functional_call(
            self.net, {n: p.view(s) for (n, s), p in zip(shapes, parts, strict=True)}, (x,)
        )
        if y.is_floating_point():
            return -(y * log_softmax(z, 1)).sum(1).mean()
        return cross_entropy(z, y)

    def gradient(self, theta, images, labels):
        with torch.enable_grad():
            t = theta.detach().requires_grad_()
            loss = self._loss(t, images.detach(), labels.detach())
            (g,) = torch.autograd.grad(loss, t)
        return loss.detach(), g

    def tangent(self, theta, images, labels, direction, by_parameters=True, by_labels=False):
        with torch.enable_grad():
            t = theta.detach().requires_grad_()
            x = images.detach().requires_grad_()
            y = labels.detach()
            if by_labels:
                y.requires_grad_()
            (g,) = torch.autograd.grad(self._loss(t, x, y), t, create_graph=True)
            s = g @ direction
            got = torch.autograd.grad(s, [x, t] + ([y] if by_labels else []))
        return Tangent(s.detach(), got[0], got[1], got[2] if by_labels else None)
