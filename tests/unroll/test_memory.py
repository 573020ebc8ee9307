"""What an unrolled student takes: whatever the steps, as predicted, and refused beforehand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ddfast import methods, nets
from ddfast.data import generated
from ddfast.methods import dd, linba
from ddfast.unroll import SGD, Adam, estimate_memory, fitting

MEBIBYTE = 2**20

PROGRAM = """
import json, sys
import torch
from ddfast import nets
from ddfast.memory import peak_resident
from ddfast.unroll import unroll

adjoint, steps, model = json.loads(sys.argv[1])
torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
net = nets.build(model, 3, 10, (32, 32), random)
start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
images = torch.randn(100, 3, 32, 32, generator=random).requires_grad_()
lr = torch.tensor(0.01, requires_grad=True)
rows = torch.arange(100)
before = peak_resident()
loss = unroll(
    net, start, images, rows % 10, lr, [rows] * steps, lambda t: (t - start).square().sum(), adjoint
)
gradient, _ = torch.autograd.grad(loss, [images, lr])
assert gradient.abs().max() > 0
print(json.dumps([before, peak_resident()]))
"""


def peak(adjoint: str, steps: int, model: str = "ConvNetW32") -> int:
    """Bytes over what was there before, in a process that does nothing else."""
    call = [sys.executable, "-c", PROGRAM, json.dumps([adjoint, steps, model])]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    return after - before


@pytest.mark.parametrize("adjoint", ["exact", "frozen"])
def test_peak_memory_does_not_depend_on_the_steps(adjoint):
    few, many = peak(adjoint, 5), peak(adjoint, 50)
    history = (
        45 * 4 * sum(p.numel() for p in nets.build("ConvNetW32", 3, 10, (32, 32)).parameters())
    )
    assert many <= 1.1 * few + history


@pytest.mark.parametrize(("adjoint", "steps"), [("exact", 10), ("frozen", 40), ("graph", 4)])
def test_the_prediction_is_within_15_per_cent(adjoint, steps):
    net = nets.build("ConvNetW64", 3, 10, (32, 32))
    found = estimate_memory(net, (3, 32, 32), 100, steps, adjoint)
    assert found == pytest.approx(peak(adjoint, steps, "ConvNetW64"), rel=0.15)


def test_what_counts_in_the_history():
    net = nets.build("ConvNetW32", 3, 10, (32, 32))
    vector = 4 * sum(p.numel() for p in net.parameters())

    def of(steps: int, **options) -> int:
        return estimate_memory(net, (3, 32, 32), 10, steps, **options)

    assert of(110) - of(10) == 100 * vector
    momentum = {"optimiser": SGD(0.9)}
    assert of(110, **momentum) - of(10, **momentum) == 200 * vector
    fixed = {"optimiser": SGD(0.9), "learns_lr": False}
    assert of(110, **fixed) - of(10, **fixed) == 100 * vector
    adam = {"optimiser": Adam()}
    assert of(110, **adam) - of(10, **adam) == 400 * vector
    assert of(110, window=10) == of(10)
    assert of(100, history="checkpoints") == of(20)
    with pytest.raises(ValueError, match="adjoint: got 'exakt'"):
        of(1, adjoint="exakt")
    with pytest.raises(ValueError, match="history: got 'disk'"):
        of(1, history="disk")


def test_advice_where_it_does_not_fit():
    net = nets.build("ConvNet", 3, 10, (32, 32))
    call = (net, (3, 32, 32), 100, 20)
    assert fitting(8 << 30, *call, adjoint="graph") == ""
    said = fitting(1 << 30, *call, adjoint="graph")
    assert "20 steps need about 3.7 GiB, and 1.0 GiB are given; --memory 3" in said
    assert "or adjoint exact, which needs 2" in said
    said = fitting(320 * MEBIBYTE, net, (3, 32, 32), 100, 1000)
    assert "history checkpoints" in said
    assert "fewer steps" in fitting(32 * MEBIBYTE, net, (3, 32, 32), 100, 1000)


def test_other_networks_are_predicted_through_their_activations():
    net = nets.build("MLP", 3, 10, (32, 32))
    assert estimate_memory(net, (3, 32, 32), 100, 10) > 0
    graph = estimate_memory(net, (3, 32, 32), 100, 100, "graph")
    assert graph > estimate_memory(net, (3, 32, 32), 100, 10, "graph")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (dd, {"ipc": 1, "distill_epochs": 200}),
        (linba, {"ipc": 1, "inner_steps": 200, "shared": 2}),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_it_starts(method, settings):
    dataset = generated(classes=10, size=32, train_per_class=4, test_per_class=1)
    config = methods.resolve(method.Config(adjoint="graph", **settings), dataset)
    run = methods.start(config, dataset, 64 * MEBIBYTE, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"memory: the student's 200 steps need about .* GiB"):
        method.check(run)
