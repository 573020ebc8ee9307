"""FRePo's ConvNet, its initialisation, and what the engine makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddfast import nets
from ddfast.engine import class_gradients, features
from ddfast.nets.frepo import FRePoNet
from ddfast.nets.initialisation import LeCunConv2d

KINDS = {
    "c": nn.Conv2d,
    "r": nn.ReLU,
    "p": nn.AvgPool2d,
    "b": nn.BatchNorm2d,
    "g": nn.GroupNorm,
}


@pytest.mark.parametrize(
    ("name", "layers", "widths"),
    [
        ("FRePoNet", "crp bcrp bcrp", [128, 256, 512]),
        ("FRePoNetNN", "crp crp crp", [128, 256, 512]),
        ("FRePoNetD2W8IN", "crp gcrp", [8, 16]),
        ("FRePoNetW4D4", "crp bcrp bcrp bcrp", [4, 8, 16, 32]),
    ],
)
def test_blocks_widen_and_later_ones_begin_with_their_norm(name, layers, widths) -> None:
    net = nets.build(name, 3, 5, 32)
    kinds = [KINDS[letter] for letter in layers.replace(" ", "")]
    assert [type(layer) for layer in net.features.children()] == [
        LeCunConv2d if kind is nn.Conv2d else kind for kind in kinds
    ]
    convolutions = [layer for layer in net.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == widths
    side = 32 >> len(widths)
    assert net.embed(torch.zeros(2, 3, 32, 32)).shape == (2, widths[-1] * side * side)
    for layer in net.features:
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.momentum, layer.eps) == (0.9, 1e-5)


def test_grey_digits_are_padded() -> None:
    net = nets.build("FRePoNetW4", 1, 5, 28)
    assert net.features[0].padding == (3, 3) and net.features[4].padding == (1, 1)
    assert net.embed(torch.zeros(1, 1, 28, 28)).shape == (1, 16 * 4 * 4)


def test_weights_are_a_cut_normal_distribution() -> None:
    net = nets.build("FRePoNet", 3, 5, 32, torch.Generator().manual_seed(1))
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert (layer.bias == 0).all()
    weight = net.features[8].weight.double()
    scale = 1 / math.sqrt(weight[0].numel())
    assert weight.abs().max() < 2 * scale / 0.8796 and weight.abs().max() > 1.9 * scale / 0.8797
    assert weight.std().item() == pytest.approx(scale, rel=5e-3)
    assert abs(weight.mean()) < 0.01 * scale
    # Of a normal distribution within two deviations 71.5 % lie within one.
    share = (weight.abs() < scale / 0.87962566).double().mean().item()
    assert share == pytest.approx(0.6827 / 0.9545, abs=5e-3)


@pytest.mark.parametrize("changes", ["D6", "MP", "AL", "PC", "X"])
def test_names_that_cannot_be(changes) -> None:
    with pytest.raises(ValueError, match=r"maximum depth|always|cannot read 'X' in .* 'FRePoNetX'"):
        nets.build("FRePoNet" + changes, 3, 5, 32)


def warmed(name: str, size: int) -> FRePoNet:
    """In evaluation mode, with statistics and affine parameters of its own."""
    random = torch.Generator().manual_seed(3)
    net = nets.build(name, 3, 5, size, random).double()
    net.train()(torch.randn(9, 3, size, size, generator=random, dtype=torch.float64))
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2, generator=random)
                layer.bias.normal_(generator=random)
    return net.eval()


@pytest.mark.parametrize("name", ["FRePoNetD2W4", "FRePoNetW4", "FRePoNetD2W4NN"])
def test_features_on_the_fused_path(name) -> None:
    """Batch normalisation before a convolution is not part of it: its zeros stay zeros."""
    net = warmed(name, 16)
    random = torch.Generator().manual_seed(4)
    x = torch.randn(7, 3, 16, 16, generator=random, dtype=torch.float64)
    fused, general = (features(net, x, keep=True, path=path) for path in ("fused", "general"))
    torch.testing.assert_close(fused.features, general.features, rtol=1e-12, atol=1e-12)
    v = torch.randn(fused.features.shape, generator=random, dtype=torch.float64)
    torch.testing.assert_close(fused.backward(v), general.backward(v), rtol=1e-11, atol=1e-12)


def test_features_notice_new_statistics_and_other_modes() -> None:
    net = warmed("FRePoNetD2W4", 8)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    found = features(net, x, keep=True, path="fused")
    net.features[3].running_mean += 1
    with pytest.raises(RuntimeError, match="weights have changed"):
        found.backward(torch.ones_like(found.features))
    with pytest.raises(ValueError, match="'fused' cannot serve"):
        features(net.train(), x, path="fused")
    with pytest.raises(ValueError, match="'fused' cannot serve"):
        features(warmed("FRePoNetD2W4IN", 8), x, path="fused")


@pytest.mark.parametrize("name", ["FRePoNetD2W4", "FRePoNetD2W4NN"])
def test_weight_gradients_of_classes(name) -> None:
    net = warmed(name, 8)
    random = torch.Generator().manual_seed(4)
    x = torch.randn(6, 3, 8, 8, generator=random, dtype=torch.float64)
    labels = torch.arange(6) % 3
    found = class_gradients(net, x, labels, 3)
    for c in range(3):
        loss = nn.functional.cross_entropy(net(x[labels == c]), labels[labels == c])
        expected = torch.autograd.grad(loss, list(net.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[c], theirs, rtol=1e-10, atol=1e-12)


def test_wide_initialisation() -> None:
    net = nets.build("ConvNetW64", 3, 5, 16)
    nets.initialise_wide(net, torch.Generator().manual_seed(0), 3.0, 0.04)
    weight = net.features[4].weight
    assert weight.std().item() == pytest.approx(math.sqrt(3 / (64 * 9)), rel=0.02)
    biases = torch.cat([layer.bias for layer in net.modules() if isinstance(layer, nn.Conv2d)])
    assert biases.std().item() == pytest.approx(0.2, rel=0.15)
    assert (net.features[1].weight == 1).all() and (net.features[1].bias == 0).all()
    first = net.features[0].weight.clone()
    nets.initialise_wide(net, torch.Generator().manual_seed(0), 3.0, 0.04)
    assert torch.equal(first, net.features[0].weight)
    with pytest.raises(ValueError, match=r"weight_var: got -1\.0"):
        nets.initialise_wide(net, torch.Generator(), -1.0)
