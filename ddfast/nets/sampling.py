"""NCFM's sampling network: from noise to the frequencies of a characteristic function.

Wang S. et al., Dataset Distillation with Neural Characteristic Function, CVPR 2025, section 4: the
frequencies are a scale mixture of normals, with one component for 16 of them. Three linear layers
make of each component's noise z the standard deviations of its frequencies,

    t = exp(tanh(h(z))) * n,    n ~ N(0, I), 16 of them for one z ~ N(0, I)

so that they begin near 1, the default without a network, and stay between 1/e and e: a network that
is trained by ascent could otherwise run away. (The paper leaves the form open.) The weights are
plain tensors by name, as a checkpoint keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, linear

__all__ = ["released_frequencies", "sampled_frequencies", "sampling_weights"]

NOISE = 128
"""Numbers of noise, and units of the hidden layers."""

OF_A_COMPONENT = 16
"""Frequencies that share their standard deviations."""

RELEASED_ROWS = 4
"""Rows that the released network makes."""

SLOPE = 0.2
LAYERS = 3


def sampling_weights(
    width: int, random: torch.Generator, released: bool = False
) -> dict[str, Tensor]:
    """New weights, float32, uniform within one over the root of a layer's inputs.

    Args:
        width: numbers of a frequency.
        random: a CPU generator.
        released: of the shape of the released network: all layers as wide as a frequency.
    """
    inner = width if released else NOISE
    found = {}
    for layer in range(LAYERS):
        outputs = width if layer == LAYERS - 1 else inner
        for name, shape in (("weight", (outputs, inner)), ("bias", (outputs,))):
            drawn = torch.rand(shape, generator=random) * 2 - 1
            found[f"{layer}.{name}"] = drawn / math.sqrt(inner)
    return found


def sampled_frequencies(
    weights: Mapping[str, Tensor], count: int, random: torch.Generator
) -> Tensor:
    """Frequencies, (count, width), differentiable in the weights.

    Args:
        random: a CPU generator, for the noise and the normal values.
    """
    last = weights[f"{LAYERS - 1}.weight"]
    components = -(-count // OF_A_COMPONENT)
    x = torch.randn(components, NOISE, generator=random).to(last)
    normal = torch.randn(count, len(last), generator=random).to(last)
    for layer in range(LAYERS):
        x = linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        x = leaky_relu(x, SLOPE) if layer < LAYERS - 1 else x.tanh().exp()
    return x.repeat_interleave(OF_A_COMPONENT, 0)[:count] * normal


def released_frequencies(weights: Mapping[str, Tensor], random: torch.Generator) -> Tensor:
    """What the released network makes, (4, width), between -1 and 1.

    Linear layers with batch normalisation, at the end tanh and no normal factor. It repeats its
    four rows 16 times, which no mean over the frequencies can tell.
    """
    x = torch.randn(RELEASED_ROWS, len(weights["0.bias"]), generator=random).to(weights["0.bias"])
    for layer in range(LAYERS):
        x = linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        x = leaky_relu(x, SLOPE) if layer < LAYERS - 1 else x.tanh()
    return x
