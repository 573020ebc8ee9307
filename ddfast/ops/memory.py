"""Where the compiled kernels' outputs live."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast import backend

#: Outputs from this size on come from the pool of kept buffers: 1 MiB.
POOLED_BYTES = 1 << 20


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised flat CPU tensor; a large one reuses memory that an earlier output freed.

    On two cores of a server processor the page faults of a fresh 45 MB allocation took longer than
    the kernel that filled it. At most 1 GiB is kept (`ddfast._C.release_buffers()` frees them).
    """
    size = count * dtype.itemsize
    if backend.compiled is None or size < POOLED_BYTES:
        return torch.empty(count, dtype=dtype)
    return torch.frombuffer(backend.compiled.Buffer(size), dtype=dtype, count=count)


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised contiguous CPU tensors of the same shapes and dtypes."""
    return [empty(t.numel(), t.dtype).view(t.shape) for t in tensors]
