"""A matching step as one CUDA graph: recorded once for its shapes, replayed afterwards.

The step is a fixed list of some dozens of kernels whatever the number of classes, each too short to
hide its launch at a few images per class; replayed, they cost one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UPS = 3
MOST = 8  # recordings kept per network, each with memory of its own

Step = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


@dataclass
class Recording:
    """A graph with the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, Tensor]


_recordings: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Recording]] = (
    weakref.WeakKeyDictionary()
)


def replayed(
    net: nn.Module, key: Hashable, inputs: Sequence[Tensor], step: Step
) -> tuple[Tensor, Tensor]:
    """`step(inputs)`, recorded at the first call with this network, key, and weights in this place.

    Weights may change in place between calls (an optimiser step, `nets.initialise`); weights in new
    tensors are recorded anew.

    Args:
        key: everything else that decides which kernels run: counts, names, metric, ...
        inputs: tensors on one GPU whose values change from call to call.

    Raises:
        ValueError: inputs that are not on a GPU.
    """
    if any(x.device.type != "cuda" for x in inputs):
        raise ValueError(f"graph: CUDA graphs need tensors on a GPU, got {inputs[0].device}")
    places = tuple(p.data_ptr() for p in net.parameters())
    shapes = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs)
    known = _recordings.setdefault(net, {})
    whole = (key, places, shapes)
    if whole not in known:
        while len(known) >= MOST:
            known.pop(next(iter(known)))  # the oldest
        known[whole] = _record(inputs, step)
    recording = known[whole]
    for buffer, x in zip(recording.inputs, inputs, strict=True):
        buffer.copy_(x)
    recording.graph.replay()
    losses, gradient = recording.outputs
    return losses.clone(), gradient.clone()


def _record(inputs: Sequence[Tensor], step: Step) -> Recording:
    buffers = [x.clone() for x in inputs]
    device = inputs[0].device
    with torch.cuda.device(device):
        # On a stream of its own first: libraries choose algorithms and compile kernels there.
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step(buffers)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(buffers)
    return Recording(graph, buffers, outputs)
