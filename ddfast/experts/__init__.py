"""Expert trajectories: the parameters of networks trained on the real data, epoch by epoch.

What MTT, TESLA, FTD and DATM match. `ddfast.experts.train` makes them, `ddfast experts` on the
command line; `ddfast.experts.importer` reads those of the official scripts.
"""

from __future__ import annotations

from ddfast.experts.file import EXPERTS, Experts, check_experts, open_experts

__all__ = ["EXPERTS", "Experts", "check_experts", "open_experts"]
