"""Names, shapes and outputs against the official DC networks.

The literals come from the official ``networks.py`` (VICO-UoE/DatasetCondensation, 53f63a6), each
network filled with the same formula (``fill``) and run on the same images (``checksum``).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddfast.nets import build

CONVNET = [
    ("features.0.weight", (128, 3, 3, 3)),
    ("features.0.bias", (128,)),
    ("features.1.weight", (128,)),
    ("features.1.bias", (128,)),
    ("features.4.weight", (128, 128, 3, 3)),
    ("features.4.bias", (128,)),
    ("features.5.weight", (128,)),
    ("features.5.bias", (128,)),
    ("features.8.weight", (128, 128, 3, 3)),
    ("features.8.bias", (128,)),
    ("features.9.weight", (128,)),
    ("features.9.bias", (128,)),
    ("classifier.weight", (10, 2048)),
    ("classifier.bias", (10,)),
]

# The layers with parameters, in the order of the checkpoint.
LAYERS = {
    "MLP": "fc_1 fc_2 fc_3",
    "LeNet": "features.0 features.3 fc_1 fc_2 fc_3",
    "AlexNet": "features.0 features.3 features.6 features.8 features.10 fc",
    "AlexNetBN": "features.0 features.1 features.4 features.5 features.8 features.9 features.11 "
    "features.12 features.14 features.15 fc",
    "VGG11": "features.0 features.1 features.4 features.5 features.8 features.9 features.11 "
    "features.12 features.15 features.16 features.18 features.19 features.22 features.23 "
    "features.25 features.26 classifier",
    "ConvNetNP": "features.0 features.1 features.3 features.4 features.6 features.7 classifier",
    "ConvNetNN": "features.0 features.3 features.6 classifier",
    "ConvNetBN": "features.0 features.1 features.4 features.5 features.8 features.9 classifier",
}
BLOCK = "conv1 bn1 conv2 bn2"
PLAIN = ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")


def resnet_layers(shortcut_norm: int) -> list[str]:
    layers = ["conv1", "bn1"]
    for block in (f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)):
        layers += [f"{block}.{layer}" for layer in BLOCK.split()]
        if block not in PLAIN:
            layers += [f"{block}.shortcut.0", f"{block}.shortcut.{shortcut_norm}"]
    return [*layers, "classifier"]


# name: parameters for 3x32x32, checksum; parameters for 1x28x28, checksum
OFFICIAL = {
    "ConvNet": ((320_010, -1.95200679427), (317_706, 1.68610426441)),
    "ConvNetD4": ((452_490, 0.566719933022), (450_186, 1.83727141408)),
    "ConvNetW32": ((24_714, 1.49051309273), (24_138, 1.33293338418)),
    "ConvNetBN": ((320_010, -0.0416262871994), (317_706, 1.18710141181)),
    "ConvNetLN": ((663_306, 1.89997111354), (661_002, 1.89971594015)),
    "ConvNetGN": ((320_010, 0.465311938808), (317_706, 1.26714258162)),
    "ConvNetNN": ((319_242, 1.11447311865), (316_938, 1.64811167325)),
    "ConvNetAS": ((320_010, 1.00907507053), (317_706, 1.58680788075)),
    "ConvNetAL": ((320_010, -1.96013058633), (317_706, 1.67984151363)),
    "ConvNetASwish": ((320_010, -1.33241718893), (317_706, 1.88461714762)),
    "ConvNetMP": ((320_010, -1.8499037008), (317_706, -3.00034575135)),
    "ConvNetNP": ((1_610_250, 0.206750346604), (1_607_946, 1.94385940758)),
    "ConvNetD2W32GNASMP": ((30_762, 1.68052407552), (30_186, 1.48525981757)),
    "MLP": ((411_146, -1.8419876731), (118_282, 0.669392604799)),
    "LeNet": ((62_006, 3.37713230063), (61_706, 3.54540665202)),
    "AlexNet": ((1_872_202, 0.999585110129), (1_865_802, 0.73800142647)),
    "AlexNetBN": ((1_874_122, -7.29116046352), (1_867_722, -8.23578095146)),
    "VGG11": ((9_231_114, -11.8799924447), (9_229_962, -11.9274584043)),
    "VGG11BN": ((9_231_114, 0.276035133419), (9_229_962, -19.3604055731)),
    "ResNet18": ((11_173_962, -8.07870794449), (11_172_810, -7.94809145523)),
    "ResNet18BN": ((11_173_962, -161.196487532), (11_172_810, -141.395482939)),
    "ResNet18_AP": ((11_250_762, 1.62620276482), (11_213_770, 2.18543954529)),
    "ResNet18BN_AP": ((11_250_762, 4.50939295141), (11_213_770, 12.3985785007)),
}


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
    net.double()
    fill(net)
    count = 2 * channels * side * side
    images = torch.sin(torch.arange(count, dtype=torch.float64) ** 1.3)
    images = images.view(2, channels, side, side)
    weight = torch.cos(torch.arange(20, dtype=torch.float64)).view(2, 10)
    with torch.no_grad():
        train = (net.train()(images) * weight).sum()
        evaluation = (net.eval()(images) * weight).sum()
    return float(train + 2 * evaluation)


def test_convnet_has_the_official_tensors() -> None:
    net = build("ConvNet", 3, 10, 32)
    assert [(name, tuple(p.shape)) for name, p in net.named_parameters()] == CONVNET
    assert list(net.state_dict()) == [name for name, _ in CONVNET]
    assert len(CONVNET) == 14
    assert sum(p.numel() for p in net.parameters()) == 320_010


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_official_names_and_order(name: str) -> None:
    expected = [f"{layer}.{kind}" for layer in LAYERS[name].split() for kind in ("weight", "bias")]
    assert [key for key, _ in build(name, 3, 10, 32).named_parameters()] == expected


@pytest.mark.parametrize(("name", "shortcut_norm"), [("ResNet18BN", 1), ("ResNet18BN_AP", 2)])
def test_resnet_layers_have_the_official_names_and_order(name: str, shortcut_norm: int) -> None:
    expected = []
    for layer in resnet_layers(shortcut_norm):
        last = layer.rsplit(".", 1)[-1]
        norm = last.startswith("bn") or last == str(shortcut_norm)
        expected.append(f"{layer}.weight")
        if norm or last == "classifier":
            expected.append(f"{layer}.bias")
        if norm:
            expected += [f"{layer}.{key}" for key in ("running_mean", "running_var")]
            expected.append(f"{layer}.num_batches_tracked")
    assert list(build(name, 3, 10, 32).state_dict()) == expected


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)])
def test_parameters_and_outputs_are_the_official_ones(name: str, channels: int, side: int) -> None:
    colour, grey = OFFICIAL[name]
    count, expected = colour if channels == 3 else grey
    net = build(name, channels, 10, side)
    assert sum(p.numel() for p in net.parameters()) == count
    assert checksum(net, channels, side) == pytest.approx(expected, rel=1e-8)
