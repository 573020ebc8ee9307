"""Features of images, class means of what lies before each pooling, and their way back to images.

What feature matching (DM, CAFE, IDM, M3D, NCFM) needs of a network: a forward pass that keeps
nothing for the real images, and for the synthetic ones a vector-Jacobian product. A method knows
the gradient of its distance with respect to the features in closed form, so that no graph of a loss
has to exist. ConvNets run on the fused operators without autograd, in pieces that fit the cache;
any other network through autograd, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddfast.engine import feature_pass
from ddfast.engine.chain import Chain, recognise
from ddfast.engine.gradients import ALGORITHMS, CACHE, PATHS
from ddfast.engine.segments import pieces
from ddfast.memory import DEFAULT, FIRST_ORDER, FORWARD, activation_bytes, parse_memory
from ddfast.nets.convnet import ConvNet
from ddfast.ops.class_mean import class_mean
from ddfast.ops.registry import refuse_transforms

# Peak numbers held per image of the fused passes, in (convolution outputs, block inputs). Measured:
# 0.6 outputs, with maps 1.4; kept 1.3 (400 images) to 2.4 (10), with maps up to 3.
FUSED_FORWARD = (1.0, 1.0)
FUSED_KEPT = (3.0, 2.0)

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU)
_Backward = Callable[[Tensor | None, Sequence[Tensor] | None], Tensor]


@dataclass
class Features:
    """What :func:`features` returns.

    Attributes:
        features: (N, width), as ``net.embed(images)`` gives them and in its dtype, without a graph.
        maps: with `layers`, for every block the mean over each class's images of the activation
            before pooling, (classes, channels, H, W), in float64 for float64, else float32; zeros
            for a class without images. Otherwise empty.
    """

    features: Tensor
    maps: list[Tensor] = field(default_factory=list)
    _backward: _Backward | None = field(default=None, repr=False)

    def backward(
        self, by_features: Tensor | None, by_maps: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Gradient with respect to the images, from that with respect to features and maps.

        May be called any number of times.

        Args:
            by_features: in the shape and dtype of `features`, or None for zeros.
            by_maps: one for each of `maps` in its shape and dtype, or None for zeros.

        Returns:
            (N, channels, H, W).

        Raises:
            RuntimeError: the call of `features` did not say `keep=True`.
            ValueError: shapes, dtypes or numbers of tensors that do not fit.
        """
        if self._backward is None:
            raise RuntimeError(
                "keep: nothing was kept for a backward pass; call features(..., keep=True)"
            )
        if by_features is not None:
            _check_cotangent("by_features", by_features, self.features)
        if by_maps is not None:
            by_maps = list(by_maps)
            if len(by_maps) != len(self.maps):
                raise ValueError(
                    f"by_maps: got {len(by_maps)} tensors, expected {len(self.maps)}, one for each "
                    "of the maps (see layers)"
                )
            for number, (given, of) in enumerate(zip(by_maps, self.maps, strict=True)):
                _check_cotangent(f"by_maps[{number}]", given, of)
        return self._backward(by_features, by_maps or None)


