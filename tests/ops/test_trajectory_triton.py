"""Gates of the Triton kernels of `trajectory`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ddfast.reference import trajectory as reference
from ddfast.reference.gradient_distance import accumulator
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import trajectory

    return trajectory


def given(size: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Vectors with NaN behind their ends."""
    wide = accumulator(dtype)

    def vector(kind: torch.dtype) -> torch.Tensor:
        x = poisoned((size + 3,), kind, device)
        x[size:] = float("nan")
        return x[:size]

    lr = torch.tensor(0.3, dtype=wide, device=device)
    return [vector(dtype), vector(dtype), vector(wide), vector(dtype), vector(dtype), lr]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 100, 1023, 1024, 1025, 3000])
def test_error_budget(kernels, triton_device, dtype, size):
    x = given(size, dtype, triton_device)
    three = x[0], x[3], x[4]
    with unchanged(*x):
        found = [*kernels.trajectory(*x), kernels.trajectory_distance(*three)]
    eager = [*reference.trajectory(*x), reference.trajectory_distance(*three)]
    wide = [t.double() for t in x]
    exact = [
        *reference.trajectory(*wide),
        reference.trajectory_distance(*(t.double() for t in three)),
    ]
    assert_within_budget(found, eager, exact)
    again = [*kernels.trajectory(*x), kernels.trajectory_distance(*three)]
    assert_same_bits(found, again)


def test_strides(kernels, triton_device):
    x = [t.repeat_interleave(2)[::2] for t in given(300, torch.float32, triton_device)[:5]]
    lr = torch.tensor(0.3, device=triton_device)
    dense = [t.contiguous() for t in x]
    assert_same_bits(kernels.trajectory(*x, lr), kernels.trajectory(*dense, lr))


def test_empty(kernels, triton_device):
    nothing = torch.empty(0, device=triton_device)
    assert kernels.trajectory_distance(nothing, nothing, nothing).tolist() == [0, 0]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("trajectory", capability)
    assert {k["name"] for k in kernels} == {"trajectory_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
