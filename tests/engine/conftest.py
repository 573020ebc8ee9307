"""What the engine's tests share: small ConvNets of every kind, and the literal per-class loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ddfast.nets import initialise
from ddfast.nets.convnet import ConvNet
from ddfast.reference import gradient_distance as reference


def make(
    norm: str = "instancenorm",
    activation: str = "relu",
    pooling: str = "avgpooling",
    size: tuple[int, int] = (8, 8),
    depth: int = 2,
    width: int = 8,
    channels: int = 3,
    classes: int = 10,
    dtype: torch.dtype = torch.float64,
) -> ConvNet:
    """A ConvNet with affine parameters that are not 1 and 0."""
    with torch.device("meta"):  # torch would draw weights from the global generator
        net = ConvNet(channels, classes, size, depth, width, norm, activation, pooling)
    net = net.to_empty(device="cpu")
    random = torch.Generator().manual_seed(7)
    initialise(net, random)
    net = net.to(dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith("features") and p.dim() == 1:
                p += 0.3 * torch.randn(p.shape, generator=random, dtype=dtype)
    return net


def batch(counts: list[int], shape: tuple[int, ...] = (3, 8, 8), dtype=torch.float64, seed=1):
    """Images (sum of counts, *shape), and labels, each segment's its own class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.randn(len(labels), *shape, generator=random, dtype=dtype)
    return images, labels


def class_loop(
    net: nn.Module, images: Tensor, labels: Tensor, counts: list[int], names: tuple[str, ...]
) -> list[Tensor]:
    """Weight gradients, one class at a time, as the official scripts compute them."""
    wanted = [dict(net.named_parameters())[name] for name in names]
    rows = []
    for x, y in zip(images.split(counts), labels.split(counts), strict=True):
        loss = cross_entropy(net(x), y) if len(x) else 0 * sum(p.sum() for p in wanted)
        rows.append(torch.autograd.grad(loss, wanted))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def double_backward(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    counts: list[int],
    real: list[Tensor],
    names: tuple[str, ...],
    metric: str = "row_cosine",
) -> tuple[Tensor, Tensor]:
    """Losses of the classes and the gradient of their sum, by autograd with `create_graph`."""
    wanted = [dict(net.named_parameters())[name] for name in names]
    leaf = images.clone().requires_grad_()
    losses = []
    for c, (x, y) in enumerate(zip(leaf.split(counts), labels.split(counts), strict=True)):
        if len(x):
            grads = torch.autograd.grad(cross_entropy(net(x), y), wanted, create_graph=True)
        else:
            grads = [torch.zeros_like(p) for p in wanted]
        target = [g[c] for g in real]
        losses.append(reference.gradient_distance(grads, target, metric, 1e-6, False)[0])
    stacked = torch.stack(losses)
    return stacked.detach(), torch.autograd.grad(stacked.sum(), leaf)[0]


def real_gradients(net: nn.Module, names: tuple[str, ...], segments: int, seed=2) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    parameters = dict(net.named_parameters())
    shapes = [(segments, *parameters[name].shape) for name in names]
    dtype = next(net.parameters()).dtype
    return [torch.randn(shape, generator=random, dtype=dtype) / 100 for shape in shapes]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.fixture
def engine_tools():
    """The functions above, for tests that pytest imports without their folder on the path."""
    import types

    return types.SimpleNamespace(
        make=make,
        batch=batch,
        class_loop=class_loop,
        double_backward=double_backward,
        real_gradients=real_gradients,
        relative=relative,
    )
