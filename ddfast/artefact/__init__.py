"""The distilled set as one safetensors file, which carries its preprocessing and its recipe."""

from __future__ import annotations

from ddfast.artefact.contents import SPACES, Artefact
from ddfast.artefact.file import FORMAT_VERSION, load, save

__all__ = ["FORMAT_VERSION", "SPACES", "Artefact", "load", "save"]
