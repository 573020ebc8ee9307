"""ddfast: fast, exact dataset distillation."""

from __future__ import annotations

# torch first: its OpenMP runtime is then the one that the compiled kernels share.
import torch as _torch  # noqa: F401

from ddfast import augment, layers, losses
from ddfast._version import __version__
from ddfast.backend import backends, use_backend

__all__ = ["__version__", "augment", "backends", "layers", "losses", "use_backend"]
