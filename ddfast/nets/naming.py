"""The names of ConvNets: what ``ConvNetD4W64BN`` means."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class ConvNetOptions(NamedTuple):
    """What a ConvNet name says. The defaults are those of DC, DSA and DM."""

    depth: int = 3
    width: int = 128
    norm: str = "instancenorm"
    activation: str = "relu"
    pooling: str = "avgpooling"
    prepended: bool = False


_WORDS: dict[str, tuple[str, str | bool]] = {
    "IN": ("norm", "instancenorm"),
    "BN": ("norm", "batchnorm"),
    "LN": ("norm", "layernorm"),
    "GN": ("norm", "groupnorm"),
    "NN": ("norm", "none"),
    "AR": ("activation", "relu"),
    "AL": ("activation", "leakyrelu"),
    "AS": ("activation", "sigmoid"),
    "ASwish": ("activation", "swish"),
    "MP": ("pooling", "maxpooling"),
    "AP": ("pooling", "avgpooling"),
    "NP": ("pooling", "none"),
    "PC": ("prepended", True),
}
# ASwish before AS: the alternatives are tried in this order.
_SUFFIX = re.compile(
    r"([DW])([1-9][0-9]*)|(ASwish|" + "|".join(w for w in _WORDS if len(w) == 2) + ")"
)

SUFFIXES = (
    "D<depth> W<width>, "
    "norm IN (instance) BN (batch) LN (layer) GN (4 groups) NN (none), "
    "activation AR (relu) AL (leaky relu) AS (sigmoid) ASwish, "
    "pooling AP (average) MP (max) NP (none), "
    "PC (one more convolution in front)"
)


def widening_options(name: str) -> dict[str, Any]:
    """Read a FRePoNet name: the suffixes of depth, width and norm; batch normalisation if none.

    >>> widening_options("FRePoNetD2W32")
    {'depth': 2, 'width': 32, 'norm': 'batchnorm'}

    Raises:
        ValueError: as `convnet_options`; another activation or pooling.
    """
    options = convnet_options(name, "FRePoNet", norm="batchnorm")
    defaults = ConvNetOptions()
    if options[3:] != defaults[3:]:
        raise ValueError(
            f"the network name {name!r} has an activation, a pooling or PC, and FRePoNet has ReLU "
            "and average pooling always"
        )
    return {"depth": options.depth, "width": options.width, "norm": options.norm}


def convnet_options(
    name: str, prefix: str = "ConvNet", norm: str = "instancenorm"
) -> ConvNetOptions:
    """Read a ConvNet name: ``ConvNet`` and any suffixes, in any order, each setting at most once.

    >>> convnet_options("ConvNetD4BN")
    ConvNetOptions(depth=4, width=128, norm='batchnorm', activation='relu', pooling='avgpooling', \
prepended=False)

    The depth is 3 unless the name says otherwise, whatever the image size (the field writes
    ``ConvNetD4`` for 64x64 images and ``ConvNetD5`` for 128x128). ``ConvNetW1024NNPC`` is the
    finite network of KIP. `norm` is that of names that give none, `prefix` what they start with.

    Raises:
        ValueError: the name does not start with ``ConvNet``, a suffix is not known, or two
            suffixes contradict or repeat each other.
    """
    if not name.startswith(prefix):
        raise ValueError(f"the name of a {prefix} starts with {prefix!r}, got {name!r}")
    chosen: dict[str, Any] = {}
    at = len(prefix)
    while at < len(name):
        match = _SUFFIX.match(name, at)
        if match is None:
            raise ValueError(
                f"cannot read {name[at:]!r} in the network name {name!r}; suffixes are {SUFFIXES}"
            )
        letter, number, word = match.groups()
        setting: str
        value: int | str | bool
        if word is None:
            setting, value = ("depth" if letter == "D" else "width"), int(number)
        else:
            setting, value = _WORDS[word]
        if setting in chosen:
            raise ValueError(
                f"the network name {name!r} gives the {setting} twice: "
                f"{chosen[setting]!r}, then {value!r}"
            )
        chosen[setting] = value
        at = match.end()
    return ConvNetOptions(norm=norm)._replace(**chosen)
