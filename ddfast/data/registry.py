"""Data sets by name."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any

from ddfast.data.cifar import cifar10, cifar100
from ddfast.data.dataset import Dataset
from ddfast.data.digits import digits
from ddfast.data.generated import generated
from ddfast.data.hugging_face import hugging_face
from ddfast.data.image_folder import image_folder, tiny_imagenet
from ddfast.data.mnist import fashion_mnist, mnist
from ddfast.data.svhn import svhn

__all__ = ["canonical_name", "load", "names"]

READERS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "generated": generated,
    "MNIST": mnist,
    "FashionMNIST": fashion_mnist,
    "SVHN": svhn,
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "TinyImageNet": tiny_imagenet,
    "ImageFolder": image_folder,
    "hf": hugging_face,
}

# Beside these, case, dashes, underscores and blanks do not matter.
ALIASES = {"fashion": "FashionMNIST", "tiny": "TinyImageNet", "huggingface": "hf"}


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "-_ ")


def names() -> tuple[str, ...]:
    """The canonical names :func:`load` knows."""
    return tuple(READERS)


def canonical_name(name: str) -> str:
    """``"cifar-10"``, ``"Tiny"``, ``"fashion"`` ... as ``"CIFAR10"``, ``"TinyImageNet"`` ...

    Args:
        name: case, dashes and underscores do not matter.

    Raises:
        TypeError: not a string.
        ValueError: an unknown name; the message lists the known ones and the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a data set must be a string, got {name!r}")
    known = {_plain(each): each for each in READERS} | ALIASES
    plain = _plain(name)
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    hint = f" (did you mean {known[near[0]]}?)" if near else ""
    raise ValueError(f"unknown data set {name!r}{hint}; known are {', '.join(READERS)}")


def load(name: str, data_path: str | os.PathLike[str] | None = None, **options: Any) -> Dataset:
    """A data set by name. Nothing is ever downloaded (``hf`` does when told to).

    ======================  ======================================================================
    ``digits``              scikit-learn's, 1x8x8; needs no files
    ``generated``           made on the fly, any size, classes and resolution; needs no files
    ``MNIST``               idx files, .gz or unpacked
    ``FashionMNIST``        the same; alias ``fashion``
    ``SVHN``                .mat or .npz
    ``CIFAR10/CIFAR100``    binary version; Python version with ``unsafe=True``
    ``TinyImageNet``        official folder; alias ``Tiny``
    ``ImageFolder``         your own images, one folder a class
    ``hf``                  what the Hugging Face ``datasets`` package reads
    ======================  ======================================================================

    Args:
        name: one of the names above; case, dashes and underscores do not matter.
        data_path: where the files are; ``digits`` and ``generated`` do without.
        options: of the particular reader (``ddfast.data.cifar10`` and so on). All of them take
            ``statistics``, the mean and std to normalise with: ``"computed"`` from the training
            images, or the published ``"mnist"``, ``"fashionmnist"``, ``"svhn"``, ``"cifar10"``,
            ``"cifar100"``, ``"imagenet"``; the default is the data set's own.

    Raises:
        ValueError: an unknown name or option, a missing ``data_path``, files in a wrong format.
        FileNotFoundError: missing files; the message lists what is expected where.
        ImportError: an optional package is needed; the message names the extra to install.
    """
    canonical = canonical_name(name)
    reader = READERS[canonical]
    known = inspect.signature(reader).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        rest = ", ".join(option for option in known if option != "data_path")
        raise ValueError(f"{canonical} has no option {', '.join(unknown)}; it has {rest}")
    if "data_path" in known:
        return reader(data_path, **options)
    return reader(**options)
