"""A loss of a student after some optimiser steps, differentiable in what it was trained on.

    loss = unroll(net, start, images, labels, lr, batches, loss_fn, adjoint="exact")

One function for every bilevel method: trajectory matching (MTT, TESLA), and those that minimise a
loss of the student on real data (DD, LinBa, RaT-BPTT). The exact gradient needs the parameters of
every step and the activations of a part of one step, however many steps there are.
"""

from __future__ import annotations

from ddfast.unroll.arguments import ADJOINTS
from ddfast.unroll.memory import estimate_memory, fitting
from ddfast.unroll.optimisers import SGD, Adam, Optimiser
from ddfast.unroll.reverse import final_parameters, unroll

__all__ = [
    "ADJOINTS",
    "SGD",
    "Adam",
    "Optimiser",
    "estimate_memory",
    "final_parameters",
    "fitting",
    "unroll",
]
