"""The kernel of random networks' features, and its gradient, one network at a time.

With phi_r(x) the F features of network r before its last linear layer, which is integrated out,

    K(x, x') = weight_var / (M F) sum over r of <phi_r(x), phi_r(x')> + bias_var

Of networks whose weights are N(0, weight_var / fan_in) and biases N(0, bias_var) it is an unbiased
estimate of the NNGP kernel of `kernel_matrix` in the limit of wide layers (Loo et al., Efficient
Dataset Distillation using Random Feature Approximation, RFAD, NeurIPS 2022, section 3).

A graph of it would hold the activations of all M networks. Here the forward pass keeps none, and
the backward pass goes through the networks once more. With G_ss and G_ts the gradients of the loss
by the two kernel matrices, the features of network r have the cotangent

    weight_var / (M F) [G_ts' Phi_t,r + (G_ss + G_ss') Phi_s,r]

which is brought back to the images while nothing of another network is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.engine import Features, features, images_at_once
from ddfast.memory import DEFAULT, parse_memory
from ddfast.nets import has_batchnorm
from ddfast.ops.registry import refuse_forward_mode, refuse_transforms

__all__ = ["empirical_nngp"]

PRECISIONS = (None, "bfloat16")


@dataclass(frozen=True)
class _Plan:
    """What does not change between the passes."""

    y: Tensor
    network: Callable[[int], nn.Module]
    count: int
    weight_var: float
    bias_var: float
    normalise: bool
    precision: str | None
    memory: int


def empirical_nngp(
    x: Tensor,
    y: Tensor,
    network: Callable[[int], nn.Module],
    count: int,
    *,
    weight_var: float = 2.0,
    bias_var: float = 0.01,
    normalise: bool = True,
    precision: str | None = None,
    memory: int | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Kernel matrices of support images `x` with themselves and of target images `y` with x.

    An unbiased estimate of the NNGP kernel (Loo et al., RFAD, NeurIPS 2022, section 3): the mean of
    weight_var / F <phi(x), phi(x')> + bias_var over `count` networks with features phi(x), F of
    them, before the last layer.

    Differentiable in x, once; a gradient with `create_graph=True` raises NotImplementedError. The
    memory does not depend on `count`, beyond what is kept because it fits (see `memory`).

    Args:
        x: (n, channels, H, W), float32 or float64, as the networks.
        y: (m, channels, H, W), in the dtype of x; constant.
        network: makes network number 0 .. count - 1, with a method `embed`, in the mode in which
            its features are taken; constant. Each is asked for once more in the backward pass and
            must then be the same. It may be one module whose weights are drawn anew, for a network
            is done with before the next one is asked for.
        count: M.
        weight_var, bias_var: the variances with which the networks were drawn, and of the last
            layer, which is integrated out.
        normalise: divide by M F; else K is the plain sum of products with `weight_var`.
        precision: None for features in the dtype of x. "bfloat16" for a copy of the network in
            bfloat16, faster on GPUs and for networks that no fused operator serves; products and
            sums stay in float32, without which the gradient would be noise.
        memory: bytes, or words such as "8GiB"; None: 1 GiB. A third of it is for the images that
            go through a network together. Kept for the backward pass are all features if they fit
            into a third, and of a single network the activations of x if they do (its weights
            must then stay as they are until then); else they are computed again.

    Returns:
        (n, n), symmetric, and (m, n), in the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    budget = DEFAULT if memory is None else parse_memory(memory)
    _check(x, y, network, count, weight_var, bias_var, precision)
    plan = _Plan(
        y.detach(),
        network,
        count,
        float(weight_var),
        float(bias_var),
        normalise,
        precision,
        budget // 3,
    )
    k_ss, k_ts = _apart(x, plan)
    return k_ss, k_ts


@torch.compiler.disable
def _apart(x: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Outside of any compiled graph: the networks are Python."""
    found: tuple[Tensor, Tensor] = _EmpiricalNNGP.apply(x, plan)
    return found


class _EmpiricalNNGP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        k_ss, k_ts, ctx.kept = _forward(x, plan, keep=ctx.needs_input_grad[0])
        return k_ss, k_ts

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None]:
        if torch.is_grad_enabled():  # somebody wants a graph of this gradient
            raise NotImplementedError(
                "empirical_nngp: has first derivatives only, so no create_graph=True; build the "
                "features with torch and multiply them where a second one is needed"
            )
        (x,) = ctx.saved_tensors
        return _backward(x, ctx.plan, ctx.kept, *gradients), None


@dataclass
class _Kept:
    """What the forward pass leaves behind of each network, as far as it fits."""

    of_x: list[Tensor] = field(default_factory=list)
    of_y: list[Tensor] = field(default_factory=list)
    single: tuple[nn.Module, Features] | None = None  # if there is but one network


