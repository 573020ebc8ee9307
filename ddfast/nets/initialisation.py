"""Fresh weights from an explicit generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM = (nn.GroupNorm, nn.LayerNorm, *_BATCHNORM)


class FanOutConv2d(nn.Conv2d):
    """A convolution whose weights start as N(0, sqrt(2 / (kernel area * outputs))), as in IDC.

    That is He et al.'s rule with the fan out; everything else is ``torch.nn.Conv2d``.
    """


class LeCunConv2d(nn.Conv2d):
    """A convolution whose weights start as N(0, 1 / sqrt(fan_in)), its biases as 0, as in Flax.

    The normal distribution is cut off at two standard deviations and widened to keep its variance.
    """


class LeCunLinear(nn.Linear):
    """A linear layer that starts as :class:`LeCunConv2d`."""


_LECUN = (LeCunConv2d, LeCunLinear)
_CUT, _CUT_DEVIATION = 2.0, 0.87962566103423978  # standard deviation of N(0, 1) within +-2


@torch.no_grad()
def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter of ``net`` anew, in place, from the distributions of its layers.

    They are PyTorch's defaults. Weights and biases of linear and convolutional layers: uniform
    between -1/sqrt(fan_in) and 1/sqrt(fan_in), where fan_in counts the inputs of one output.
    Normalisations: weight 1, bias 0, running statistics as new. The convolution of ResNetAP
    (:class:`FanOutConv2d`) and the layers of FRePo (:class:`LeCunConv2d`) have rules of their own.

    The generator is a CPU one wherever the network lives, and the draws do not depend on the
    network's device or memory format: they are made on the CPU in the dtype of the parameter and
    copied. They come in the order of ``net.modules()``, weight before bias, which is the order of
    PyTorch's own constructors: seeded alike, an official network starts from the same numbers.

    The only state that moves is the generator's: the global one is neither read nor written.
    ``requires_grad`` and ``.grad`` are left as they are.

    Raises:
        TypeError: ``generator`` is no ``torch.Generator``; a layer with parameters or buffers of
            its own is of a type not listed above (nothing has been changed then).
        ValueError: ``generator`` is not on the CPU.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
    modules = list(net.modules())
    for module in modules:
        if not isinstance(module, _WEIGHTED + _NORM) and (
            module._parameters.keys() or module._buffers.keys()
        ):
            raise TypeError(
                f"initialise does not know how to draw the parameters of {type(module).__name__}; "
                "it knows linear and convolutional layers and group, layer and batch normalisation"
            )
    for module in modules:
        if isinstance(module, _WEIGHTED):
            bound = 1.0 / math.sqrt(math.prod(module.weight.shape[1:]))
            if isinstance(module, _LECUN):
                _cut_normal(module.weight, bound, generator)
                if module.bias is not None:
                    module.bias.zero_()
                continue
            if isinstance(module, FanOutConv2d):
                area = math.prod(module.kernel_size)
                _normal(module.weight, math.sqrt(2 / (area * module.out_channels)), generator)
            else:
                _uniform(module.weight, bound, generator)
            if module.bias is not None:
                _uniform(module.bias, bound, generator)
        elif isinstance(module, _NORM):
            if module.weight is not None:
                module.weight.fill_(1.0)
            if module.bias is not None:
                module.bias.zero_()
            if isinstance(module, _BATCHNORM):
                module.reset_running_stats()


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    if parameter.device.type == "cpu" and parameter.is_contiguous():
        parameter.uniform_(-bound, bound, generator=generator)
    else:  # uniform_ fills memory in storage order: draw in logical order, then copy
        drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))


def _normal(parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    parameter.copy_(drawn.normal_(0, deviation, generator=generator))


def _cut_normal(parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    """A normal distribution within two standard deviations, by its inverse distribution."""
    most = math.erf(_CUT / math.sqrt(2))
    drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    drawn.uniform_(-most, most, generator=generator).erfinv_().mul_(math.sqrt(2))
    parameter.copy_(drawn.mul_(deviation / _CUT_DEVIATION))


@torch.no_grad()
def initialise_wide(
    net: nn.Module, generator: torch.Generator, weight_var: float = 2.0, bias_var: float = 0.01
) -> None:
    """Draw weights as the kernels of infinitely wide networks suppose them, in place.

    Linear and convolutional layers: weights N(0, weight_var / fan_in), biases N(0, bias_var). All
    else as :func:`initialise`.

    Args:
        net, generator: as there.
        weight_var, bias_var: see above.

    Raises:
        TypeError, ValueError: as :func:`initialise`; a variance that is negative or not finite.
    """
    for name, value in (("weight_var", weight_var), ("bias_var", bias_var)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")
    initialise(net, generator)
    for module in net.modules():
        if isinstance(module, _WEIGHTED):
            fan_in = math.prod(module.weight.shape[1:])
            _normal(module.weight, math.sqrt(weight_var / fan_in), generator)
            if module.bias is not None:
                _normal(module.bias, math.sqrt(bias_var), generator)


def has_batchnorm(net: nn.Module) -> bool:
    """Whether the network contains batch normalisation.

    Such a network answers differently in training and evaluation mode, changes its buffers in
    every training forward, and makes the images of a batch depend on each other.

    Args:
        net: any module.
    """
    return any(isinstance(module, _BATCHNORM) for module in net.modules())
