"""The networks of the field, by name, with weights from explicit generators."""

from __future__ import annotations

from ddfast.nets.catalogue import architectures, build, names
from ddfast.nets.initialisation import has_batchnorm, initialise, initialise_wide
from ddfast.nets.network import Network
from ddfast.nets.stacking import stack

__all__ = [
    "Network",
    "architectures",
    "build",
    "has_batchnorm",
    "initialise",
    "initialise_wide",
    "names",
    "stack",
]
