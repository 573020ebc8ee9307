"""Several networks of one architecture as one set of stacked tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def stack(nets: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stack the parameters and buffers of K networks that differ in nothing but their values.

    Args:
        nets: K modules of one architecture and mode.

    Returns:
        ``(parameters, buffers)``: each name of the state dict with a new tensor of shape
        (K, *shape). Parameters are leaves that require gradients if those of ``nets`` do.

    Use them with any one of the networks as the function::

        parameters, buffers = stack(nets)
        def logits(parameters, buffers, images):
            return torch.func.functional_call(nets[0], (parameters, buffers), (images,))
        every = torch.func.vmap(logits, in_dims=(0, 0, None))
        every(parameters, buffers, images)  # (K, N, classes)

    Networks with batch normalisation in training mode update their running statistics as they
    run. Map the stacked buffers along with the parameters, as above, and each network updates its
    own, in place. Their own ``net.buffers()`` cannot stand in for them: ``vmap`` refuses to write K
    results into one buffer.

    Raises:
        ValueError: no networks, or networks of different architecture or mode.
    """
    nets = list(nets)
    if not nets:
        raise ValueError("stack needs at least one network, got none")
    first = nets[0]
    shapes = {name: value.shape for name, value in first.state_dict().items()}
    for number, net in enumerate(nets):
        alike = (
            type(net) is type(first)
            and repr(net) == repr(first)  # layers and their settings, e.g. the activation
            and {name: value.shape for name, value in net.state_dict().items()} == shapes
        )
        if not alike:
            raise ValueError(f"stack needs networks of one architecture: number {number} differs")
        if net.training != first.training:
            raise ValueError(f"stack needs networks in one mode (train or eval): number {number}")
    parameters, buffers = torch.func.stack_module_state(nets)
    return parameters, buffers