def features(
    net: nn.Module,
    images: Tensor,
    counts: Sequence[int] | None = None,
    *,
    keep: bool = False,
    layers: bool = False,
    path: str = "auto",
    algorithm: str = "auto",
) -> Features:
    """Features of images, as ``net.embed(images)``, and if wanted each block's class means.

    The network stays in its mode. Its weights are constants: neither they nor their `.grad` are
    touched. In training mode batch normalisation uses the statistics of these images, so that all
    that belong together must be in one call; otherwise a call may be divided as one likes (see
    :func:`images_at_once`), the results being equal but for rounding.

    Args:
        net: any network of `ddfast.nets`, or a module with a method `embed`.
        images: (N, channels, H, W), in the network's dtype and device.
        counts: images of each class, which lie class after class; needed with `layers`.
        keep: keep what :meth:`Features.backward` needs.
        layers: compute `maps`, too; for ConvNets only, the other networks have no blocks.
        path: "fused", "general" (autograd), or "auto", fused where it can be.
        algorithm: of the fused convolutions: "direct", "winograd" or "auto".

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    counts = _check_call(net, images, counts, layers)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: got {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
    chain = _chain(net, path)
    images = images.detach()
    if chain is None or not len(images):
        return _general(net, images, counts, keep, layers)
    return _fused(chain, images, counts, keep, layers, algorithm)


def images_at_once(
    net: nn.Module,
    image_shape: Sequence[int],
    memory: int | str | None,
    keep: bool,
    path: str = "auto",
) -> int:
    """Most images of a call of :func:`features` within a memory budget.

    Args:
        image_shape: (channels, H, W).
        memory: bytes for activations, as "8GiB" or a number; None: 1 GiB.
        keep: as in `features`. Without it a CPU takes no more than its cache holds, which is
            the fastest.

    Raises:
        ValueError: a budget that holds not even one image; an unknown path.
    """
    budget = DEFAULT if memory is None else parse_memory(memory)
    image = tuple(int(side) for side in image_shape)
    if len(image) != 3:
        raise ValueError(f"image_shape: got {image}, expected (channels, H, W)")
    chain = _chain(net, path)
    parameter = next(net.parameters())
    if chain is None:
        needs = (FIRST_ORDER if keep else FORWARD) * activation_bytes(net, (image[0], *image[1:]))
    else:
        outputs, inputs = chain.elements(image)
        a, b = FUSED_KEPT if keep else FUSED_FORWARD
        needs = parameter.element_size() * (a * outputs + b * inputs)
    if needs > budget:
        raise ValueError(
            f"memory: the budget of {budget} bytes is too small, one image needs {needs:.0f}"
        )
    most = int(budget // needs)
    if chain is not None and not keep and parameter.device.type == "cpu":
        most = min(most, _in_cache(chain, image, parameter.element_size()))
    return most


def _in_cache(chain: Chain, image: Sequence[int], size: int) -> int:
    outputs, inputs = chain.elements(tuple(image))
    return max(1, CACHE // (size * (outputs + inputs)))


def _chain(net: nn.Module, path: str) -> Chain | None:
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}, expected one of {', '.join(PATHS)}")
    chain = None if path == "general" else recognise(net, frozen_norms=True)
    if path == "fused" and chain is None:
        raise ValueError(
            f"path: 'fused' cannot serve this {type(net).__name__}; it serves ddfast's ConvNet "
            "with instance, group or no normalisation in float32 or float64"
        )
    return chain


# --- the fused path -------------------------------------------------------------------------------


def _fused(
    chain: Chain,
    images: Tensor,
    counts: list[int],
    keep: bool,
    layers: bool,
    algorithm: str,
) -> Features:
    channels = chain.blocks[0].convolution.in_channels
    if images.shape[1] != channels:
        raise ValueError(f"images: got {images.shape[1]} channels, expected {channels}")
    planes, width = chain.shapes(tuple(images.shape[1:]))
    out = images.new_empty(len(images), width)
    maps = [_zeros(images, (len(counts), *plane)) for plane in planes] if layers else []
    divided = list(pieces(counts, _together(chain, images, keep and layers)))
    traces: list[feature_pass.Trace] = []
    versions = _versions(chain)
    with torch.inference_mode():  # below autograd's dispatch; `out` and `maps` are ordinary tensors
        for piece in divided:
            trace = feature_pass.forward(
                chain, images[piece.images], piece.counts, algorithm, keep, layers
            )
            here = out[piece.images]
            here.view(trace.result.shape).copy_(trace.result)
            for total, part in zip(maps, trace.maps, strict=True):
                for c, (count, mean) in enumerate(
                    zip(piece.counts, part, strict=True), piece.first
                ):
                    if count:
                        total[c].add_(mean, alpha=count / counts[c])
            trace.maps = []
            if keep:
                traces.append(trace)

    def backward(by_features: Tensor | None, by_maps: Sequence[Tensor] | None) -> Tensor:
        if _versions(chain) != versions:
            raise RuntimeError("net: its weights have changed since its features were computed")
        by_images = torch.empty_like(images, memory_format=torch.contiguous_format)
        with torch.inference_mode():
            for piece, trace in zip(divided, traces, strict=True):
                g = None if by_features is None else by_features.detach()[piece.images]
                here = range(piece.first, piece.first + len(piece.counts))
                shares = [  # of one image in the mean of its class
                    torch.stack([m.detach()[c] / max(counts[c], 1) for c in here])
                    for m in by_maps or ()
                ]
                by_images[piece.images] = feature_pass.backward(chain, trace, g, shares, algorithm)
        return by_images

    return Features(out, maps, backward if keep else None)


def _zeros(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In the memory format of the pass, so that adding to it is fast."""
    last = images.device.type == "cpu"
    form = torch.channels_last if last else torch.contiguous_format
    empty = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=form)
    return empty.zero_()


def _versions(chain: Chain) -> list[int]:
    """How often each weight has been written, as autograd counts it."""
    layers = [
        layer
        for b in chain.blocks
        for layer in (b.convolution, b.norm, b.before)
        if layer is not None
    ]
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    weights = [t for t in tensors if not t.is_inference()]
    return [p._version for p in weights]


