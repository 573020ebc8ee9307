"""When a network may run several of its layers as one operator of ddfast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ddfast import backend
from ddfast.ops.norm_relu_pool import COMPILED

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


LEAST = 1 << 17
"""Values behind the first convolution. Below, calling an operator that is written in Python costs
more than it saves: a training step on one core was slower up to 65 000 values (images of 8x8 to
16x16) or 131 000 (32x32), and 1.4 to 2 times as fast from a million on."""


def can_fuse(images: Tensor, layers: nn.Module, values: int) -> bool:
    """Whether fused operators answer for `layers` as the layers themselves would, and faster.

    Args:
        values: of the largest activation, all images together.

    Not for a few values, where somebody watches single layers (hooks), under torch.func transforms,
    forward-mode differentiation or autocast, nor where a compiler fuses anyway. On CPU: float32 and
    float64 with compiled kernels; on CUDA: with Triton.
    """
    if values <= LEAST or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    device = images.device.type
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    if device == "cpu" and (backend.compiled is None or images.dtype not in COMPILED):
        return False
    if _has_any_global_hook():
        return False
    return not any(getattr(m, kind) for m in layers.modules() for kind in _HOOKS)
