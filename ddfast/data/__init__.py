"""Real data: reading it, drawing from it class by class, normalising it.

:func:`load` finds a data set by name. Images stay uint8 and are normalised on the fly.
"""

from __future__ import annotations

from ddfast.data.cifar import cifar10, cifar100
from ddfast.data.dataset import Dataset
from ddfast.data.digits import digits
from ddfast.data.generated import generated, generated_images, generated_memmap
from ddfast.data.hugging_face import hugging_face
from ddfast.data.image_folder import image_folder, tiny_imagenet
from ddfast.data.mnist import fashion_mnist, mnist
from ddfast.data.normalisation import channel_statistics, denormalise, normalise
from ddfast.data.registry import canonical_name, load, names
from ddfast.data.sampling import ClassSampler, hold_out, random_selection
from ddfast.data.svhn import svhn
from ddfast.data.whitening import Whitening, fit_whitening, whitened

__all__ = [
    "ClassSampler",
    "Dataset",
    "Whitening",
    "canonical_name",
    "channel_statistics",
    "cifar10",
    "cifar100",
    "denormalise",
    "digits",
    "fashion_mnist",
    "fit_whitening",
    "generated",
    "generated_images",
    "generated_memmap",
    "hold_out",
    "hugging_face",
    "image_folder",
    "load",
    "mnist",
    "names",
    "normalise",
    "random_selection",
    "svhn",
    "tiny_imagenet",
    "whitened",
]
