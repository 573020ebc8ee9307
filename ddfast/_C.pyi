"""The compiled CPU kernels; see csrc/module.cpp."""

from typing import Any

def __getattr__(name: str) -> Any: ...
