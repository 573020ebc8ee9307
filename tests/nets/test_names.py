"""Network names: what each means, and what is said about one that means nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddfast.nets import architectures, build, names
from ddfast.nets.convnet import ConvNet
from ddfast.nets.naming import ConvNetOptions, convnet_options
from ddfast.nets.resnet import ResNet18

TABLE = {
    "ConvNet": {},
    "ConvNetD1": {"depth": 1},
    "ConvNetD4": {"depth": 4},
    "ConvNetW32": {"width": 32},
    "ConvNetD12W256": {"depth": 12, "width": 256},
    "ConvNetD4W64": {"depth": 4, "width": 64},
    "ConvNetW64D4": {"depth": 4, "width": 64},
    "ConvNetIN": {"norm": "instancenorm"},
    "ConvNetBN": {"norm": "batchnorm"},
    "ConvNetLN": {"norm": "layernorm"},
    "ConvNetGN": {"norm": "groupnorm"},
    "ConvNetNN": {"norm": "none"},
    "ConvNetAR": {"activation": "relu"},
    "ConvNetAL": {"activation": "leakyrelu"},
    "ConvNetAS": {"activation": "sigmoid"},
    "ConvNetASwish": {"activation": "swish"},
    "ConvNetASwishBN": {"activation": "swish", "norm": "batchnorm"},
    "ConvNetBNASwish": {"activation": "swish", "norm": "batchnorm"},
    "ConvNetASW64": {"activation": "sigmoid", "width": 64},
    "ConvNetMP": {"pooling": "maxpooling"},
    "ConvNetAP": {"pooling": "avgpooling"},
    "ConvNetNP": {"pooling": "none"},
    "ConvNetNNNP": {"norm": "none", "pooling": "none"},
    "ConvNetALNN": {"activation": "leakyrelu", "norm": "none"},
    "ConvNetW1024NNPC": {"width": 1024, "norm": "none", "prepended": True},
    "ConvNetD3W32INARAP": {"depth": 3, "width": 32},
    "ConvNetMPASGNW16D2": {
        "depth": 2,
        "width": 16,
        "norm": "groupnorm",
        "activation": "sigmoid",
        "pooling": "maxpooling",
    },
}


@pytest.mark.parametrize("name", TABLE)
def test_convnet_names(name: str) -> None:
    expected = {
        "depth": 3,
        "width": 128,
        "norm": "instancenorm",
        "activation": "relu",
        "prepended": False,
        "pooling": "avgpooling",
    } | TABLE[name]
    assert convnet_options(name)._asdict() == expected


@given(
    st.permutations(range(5)),
    st.integers(1, 99),
    st.integers(1, 999),
    st.sampled_from(["IN", "BN", "LN", "GN", "NN"]),
    st.sampled_from(["AR", "AL", "AS", "ASwish"]),
    st.sampled_from(["AP", "MP", "NP"]),
)
def test_the_order_of_suffixes_does_not_matter(
    order: list[int], depth: int, width: int, norm: str, activation: str, pooling: str
) -> None:
    suffixes = [f"D{depth}", f"W{width}", norm, activation, pooling]
    options = convnet_options("ConvNet" + "".join(suffixes[place] for place in order))
    assert options == convnet_options("ConvNet" + "".join(suffixes))
    assert (options.depth, options.width) == (depth, width)
    assert options.norm == convnet_options(f"ConvNet{norm}").norm
    assert options.activation == convnet_options(f"ConvNet{activation}").activation
    assert options.pooling == convnet_options(f"ConvNet{pooling}").pooling


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ConvNetBNIN", "gives the norm twice: 'batchnorm', then 'instancenorm'"),
        ("ConvNetD3D3", "gives the depth twice: 3, then 3"),
        ("ConvNetW32BNW64", "gives the width twice: 32, then 64"),
        ("ConvNetMPNP", "gives the pooling twice"),
        ("ConvNetASwishAR", "gives the activation twice"),
        ("ConvNetD0", "cannot read 'D0' in the network name 'ConvNetD0'"),
        ("ConvNetW", "cannot read 'W' in"),
        ("ConvNetBNX", "cannot read 'X' in"),
        ("ConvNet-3", "cannot read '-3' in"),
        ("ConvNetbn", "cannot read 'bn' in .* ASwish"),
        ("ResNet18BNAP", "did you mean 'ResNet18BN_AP'. Known: ConvNet, FRePoNet, MLP, LeNet"),
        ("resnet18", "did you mean 'ResNet18'"),
        ("Convnet", "did you mean 'ConvNet'"),
        ("LeNet5", "did you mean 'LeNet'.* ResNetAP18, where ConvNet takes suffixes: D<depth>"),
        ("", "unknown network ''"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 3, 10, 32)


def test_every_listed_name_builds_and_is_described() -> None:
    assert list(architectures()) == list(names())
    assert all(len(line) > 10 and "\n" not in line for line in architectures().values())
    sizes = set()
    for name in names():
        net = build(name, 1, 2, 32)
        sizes.add((name, type(net).__name__, sum(p.numel() for p in net.parameters())))
        assert net(torch.ones(2, 1, 32, 32)).shape == (2, 2)
    assert len(sizes) == len(names()) == 15


def test_depth_does_not_follow_the_size() -> None:
    for size, side in ((32, 4), (64, 8), (96, 12)):
        assert build("ConvNetW8", 3, 5, size).classifier.in_features == 8 * side * side


@pytest.mark.parametrize(
    ("name", "channels", "size", "message"),
    [
        ("ConvNetD4", 1, 8, "depth 4 is too deep for images of 8x8: .* the maximum depth is 3"),
        ("ConvNetD6", 3, 32, "the maximum depth is 5"),
        ("ConvNetD6", 1, 28, "the maximum depth is 5"),
        ("ConvNetD5", 3, 28, "the maximum depth is 4"),
        ("ConvNetD3", 3, (64, 7), "images of 64x7: .* the maximum depth is 2"),
        ("ConvNetD1MP", 3, 1, "the maximum depth is 0"),
        ("ConvNetNP", 3, 1, "1x1 plane is constant"),
        ("ConvNetW6GN", 3, 32, "width must be a multiple of 4, got 6"),
        ("LeNet", 1, 15, "LeNet .* 15x15: each side must be at least 16"),
        ("AlexNet", 1, (8, 7), "AlexNet .* 8x7: each side must be at least 8"),
        ("VGG11", 3, 28, r"at least 32 pixels \(or 28x28 with one channel\)"),
        ("VGG11BN", 1, (28, 27), "VGG11 .* 28x27"),
        ("ResNet18", 1, 1, "at least 2"),
        ("ResNetAP10", 3, (64, 1), "ResNetAP .* 64x1: .* at least 2"),
    ],
)
def test_images_too_small(
    name: str, channels: int, size: int | tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, channels, 10, size)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("ConvNetD3", 1, 8),
        ("ConvNetD5", 1, 28),
        ("ConvNetD4", 3, 28),
        ("ConvNetD5", 3, 32),
        ("ConvNetD9NPW4", 3, 2),
        ("LeNet", 3, 16),
        ("AlexNet", 3, 8),
        ("VGG11", 1, 28),
        ("ResNet18", 3, 2),
        ("ResNet18_AP", 3, 2),
        ("ResNetAP10", 3, 2),
    ],
)
def test_images_just_large_enough(name: str, channels: int, size: int) -> None:
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    logits = build(name, channels, 3, size)(images)
    # Not constant: the two images are told apart.
    assert (logits[0] - logits[1]).abs().min() > 1e-6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 3, 10, 32), TypeError, "name must be a string"),
        (("ConvNet", 0, 10, 32), ValueError, "channels must be at least 1, got 0"),
        (("ConvNet", 3.0, 10, 32), TypeError, "channels must be an integer, got float"),
        (("ConvNet", 3, -1, 32), ValueError, "classes must be at least 1, got -1"),
        (("ConvNet", 3, 10, 0), ValueError, "size must be at least 1, got 0"),
        (("ConvNet", 3, 10, (32, 0)), ValueError, "size must be at least 1, got 0"),
        (("ConvNet", 3, 10, (3, 32, 32)), ValueError, r"size must be one integer or \(H, W\)"),
        (("ConvNet", 3, 10, "32"), TypeError, "size must be an integer, got str"),
        (("ConvNet", 3, 10, 32, 7), TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(*arguments)


def test_settings_given_to_a_class_are_checked() -> None:
    with torch.device("meta"):  # no numbers are drawn
        for setting in ("norm", "activation", "pooling"):
            with pytest.raises(ValueError, match=f"{setting} must be .* got 'nonsense'"):
                ConvNet(1, 2, (8, 8), **{setting: "nonsense"})
        with pytest.raises(ValueError, match="norm must be 'instancenorm' or 'batchnorm'"):
            ResNet18(1, 2, (8, 8), norm="groupnorm")


def test_suffix_words_never_run_together() -> None:
    words = {
        "depth": {"D2": 2, "D13": 13},
        "width": {"W8": 8, "W128": 128},
        "norm": {
            "IN": "instancenorm",
            "BN": "batchnorm",
            "LN": "layernorm",
            "GN": "groupnorm",
            "NN": "none",
        },
        "activation": {"AR": "relu", "AL": "leakyrelu", "AS": "sigmoid", "ASwish": "swish"},
        "pooling": {"AP": "avgpooling", "MP": "maxpooling", "NP": "none"},
        "prepended": {"PC": True},
    }
    for one, other in itertools.permutations(words, 2):
        for (first, a), (second, b) in itertools.product(words[one].items(), words[other].items()):
            expected = ConvNetOptions()._replace(**{one: a, other: b})
            assert convnet_options(f"ConvNet{first}{second}") == expected