def _together(chain: Chain, images: Tensor, half: bool) -> int:
    """Images that go through the network together: on a CPU about what its cache holds.

    Half of them where a backward pass will write a cotangent of every activation as well.
    """
    if images.device.type != "cpu":
        return len(images)
    most = _in_cache(chain, images.shape[1:], images.element_size())
    most = max(1, most // 2) if half else most
    return -(-len(images) // -(-len(images) // most))  # pieces of about the same size


# --- any network ----------------------------------------------------------------------------------


class _Embed(nn.Module):
    """A network whose forward pass is `embed`, or for `layers` a ConvNet's layers one by one."""

    def __init__(self, net: nn.Module, layers: bool) -> None:
        super().__init__()
        self.net, self.layers = net, layers

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if not self.layers:
            return (self.net.embed(images),)  # type: ignore[operator]
        x, before_pooling = images, []
        for layer in self.net.features:  # type: ignore[union-attr]
            x = layer(x)
            if isinstance(layer, _ACTIVATIONS):
                before_pooling.append(x)
        return (x.flatten(1), *before_pooling)


def _general(
    net: nn.Module, images: Tensor, counts: list[int], keep: bool, layers: bool
) -> Features:
    weights = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    leaf = images.detach().requires_grad_(keep)
    with torch.set_grad_enabled(keep):
        out, *activations = torch.func.functional_call(_Embed(net, layers), weights, (leaf,))
        maps = [_means(a, counts) for a in activations]

    def backward(by_features: Tensor | None, by_maps: Sequence[Tensor] | None) -> Tensor:
        cotangents = [by_features, *(by_maps or ())]
        pairs = [
            (y, g)
            for y, g in zip([out, *maps], cotangents, strict=False)
            if g is not None and y.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(images)
        of, given = zip(*pairs, strict=True)
        return torch.autograd.grad(of, leaf, [g.detach() for g in given], retain_graph=True)[0]

    return Features(out.detach(), [m.detach() for m in maps], backward if keep else None)


def _means(a: Tensor, counts: list[int]) -> Tensor:
    """Class means of an activation, (classes, channels, H, W); zeros for a class without images."""
    there = [c for c, count in enumerate(counts) if count]
    mean = class_mean(a.flatten(1), [counts[c] for c in there])
    if len(there) < len(counts):
        mean = mean.new_zeros(len(counts), mean.shape[1]).index_copy(
            0, torch.tensor(there, dtype=torch.int64, device=a.device), mean
        )
    return mean.view(len(counts), *a.shape[1:])


# --- what a caller may ask ------------------------------------------------------------------------


def _check_call(
    net: nn.Module, images: Tensor, counts: Sequence[int] | None, layers: bool
) -> list[int]:
    """The counts as a list, or the error that says what is wrong."""
    if not callable(getattr(net, "embed", None)):
        raise TypeError(f"net: {type(net).__name__} has no method embed(images)")
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError("images: expected a floating-point tensor (N, channels, H, W)")
    refuse_transforms(images, *net.parameters())
    if images.dim() != 4:
        raise ValueError(f"images: got {tuple(images.shape)}, expected (N, channels, H, W)")
    parameter = next(net.parameters(), None)
    if parameter is None:
        raise ValueError("net: has no parameters")
    if images.dtype != parameter.dtype or images.device != parameter.device:
        raise ValueError(
            f"images: got {images.dtype} on {images.device}, expected {parameter.dtype} on "
            f"{parameter.device}, as the network's parameters"
        )
    for name, module in net.named_modules():
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"net: dropout {name!r} is in training mode and would draw at random")
    if layers and not (isinstance(net, ConvNet) and type(net).embed is ConvNet.embed):
        raise ValueError(f"layers: {type(net).__name__} has no blocks; only ConvNet has")
    if counts is None:
        if layers:
            raise ValueError("counts: needed with layers, the number of images of each class")
        return [len(images)]
    counts = [int(count) for count in counts]
    if not counts or min(counts) < 0 or sum(counts) != len(images):
        raise ValueError(
            f"counts: got {counts}, expected images of each class that sum to {len(images)}"
        )
    return counts


def _check_cotangent(name: str, given: Tensor, of: Tensor) -> None:
    if not isinstance(given, Tensor) or given.shape != of.shape:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: got {found}, expected {tuple(of.shape)}")
    if given.dtype != of.dtype or given.device != of.device:
        raise ValueError(
            f"{name}: got {given.dtype} on {given.device}, expected {of.dtype} on {of.device}"
        )
    refuse_transforms(given)
