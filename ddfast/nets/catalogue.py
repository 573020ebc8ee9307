"""From a name to a network."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ddfast.nets.classic import MLP, AlexNet, LeNet
from ddfast.nets.convnet import ConvNet
from ddfast.nets.frepo import FRePoNet
from ddfast.nets.initialisation import initialise
from ddfast.nets.naming import SUFFIXES, convnet_options, widening_options
from ddfast.nets.network import Network, Size
from ddfast.nets.resnet import ResNet18
from ddfast.nets.resnet_ap import ResNetAP
from ddfast.nets.vgg import VGG11

_Constructor = Callable[[int, int, Size], Network]

# Every name that is not a ConvNet's: what it is, and how to make it.
_OTHERS: dict[str, tuple[str, _Constructor]] = {
    "MLP": ("two hidden layers of 128", MLP),
    "LeNet": ("LeNet with ReLU and max pooling, from 16x16", LeNet),
    "AlexNet": ("AlexNet for small images, no normalisation, from 8x8", AlexNet),
    "AlexNetBN": ("AlexNet with batch normalisation", partial(AlexNet, batchnorm=True)),
    "VGG11": ("VGG11 with instance normalisation, from 32x32", VGG11),
    "VGG11BN": ("VGG11 with batch normalisation", partial(VGG11, norm="batchnorm")),
    "ResNet18": ("ResNet-18 with instance normalisation", ResNet18),
    "ResNet18BN": ("ResNet-18 with batch normalisation", partial(ResNet18, norm="batchnorm")),
    "ResNet18_AP": (
        "ResNet-18 with average pooling for strides, instance normalisation",
        partial(ResNet18, average=True),
    ),
    "ResNet18BN_AP": (
        "ResNet-18 with average pooling for strides, batch normalisation",
        partial(ResNet18, norm="batchnorm", average=True),
    ),
    "ResNetAP10": ("IDC's ResNet-10 with average pooling, instance normalisation", ResNetAP),
    "ResNetAP10BN": (
        "IDC's ResNet-10 with average pooling, batch normalisation",
        partial(ResNetAP, norm="batchnorm"),
    ),
    "ResNetAP18": (
        "IDC's ResNet-18 with average pooling, instance normalisation",
        partial(ResNetAP, depth=18),
    ),
}


def names() -> tuple[str, ...]:
    """Every name that ``build`` knows; ConvNet and FRePoNet stand for all their suffixes."""
    return ("ConvNet", "FRePoNet", *_OTHERS)


def architectures() -> dict[str, str]:
    """Every name that ``build`` knows, with one line about it."""
    convnet = (
        "3 blocks, width 128, instance normalisation, ReLU, average pooling; "
        f"suffixes in any order: {SUFFIXES}"
    )
    widening = (
        "FRePo's, 3 blocks of widths 128, 256 and 512, batch normalisation before the later ones; "
        "suffixes D<depth> W<width of the first> and the norms of ConvNet"
    )
    families = {"ConvNet": convnet, "FRePoNet": widening}
    return families | {name: line for name, (line, _) in _OTHERS.items()}


def build(
    name: str,
    channels: int,
    classes: int,
    size: int | Sequence[int],
    generator: torch.Generator | None = None,
) -> Network:
    """A network by its name in the literature, on the CPU, in training mode, with fresh weights.

    Args:
        name: one of :func:`names`, or a ConvNet with suffixes such as ``ConvNetD4W64BN``, see
            :func:`~ddfast.nets.naming.convnet_options`. The depth of a ConvNet is 3 unless its
            name says otherwise, whatever the size.
        channels: of the images.
        classes: number of logits.
        size: of the images in pixels, one number for squares or (H, W).
        generator: CPU generator for the weights, see
            :func:`~ddfast.nets.initialisation.initialise`; None stands for a new one with seed 0,
            so that every such network is the same.

    The global random state is neither read nor written. Parameter names, order and shapes are
    those of the official DC, DSA and DM code (ResNetAP: of IDC's), so that ``load_state_dict``
    takes its checkpoints.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name (the message lists the known ones and the nearest); images too
            small for the network; numbers below 1.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'ConvNet', got {type(name).__name__}")
    channels = _positive("channels", channels)
    classes = _positive("classes", classes)
    plane = _plane(size)
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
    constructor = _constructor(name)
    # PyTorch's constructors draw from the global generator, except on the meta device, which has
    # no numbers to draw. to_empty then allocates, and initialise fills parameters and buffers.
    with torch.device("meta"):
        net = constructor(channels, classes, plane)
    net.to_empty(device="cpu")
    initialise(net, generator)
    return net


def _constructor(name: str) -> _Constructor:
    if name in _OTHERS:
        return _OTHERS[name][1]
    if name.startswith("ConvNet"):
        return partial(ConvNet, **convnet_options(name)._asdict())
    if name.startswith("FRePoNet"):
        return partial(FRePoNet, **widening_options(name))
    by_lower_case = {known.lower(): known for known in names()}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown network {name!r}; did you mean {by_lower_case[near[0]]!r}? Known: "
        f"{', '.join(names())}, where ConvNet takes suffixes: {SUFFIXES}"
    )


def _positive(argument: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument} must be an integer, got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{argument} must be at least 1, got {number}")
    return number


def _plane(size: int | Sequence[int]) -> Size:
    if isinstance(size, (tuple, list, torch.Size)):
        if len(size) != 2:
            raise ValueError(f"size must be one integer or (H, W), got {tuple(size)}")
        return _positive("size", size[0]), _positive("size", size[1])
    side = _positive("size", size)  # type: ignore[arg-type]
    return side, side
