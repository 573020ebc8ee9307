"""`conv_kernel` on NVIDIA GPUs, in CUDA C++ (`csrc/cuda`): this is its launch.

The kernels hold the planes of a pair of images in shared memory, or where these are too large (a
global average) in memory that stays in the second cache. They compute in float32 and take images up
to 32 columns wide, at most 3 layers between two pools; the reference answers beyond that. Each
image's variances, and their gradients' way back, are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.reference import conv_kernel as reference
from ddfast.reference import conv_kernel_bwd as reference_bwd

try:
    from ddfast import _cuda
except ImportError as error:
    raise ImportError(
        f"ddfast._cuda, which needs nvcc on the path when ddfast is installed: {error}"
    ) from error

#: Blocks of work for each that runs at once, so that none waits long for the last.
SHARES = 4


def description(
    x: Tensor, kind: str, pools: Sequence[bool], readout: str, weight_var: float, bias_var: float
) -> _cuda.Description | None:
    """The network as the compiled module takes it; None if it is not made for it."""
    channels, height, width = x.shape[1:]
    network = (
        channels,
        height,
        width,
        list(pools),
        kind == "ntk",
        readout == "gap",
        weight_var,
        bias_var,
    )
    if x.dtype == torch.float64 or _cuda.table_size(network) < 0:
        return None
    return network


def tables(variances: Sequence[Tensor], images: Tensor) -> Tensor:
    """Square roots of the variances of all layers, (n, numbers of an image)."""
    flat = [layer.reshape(len(images), -1) for layer in variances]
    return torch.cat([images.new_zeros(len(images), 0), *flat], 1).sqrt()


def conv_kernel(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
) -> Tensor:
    """The matrix, (n, m); arguments as the reference has them, contiguous and of one dtype."""
    network = description(x, kind, pools, readout, weight_var, bias_var)
    if network is None:
        return reference.conv_kernel(x, y, kind, pools, readout, weight_var, bias_var)
    with torch.cuda.device(x.device):
        sets = [_set(images, pools, weight_var, bias_var) for images in _pair(x, y)]
        out = x.new_empty(len(x), len(x if y is None else y), dtype=torch.float32)
        if out.numel():
            how = _cuda.plan(network, False)
            memory = _memory(x, how)
            both = [_described(*each) for each in sets]
            _cuda.conv_kernel(
                network,
                both[0],
                both[-1],
                y is None,
                out.data_ptr(),
                memory.data_ptr(),
                how,
                torch.cuda.current_stream().cuda_stream,
            )
    return out


def conv_kernel_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    pools: Sequence[bool],
    readout: str,
    weight_var: float,
    bias_var: float,
    by_x: bool,
    by_y: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by x and y, contiguous and of one dtype; empty where not wanted."""
    network = description(x, kind, pools, readout, weight_var, bias_var)
    if network is None:
        return reference_bwd.conv_kernel_bwd(
            grad, x, y, kind, pools, readout, weight_var, bias_var, by_x, by_y
        )
    variances = pools, weight_var, bias_var
    nothing = x.new_empty(0)
    with torch.cuda.device(x.device):
        sets = [_set(images, *variances) for images in _pair(x, y)]
        # With itself each image is on both sides: the gradient by the first of grad and its mirror.
        grad = grad + grad.mT if y is None else grad
        dx = _by_first(network, sets[0], sets[-1], y is None, grad, variances) if by_x else nothing
        if y is None or not by_y:
            return dx, nothing
        return dx, _by_first(network, sets[1], sets[0], False, grad.mT, variances)


def _by_first(
    network: _cuda.Description,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    symmetric: bool,
    grad: Tensor,
    variances: tuple[Sequence[bool], float, float],
) -> Tensor:
    """The gradient by the images of the first set, (n, C, H, W)."""
    images, deviations = first
    n, m, size = len(images), len(second[0]), deviations.shape[1]
    if not n or not m:
        return torch.zeros_like(images)
    grad = grad.to(torch.float32).contiguous()
    how = _cuda.plan(network, True)
    memory = _memory(images, how)
    chunks = max(1, min(m, -(-SHARES * how[0] // n)))
    out = images.new_empty(chunks, n, size + images[0].numel())
    _cuda.conv_kernel_bwd(
        network,
        _described(*first),
        _described(*second),
        symmetric,
        grad.data_ptr(),
        chunks,
        out.data_ptr(),
        memory.data_ptr(),
        how,
        torch.cuda.current_stream().cuda_stream,
    )
    total = out.sum(0)
    by_image = total[:, size:].reshape(images.shape)
    if not size:
        return by_image
    shapes = [layer.shape[1:] for layer in reference.variances(images[:0], *variances)]
    flat = total[:, :size].split([shape.numel() for shape in shapes], 1)
    layers = [part.reshape(n, *shape) for part, shape in zip(flat, shapes, strict=True)]
    for rows, _ in reference.blocks(n, 1, images):
        by_variance = [layer[rows] for layer in layers]
        by_image[rows] += reference_bwd.variances_bwd(by_variance, images[rows], *variances)
    return by_image


def _pair(x: Tensor, y: Tensor | None) -> list[Tensor]:
    return [x] if y is None else [x, y]


def _set(
    images: Tensor, pools: Sequence[bool], weight_var: float, bias_var: float
) -> tuple[Tensor, Tensor]:
    """Images and the square roots of their variances, contiguous."""
    found = reference.variances(images, pools, weight_var, bias_var)
    return images, tables(found, images).contiguous()


def _described(images: Tensor, deviations: Tensor) -> _cuda.DescribedSet:
    return images.data_ptr(), deviations.data_ptr(), len(images)


def _memory(x: Tensor, how: tuple[int, int]) -> Tensor:
    return torch.empty(how[0] * how[1], dtype=torch.uint8, device=x.device)
