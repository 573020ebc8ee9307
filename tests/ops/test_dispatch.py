"""What is registered for CUDA tensors, called without a GPU: it must hand over to Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, because what `declare` registers is caught while ddfast is imported.
CODE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import contextlib
import torch

registered = {}
implement = torch.library.Library.impl

def caught(self, name, function, key="", **options):
    registered[name, key] = function
    return implement(self, name, function, key, **options)

torch.library.Library.impl = caught
import ddfast
import ddfast.ops.characteristic_function
import ddfast.ops.class_weight_grad
import ddfast.ops.dense_kernel
import ddfast.ops.first_block
import ddfast.ops.krr
import ddfast.ops.mmd
import ddfast.ops.multi_formation
import ddfast.ops.trajectory
from ddfast import backend
from ddfast.testing import flatten

torch.cuda.device = lambda device: contextlib.nullcontext()
asked = []
find = backend.triton_kernels
backend.triton_kernels = lambda module: (asked.append(module), find(module))[1]

syn, real = ([torch.linspace(-1, top, 12).reshape(3, 4)] for top in (1, 2))
cubes = [syn[0].reshape(3, 2, 2), real[0].reshape(3, 2, 2)]
grad, images = torch.ones(1), torch.linspace(-1, 1, 150).reshape(2, 3, 5, 5)
draw = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)  # crop
weight, by_out = torch.linspace(-1, 1, 108).reshape(2, 2, 3, 3, 3), images[:, :2]
pooled, block = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2), ("relu", "average")
statistics = torch.zeros(2, 3), torch.ones(2, 3)
common = (syn, real, "row_cosine", 1e-6, False)
calls = {
    "gradient_distance": (*common, True),
    "gradient_distance_bwd": (grad, *common, True, True),
    "gradient_distance_bwd_bwd": (syn, real, grad, *common),
    "characteristic_function": (*cubes, 2, 0, 1.0, 0, True),
    "characteristic_function_bwd": (
        torch.linspace(-1, 1, 12).reshape(3, 2, 2), *cubes, torch.empty(0), 2, 0, 1.0, 0, True, True
    ),
    "class_mean": (syn[0], [2, 1]),
    "class_mean_distance": (syn[0], real[0], [2, 1], [1, 2]),
    "augment": (images, draw, False, True),
    "augment_adjoint": (images, draw, False),
    "class_conv": (images, weight, [1, 1], 1, "auto"),
    "class_input_grad": (by_out, weight, [1, 1], [5, 5], 1, "auto"),
    "class_weight_grad": (images, by_out, [1, 1], [3, 3], 1, "auto"),
    "dense_kernel": (syn[0], real[0], "ntk", 2, 2.0, 0.01, True),
    "dense_kernel_bwd": (
        torch.linspace(-1, 1, 9).reshape(3, 3), syn[0], real[0],
        torch.tensor(0.5) * syn[0] @ real[0].T + 0.01, "ntk", 2, 2.0, 0.01, True, True
    ),
    "mmd": (*cubes, torch.ones(3, 2), "gaussian", 2, False, True, True),
    "mmd_bwd": (torch.ones(3), *cubes, torch.ones(3, 2), "laplace", 2, True, True, True),
    "multi_formation": (images, 2, "crop", 0.5),
    "multi_formation_adjoint": (images.repeat(2, 1, 1, 1), 2, "image"),
    "norm_relu_pool": (images, None, None, 3, 1e-5, *block),
    "norm_relu_pool_bwd": (pooled, images, None, None, *statistics, 3, *block),
    "norm_relu_pool_tangent": (images, images.cos(), *(None,) * 4, *statistics, 3, *block),
    "norm_relu_pool_tangent_bwd": (
        pooled, None, images, images.cos(), *(None,) * 4, *statistics, 3, *block
    ),
    "trajectory": (*(syn[0].flatten() * k for k in (1, 2, 3, 4, 5)), torch.tensor(0.1)),
    "trajectory_distance": tuple(syn[0].flatten() * k for k in (1, 2, 3)),
    "norm_relu_pool_means": (images, None, None, [1, 1], 3, 1e-5, *block),
}
blocks = {  # made of the operators above on CUDA
    "first_block": (images, weight[0], None, None, None, 1, 2, 1e-5, *block),
    "first_block_bwd": (
        pooled[:, :2], images, weight[0], None, None, None,
        statistics[0][:, :2], statistics[1][:, :2], [1, 1], 1, 2, *block
    ),
}
for name, arguments in (calls | blocks).items():
    on_cuda, on_cpu = (flatten(registered[name, key](*arguments)) for key in ("CUDA", "CPU"))
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-5, atol=1e-6)
assert len(asked) == len(calls) + len(blocks), asked
with ddfast.use_backend("reference"):
    registered["augment", "CUDA"](*calls["augment"])
assert len(asked) == len(calls) + len(blocks), "the reference was forced, yet Triton was asked"
rest = {name for name, key in registered if key == "CUDA"} - set(calls) - set(blocks)
print(sorted(rest))
"""


def test_the_cuda_key_hands_over_to_triton():
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The reference answers: closed forms, LAPACK's work and a selection, without kernels of ours.
    own = "['class_mean_bwd', 'krr', 'krr_bwd', 'mmd_bandwidth']"
    assert done.stdout.split("\n")[0] == own
