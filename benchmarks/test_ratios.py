"""Guards: some operators stay so many times as fast as plain PyTorch; `make bench-check`.

They depend on what else the machine does, so that `make test` does not collect them. A guard fails
only if the whole 95 % interval of the ratio lies below what it demands, which is about half of what
was measured when it was written.
"""

from __future__ import annotations

import pytest

from ddfast.bench import SIZES, Options
from ddfast.bench.measure import measure
from ddfast.bench.registry import cases_of

# Benchmark, operator, mode, and the least ratio to the eager baseline with one thread.
GUARDS = [
    ("gradient_distance", "gradient_distance", "backward", 2.0),
    ("norm_relu_pool", "norm_relu_pool", "backward", 4.0),
    ("mmd", "mmd", "backward", 1.2),
    ("kernel_matrix", "conv_kernel", "forward", 40.0),
]


@pytest.mark.parametrize(("name", "operator", "mode", "least"), GUARDS)
def test_as_fast_as_it_was(benchmark, name, operator, mode, least):
    options = Options(no_compile=True, modes=(mode,))
    cases = cases_of(name, SIZES["cifar10"], options)
    case = next(case for case in cases if (case.operator, case.mode) == (operator, mode))
    rows = {row["provider"]: row for row in measure(case)}
    ours = rows["ddfast"]
    benchmark.extra_info |= {n: ours[n] for n in ("ratio_to_eager", "ratio_low", "ratio_high")}
    benchmark.pedantic(case.providers["ddfast"], rounds=5)
    assert ours["verified"] == "yes"
    assert ours["ratio_high"] >= least, f"{ours['ratio_to_eager']} times as fast, expected {least}"
