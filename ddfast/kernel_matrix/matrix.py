"""NNGP and NTK matrices of infinitely wide ReLU networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.kernel_matrix.networks import (
    NETS,
    check_size,
    check_variances,
    checked_depth,
    convolutions,
)
from ddfast.losses.dtypes import FLOATS
from ddfast.ops.conv_kernel import conv_kernel
from ddfast.ops.dense_kernel import dense_kernel
from ddfast.ops.registry import refuse_transforms
from ddfast.reference.dense_kernel import KINDS


def kernel_matrix(
    x: Tensor,
    y: Tensor | None = None,
    kind: str = "ntk",
    net: str = "fc",
    depth: int = 3,
    pool: bool | Sequence[bool] = True,
    readout: str = "flatten",
    weight_var: float = 2.0,
    bias_var: float = 0.01,
) -> Tensor:
    """Kernel of every image of x with every image of y, for an infinitely wide network.

    The networks are those of KIP (Nguyen et al., ICLR and NeurIPS 2021) in NTK parametrisation
    (Jacot et al., NeurIPS 2018): weights of variance weight_var / fan-in, biases of variance
    bias_var, ReLU after every layer but the last, which is Dense with one output.

    * `fc`: images are flattened; `depth` times Dense and ReLU.
    * `conv`: `depth` times a 3 x 3 convolution (zeros around the image), ReLU, and a 2 x 2 average
      pool where `pool` says so; a side of odd length loses its last row. Then the positions are
      flattened, or averaged with readout="gap".
    * `kip_convnet`: KIP's ConvNet, a convolution without a pool and three with one; flattened.
    * `myrtle5`, `myrtle7`, `myrtle10` (Shankar et al., ICML 2020): three groups of 2-1-1, 2-2-2 or
      3-3-3 convolutions, a pool between the groups; averaged. These four have a depth, pools and a
      readout of their own: leave those arguments alone.

    No matrix of one layer is ever stored, and no covariance of positions beyond one pair of images.
    Blocks of rows and columns of the matrix may be computed one by one; an entry depends only on
    its pair. First derivatives, with respect to either set or both; a second raises
    NotImplementedError. The slow equivalents, with every order of derivative, are
    `ddfast.reference.dense_kernel` and `ddfast.reference.conv_kernel`. A pair of equal images has
    its largest possible correlation exactly, and there the derivative of the ReLU's slope, which
    is infinite, counts as zero.

    Args:
        x: (n, ...), images (n, channels, height, width) for a convolutional network; float32,
            float64, bfloat16 or float16, any strides.
        y: (m, ...) with images of the same shape, on the same device, of any of those dtypes; or
            None for x itself: half the work, and an exactly symmetric matrix.
        kind: "ntk", the neural tangent kernel, or "nngp", the covariance of the outputs.
        net: one of the above.
        depth: ReLU layers; of `fc` also 0, the linear kernel.
        pool: of `conv`: whether a pool follows each layer; one bool, or one for each layer.
        readout: of `conv`: "flatten" or "gap".
        weight_var, bias_var: sigma_w^2 > 0 and sigma_b^2 >= 0.

    Returns:
        (n, m); float64 if either set is, else float32, which is what halves are computed in.

    Raises:
        TypeError: x or y is no floating tensor; depth, pool or a variance of another type.
        ValueError: shapes that do not fit, images without values, too small for their pools or on
            two devices; unknown kind, net or readout; depth, pool or a variance out of range;
            depth, pool or readout given to a network that has its own.
        NotImplementedError: under torch.func.
    """
    _check_sets(x, y)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of ntk, nngp")
    if net not in NETS:
        raise ValueError(f"net: got {net!r}, expected one of {', '.join(NETS)}")
    weight_var, bias_var = check_variances(weight_var, bias_var)
    if net == "fc":
        layers = checked_depth(depth, net)
        x, y = x.flatten(1), None if y is None else y.flatten(1)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y))
        return dense_kernel(x, y, kind, layers, weight_var, bias_var, keep)[0]
    if x.dim() != 4:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected (n, channels, height, width) for net={net!r}"
        )
    pools, readout = convolutions(net, depth, pool, readout)
    check_size(net, pools, (x.shape[2], x.shape[3]))
    return conv_kernel(x, y, kind, pools, readout, weight_var, bias_var)


def _check_sets(x: Tensor, y: Tensor | None) -> None:
    """The error that names what is wrong with the images."""
    for name, images in (("x", x), ("y", y)):
        if images is None and name == "y":
            continue
        if not isinstance(images, Tensor):
            raise TypeError(f"{name}: got {type(images).__name__}, expected a tensor")
        if images.dtype not in FLOATS:
            raise TypeError(f"{name}: got {images.dtype}, expected a floating dtype")
        if images.dim() < 2 or images.shape[1:].numel() == 0:
            raise ValueError(
                f"{name}: got shape {tuple(images.shape)}, expected (n, ...) with at least one "
                "value an image"
            )
    refuse_transforms(*(t for t in (x, y) if t is not None))
    if y is None:
        return
    if y.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"y: got images of shape {tuple(y.shape[1:])}, expected {tuple(x.shape[1:])} as in x"
        )
    if y.device != x.device:
        raise ValueError(f"y: on {y.device}, expected {x.device}, where x is")
