"""Kernels by name, such as "ntk-fc3": what `kernel_matrix` is to be called with."""

from __future__ import annotations

import re
from typing import Any

from ddfast.kernel_matrix.networks import PRESETS, checked_depth
from ddfast.reference.dense_kernel import KINDS

CONVENTION = (
    "KIND-NETWORK with KIND ntk or nngp and NETWORK fc or conv and a depth, such as ntk-fc3 or "
    "nngp-conv3 (conv3-gap: averaged over positions; conv3-nopool: without pools), or one of "
    f"{', '.join(PRESETS)}"
)


def kernel_options(name: str) -> dict[str, Any]:
    """The arguments that a name stands for, see `kernel_matrix`.

    `KIND-NETWORK`: ntk or nngp; `fcL`, `convL`, `convL-gap`, `convL-nopool`, `convL-nopool-gap`
    with L layers; or a network with layers of its own, such as `kip_convnet` or `myrtle5`.

    Args:
        name: such as "ntk-fc3" or "nngp-conv3-gap".

    Returns:
        kind and net; of fc the depth, too; of conv depth, pool and readout.

    Raises:
        TypeError, ValueError: no such name.
    """
    if not isinstance(name, str):
        raise TypeError(f"kernel: got {name!r}, expected a name, {CONVENTION}")
    kind, _, net = name.partition("-")
    found = re.fullmatch(r"(fc|conv)(\d+)((?:-nopool)?)((?:-gap)?)", net)
    if kind in KINDS and net in PRESETS:
        return {"kind": kind, "net": net}
    if kind not in KINDS or not found or (found[1] == "fc" and (found[3] or found[4])):
        raise ValueError(f"kernel: got {name!r}, expected {CONVENTION}")
    options: dict[str, Any] = {"kind": kind, "net": found[1]}
    options["depth"] = checked_depth(int(found[2]), found[1])
    if found[1] == "conv":
        options |= {"pool": not found[3], "readout": "gap" if found[4] else "flatten"}
    return options
