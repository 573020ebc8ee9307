"""ResNetAP against IDC's network, and its own rule for fresh weights.

The literals come from the official ``models/resnet_ap.py`` (snu-mllab/Efficient-Dataset-
Condensation, ceac95a), filled with one formula and run on the same images.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddfast.nets import build, initialise
from ddfast.nets.initialisation import FanOutConv2d
from ddfast.nets.resnet_ap import ResNetAP

BLOCK = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]
SHORTCUT = ["downsample.0.weight", "downsample.2.weight", "downsample.2.bias"]

# name, channels, side: parameters, weighted sum of logits. Sides 32, 72 and 132 have another stem.
OFFICIAL = {
    ("ResNetAP10", 3, 32): (4_903_242, 1.97198394399),
    ("ResNetAP10", 1, 28): (4_902_090, 2.53615575678),
    ("ResNetAP10BN", 3, 32): (4_903_242, -29.6138237285),
    ("ResNetAP18", 1, 16): (11_172_810, -6.7541721613),
    ("ResNetAP10", 3, 72): (4_903_242, 0.89279321837),
    ("ResNetAP10", 3, 132): (4_910_922, 1.38305557441),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(net: nn.Module) -> None:
    """Give every parameter a value that depends on its number and its position only."""
    for number, parameter in enumerate(net.parameters()):
        wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + number)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data.copy_(wave.view_as(parameter) * math.sqrt(6 / fan_in) * 0.9)
        if parameter.dim() == 1:
            parameter.data.add_(0.5)


def checksum(net: nn.Module, channels: int, side: int) -> float:
    """A weighted sum of the logits of two images, in training and then in evaluation mode."""
    fill(net.double())
    count = 2 * channels * side * side
    images = torch.sin(torch.arange(count, dtype=torch.float64) ** 1.3)
    images = images.view(2, channels, side, side)
    weight = torch.cos(torch.arange(20, dtype=torch.float64)).view(2, 10)
    with torch.no_grad():
        train = (net.train()(images) * weight).sum()
        return float(train + 2 * (net.eval()(images) * weight).sum())


@pytest.mark.parametrize(("name", "channels", "side"), OFFICIAL)
def test_parameters_and_outputs_are_the_official_ones(name: str, channels: int, side: int) -> None:
    count, expected = OFFICIAL[name, channels, side]
    net = build(name, channels, 10, side)
    assert sum(p.numel() for p in net.parameters()) == count
    assert checksum(net, channels, side) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("name", "blocks"), [("ResNetAP10", 1), ("ResNetAP18", 2)])
def test_names_and_order_are_the_official_ones(name: str, blocks: int) -> None:
    expected = ["layer0.conv1.weight", "layer0.bn1.weight", "layer0.bn1.bias"]
    for stage in (1, 2, 3, 4):
        for number in range(blocks):
            keys = BLOCK + (SHORTCUT if stage > 1 and number == 0 else [])
            expected += [f"layer{stage}.{number}.{key}" for key in keys]
    net = build(name, 3, 10, 32)
    assert [key for key, _ in net.named_parameters()] == [*expected, "fc.weight", "fc.bias"]


def test_depth_34_and_others() -> None:
    with torch.device("meta"):
        net = ResNetAP(3, 10, (224, 224), depth=34)
        assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 1 + 2 * 16 + 3
        assert net.layer0.conv1.kernel_size == (7, 7)
        with pytest.raises(ValueError, match="depth must be one of 10, 18, 34, got 50"):
            ResNetAP(3, 10, (32, 32), depth=50)
        with pytest.raises(ValueError, match=r"norm must be .* got 'layernorm'"):
            ResNetAP(3, 10, (32, 32), norm="layernorm")


@pytest.mark.parametrize("size", [(8, 8), (2, 15), (40, 64)])
def test_small_and_oblong_images_are_still_told_apart(size: tuple[int, int]) -> None:
    images = torch.randn(6, 1, *size, generator=generator())
    features = build("ResNetAP10", 1, 4, size).embed(images)
    assert features.shape == (6, 512)
    assert features.std(0).mean() > 0.02  # 0 if the last planes were single pixels


def test_fresh_weights_follow_the_fan_out() -> None:
    net = build("ResNetAP10", 3, 10, 144, generator(5))
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 12 and all(isinstance(m, FanOutConv2d) for m in convolutions)
    for module in convolutions:
        assert module.bias is None
        deviation = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
        x = module.weight.detach().double() / deviation
        n = x.numel()
        assert x.mean().abs() < 6 / math.sqrt(n)
        assert (x.square().mean() - 1).abs() < 6 * math.sqrt(2 / n)
        assert ((x.abs() < 1).double().mean() - 0.6827).abs() < 6 * math.sqrt(0.22 / n)
    assert (net.layer0.bn1.weight == 1).all() and (net.layer0.bn1.bias == 0).all()
    assert net.fc.weight.abs().max() <= 1 / math.sqrt(512)


def test_the_generator_alone_decides_in_any_memory_format() -> None:
    first = build("ResNetAP10", 3, 10, 32, generator(1))
    expected = {key: value.clone() for key, value in first.state_dict().items()}
    other = build("ResNetAP10", 3, 10, 32, generator(2)).to(memory_format=torch.channels_last)
    key = "layer1.0.conv1.weight"
    assert (other.state_dict()[key] != expected[key]).float().mean() > 0.99
    initialise(other, generator(1))
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
