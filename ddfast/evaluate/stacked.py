"""Several small networks of one architecture as one: stacked weights, grouped convolutions.

A network on images of 8x8 pixels keeps no core busy: most of a training step goes into calling
operations. K networks side by side cost one call where they cost K, and two operations that are
slow on small planes (a convolution with a single input channel, average pooling) can be written as
matrix products. `torch.func.vmap` of the network leads to the same grouped convolutions, but was
never the fastest here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast.layers import norm_relu_pool
from ddfast.nets.classic import MLP, AlexNet
from ddfast.nets.convnet import ConvNet, after_convolution
from ddfast.nets.frepo import FRePoNet
from ddfast.nets.fusion import can_fuse

__all__ = ["can_stack", "stacked_logits"]

# Up to this many pixels a 2x2 average is faster as a product with a matrix (64 x 16 for 8x8), by a
# factor of 5 to 7; beyond, the products grow with the square of the plane.
POOLED_BY_PRODUCT = 256

# A first convolution of up to this many weights a channel is faster as a product of matrices: three
# times for one channel of 3x3.
FEW_INPUTS = 27


def _layers(net: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers of a network that is a plain chain, named as in its state dict; else None."""
    chain: list[tuple[str, nn.Module]]
    if isinstance(net, MLP):
        chain = [("", nn.Flatten())]
        for name in ("fc_1", "fc_2", "fc_3"):
            chain += [(name, getattr(net, name)), ("", nn.ReLU())]
        return chain[:-1]
    if isinstance(net, (ConvNet, FRePoNet, AlexNet)):
        chain = [(f"features.{name}", layer) for name, layer in net.features.named_children()]
        last = "fc" if isinstance(net, AlexNet) else "classifier"
        return [*chain, ("", nn.Flatten()), (last, getattr(net, last))]
    return None


def _knows(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.stride == layer.dilation == (1, 1)
        return plain and layer.bias is not None and layer.padding_mode == "zeros"
    if isinstance(layer, nn.AvgPool2d):
        return layer.kernel_size == layer.stride == 2
    return isinstance(
        layer,
        (
            *(nn.Linear, nn.GroupNorm, nn.Flatten, nn.MaxPool2d),
            *(nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU),
        ),
    )


def can_stack(net: nn.Module) -> bool:
    """Whether `stacked_logits` knows this network.

    It knows ConvNet, FRePoNet, MLP and AlexNet without batch and layer normalisation.
    """
    layers = _layers(net)
    return layers is not None and all(_knows(layer) for _, layer in layers)


def stacked_logits(net: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The logits of K networks, each on images of its own.

    Equal, up to rounding, to `torch.func.functional_call(net, (parameters of k,), images[k])` for
    every k. Differentiable in the parameters; gradients do not reach the images.

    Args:
        net: any one of the networks; says what the layers are.
        parameters: by name, `(K, *shape)`.
        images: `(K, N, channels, H, W)`.

    Returns:
        `(K, N, classes)`.

    Raises:
        ValueError: a network that `can_stack` does not know.
    """
    layers = _layers(net)
    if layers is None:
        raise ValueError(f"cannot stack networks of type {type(net).__name__}")
    networks, count = images.shape[:2]
    # Channels of all networks side by side, (N, K * channels, H, W), as grouped operations want it.
    x = images.detach().transpose(0, 1).flatten(1, 2)
    place = 0
    while place < len(layers):
        name, layer = layers[place]
        place += 1
        if isinstance(layer, nn.Flatten):
            x = x.reshape(count, networks, -1).transpose(0, 1)
        elif isinstance(layer, nn.AvgPool2d):
            x = _average_pool(x)
        elif isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
            weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
            x = _weighted(layer, weight, bias, x, place == 1)
            if isinstance(layer, nn.Conv2d) and can_fuse(x, layer, x.numel()):
                x, used = _fused(layers[place:], parameters, x)
                place += used
        elif isinstance(layer, nn.ReLU):
            x = F.relu_(x)  # nobody else needs what comes before it
        else:
            x = layer(x)
    return x


def _fused(
    layers: Sequence[tuple[str, nn.Module]], parameters: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, int]:
    """Norm, activation and pooling behind a convolution as one operator; how many layers it did."""
    norm, activation, pool, used = after_convolution([layer for _, layer in layers])
    if activation is None or (pool != "none" and not _pools_by_two(layers[used - 1][1])):
        return x, 0
    if norm is None:
        return norm_relu_pool(x, activation=activation, pool=pool), used
    name = layers[0][0]
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    groups = len(weight) * norm.num_groups
    affine = weight.flatten(), bias.flatten()
    return norm_relu_pool(x, *affine, groups, norm.eps, activation, pool), used


def _pools_by_two(layer: nn.Module) -> bool:
    return getattr(layer, "kernel_size", 0) == getattr(layer, "stride", 0) == 2


def _weighted(
    layer: nn.Linear | nn.Conv2d | nn.GroupNorm,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    first: bool,
) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
    networks = len(weight)
    if isinstance(layer, nn.GroupNorm):
        groups = networks * layer.num_groups
        return F.group_norm(x, groups, weight.flatten(), bias.flatten(), layer.eps)
    if first and weight[0, 0].numel() <= FEW_INPUTS and x.device.type == "cpu":
        return _first_convolution(layer, weight, bias, x)
    return F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=layer.padding, groups=networks)


def _first_convolution(layer: nn.Conv2d, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A convolution of few inputs that need no gradient, as a product of matrices."""
    networks, outputs = weight.shape[:2]
    tall, wide = weight.shape[-2:]
    down, right = (int(side) for side in layer.padding)
    windows = F.pad(x, (right, right, down, down)).unfold(2, tall, 1).unfold(3, wide, 1)
    count, _, height, width = windows.shape[:4]  # (N, K * channels, H, W, tall, wide)
    inputs = windows.permute(0, 1, 4, 5, 2, 3).reshape(count * networks, -1, height * width)
    weights = weight.flatten(2).expand(count, -1, -1, -1).flatten(0, 1)
    biases = bias.unsqueeze(-1).expand(count, -1, -1, -1).flatten(0, 1)
    out = torch.baddbmm(biases, weights, inputs)
    return out.view(count, networks * outputs, height, width)


def _average_pool(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if height % 2 or width % 2 or height * width > POOLED_BY_PRODUCT or x.device.type != "cpu":
        return F.avg_pool2d(x, 2)
    pooled = x.flatten(2) @ _pooling_matrix(height, width, x.dtype)
    return pooled.unflatten(2, (height // 2, width // 2))


@functools.lru_cache(maxsize=32)
def _pooling_matrix(height: int, width: int, dtype: torch.dtype) -> Tensor:
    """`(H * W, H * W / 4)`: a quarter where a pixel belongs to a 2x2 cell."""
    rows, columns = (
        torch.eye(side // 2, dtype=dtype).repeat_interleave(2, 0) for side in (height, width)
    )
    return torch.kron(rows, columns) / 4
