"""Class-conditional generators: ours, its file, inversion, and what any other must be able to do.

Training is in `ddfast.generator.train`, the command line in `ddfast.generator.command`; they stand
on the floor of `ddfast.distill`, and the methods on that of the rest.
"""

from __future__ import annotations

from ddfast.generator.file import load, save
from ddfast.generator.interface import check_generator, frozen, normalised, signed
from ddfast.generator.inversion import Inversion, invert
from ddfast.generator.network import Discriminator, Generator

__all__ = [
    "Discriminator",
    "Generator",
    "Inversion",
    "check_generator",
    "frozen",
    "invert",
    "load",
    "normalised",
    "save",
    "signed",
]