def _forward(x: Tensor, plan: _Plan, keep: bool) -> tuple[Tensor, Tensor, _Kept]:
    """The kernel matrices, and each network's features if they are wanted and fit."""
    k_ss = x.new_zeros(len(x), len(x))
    k_ts = x.new_zeros(len(plan.y), len(x))
    kept = _Kept()
    for number in range(plan.count):
        net = _network(plan, number, x)
        if keep and plan.count == 1 and len(x) <= _at_once(net, x, plan, keep=True):
            kept.single = net, features(net, _as_network(net, x), keep=True)
            of_x = kept.single[1].features
        else:
            of_x = torch.cat([each for _, each in _features(net, x, plan)])
        width = of_x.shape[1]
        need = plan.count * (len(x) + len(plan.y)) * width * of_x.element_size()
        fits = keep and need <= plan.memory
        factor = _factor(plan, width)
        wide = of_x.to(x.dtype)
        k_ss.addmm_(wide, wide.mT, alpha=factor)
        pieces = []
        for here, of_y in _features(net, plan.y, plan):
            k_ts[here].addmm_(of_y.to(x.dtype), wide.mT, alpha=factor)
            if fits:
                pieces.append(of_y)
        if fits:
            kept.of_x.append(of_x)
            kept.of_y.append(torch.cat(pieces))
    return (k_ss + k_ss.mT) / 2 + plan.bias_var, k_ts + plan.bias_var, kept


def _backward(
    x: Tensor, plan: _Plan, kept: _Kept, by_ss: Tensor | None, by_ts: Tensor | None
) -> Tensor | None:
    """The gradient of the support images."""
    if by_ss is None and by_ts is None:
        return None
    by_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    sides = None if by_ss is None else by_ss + by_ss.mT
    for number in range(plan.count):
        net, trace = kept.single or (_network(plan, number, x), None)
        if kept.of_x:
            of_x, of_y = kept.of_x[number], iter([(slice(None), kept.of_y[number])])
        else:
            of_x = torch.cat([each for _, each in _features(net, x, plan)])
            of_y = _features(net, plan.y, plan)
        cotangent = x.new_zeros(of_x.shape)
        if sides is not None:
            cotangent.addmm_(sides, of_x.to(x.dtype))
        if by_ts is not None:
            for here, each in of_y:
                cotangent.addmm_(by_ts[here].mT, each.to(x.dtype))
        cotangent *= _factor(plan, of_x.shape[1])
        if trace is not None:
            return trace.backward(cotangent.to(of_x.dtype)).to(x.dtype)
        most = _at_once(net, x, plan, keep=True)
        for begin in range(0, len(x), most):
            here = slice(begin, begin + most)
            trace = features(net, _as_network(net, x[here]), keep=True)
            by_x[here] += trace.backward(cotangent[here].to(trace.features.dtype)).to(x.dtype)
    return by_x


def _network(plan: _Plan, number: int, x: Tensor) -> nn.Module:
    """Network `number` in the precision of the features."""
    net = plan.network(number)
    if not isinstance(net, nn.Module) or not callable(getattr(net, "embed", None)):
        raise TypeError(
            f"network: made {type(net).__name__} of {number}, expected a module with embed(images)"
        )
    parameter = next(net.parameters())
    if parameter.dtype != x.dtype or parameter.device != x.device:
        raise ValueError(
            f"network: number {number} is {parameter.dtype} on {parameter.device}, expected "
            f"{x.dtype} on {x.device} as x"
        )
    if net.training and has_batchnorm(net):
        raise ValueError(
            f"network: number {number} has batch normalisation in training mode, with which the "
            "features of an image depend on the others; call eval()"
        )
    if plan.precision == "bfloat16":
        net = copy.deepcopy(net).to(torch.bfloat16)
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def _as_network(net: nn.Module, images: Tensor) -> Tensor:
    """Images in the dtype of the network."""
    dtype = next(net.parameters()).dtype
    if dtype == torch.bfloat16:
        return images.detach().to(dtype, memory_format=torch.channels_last)
    return images.detach()


def _features(net: nn.Module, images: Tensor, plan: _Plan) -> Iterator[tuple[slice, Tensor]]:
    """Places and features of images, in pieces that fit the memory."""
    most = _at_once(net, images, plan, keep=False)
    for begin in range(0, len(images), most):
        here = slice(begin, begin + most)
        yield here, features(net, _as_network(net, images[here])).features


def _at_once(net: nn.Module, images: Tensor, plan: _Plan, keep: bool) -> int:
    return images_at_once(net, images.shape[1:], plan.memory, keep)


def _factor(plan: _Plan, width: int) -> float:
    return plan.weight_var / (plan.count * width) if plan.normalise else plan.weight_var


def _check(
    x: Tensor,
    y: Tensor,
    network: object,
    count: int,
    weight_var: float,
    bias_var: float,
    precision: str | None,
) -> None:
    for name, images in (("x", x), ("y", y)):
        if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
            found = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{name}: got {found}, expected a float32 or float64 tensor")
        if images.dim() != 4 or not len(images):
            raise ValueError(
                f"{name}: got shape {tuple(images.shape)}, expected (n, channels, H, W), n >= 1"
            )
    refuse_transforms(x, y)
    refuse_forward_mode("empirical_nngp", [x, y])
    if y.shape[1:] != x.shape[1:] or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"y: got {tuple(y.shape)} of {y.dtype} on {y.device}, expected images as x, "
            f"{tuple(x.shape)} of {x.dtype} on {x.device}"
        )
    if y.requires_grad:
        raise ValueError("y: requires a gradient, and the target images are constants; detach it")
    if not callable(network):
        raise TypeError(f"network: got {type(network).__name__}, expected a function of a number")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: got {count!r}, expected an integer of at least 1")
    for name, value in (("weight_var", weight_var), ("bias_var", bias_var)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: got {value!r}, expected a finite number of at least 0")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected None or 'bfloat16'")
    if precision == "bfloat16" and x.dtype != torch.float32:
        raise ValueError(f"precision: 'bfloat16' is for float32 images, got {x.dtype}")
