"""Memory budgets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.losses import gradient_distance
from ddfast.memory import (
    FIRST_ORDER,
    FORWARD,
    SECOND_ORDER,
    activation_bytes,
    images_at_once,
    parse_memory,
    peak_resident,
)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("8GiB", 8 << 30), ("8gib", 8 << 30), ("2G", 2 << 30), ("500MB", 500_000_000),
        ("1.5 KiB", 1536), ("100", 100), ("100B", 100), (12345, 12345), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_amounts(text, amount) -> None:
    assert parse_memory(text) == amount


@pytest.mark.parametrize("text", ["", "lots", "-1", "0", "8XB", "8 Gi B", 0, -5, True, None, "1e9"])
def test_no_amounts(text) -> None:
    with pytest.raises(ValueError, match="memory: got"):
        parse_memory(text)


def test_activations_of_a_network_worked_out_by_hand() -> None:
    net = nets.build("ConvNetD2W4", 3, 10, 8)
    # Per block convolution, norm and ReLU leave a plane each, pooling a quarter; then the logits.
    values = 4 * 64 * 3 + 4 * 16 + 4 * 16 * 3 + 4 * 4 + 10
    assert activation_bytes(net, (3, 8, 8)) == 4 * (values + 2 * 3 * 64)
    assert activation_bytes(net.double(), (3, 8, 8)) == 8 * (values + 2 * 3 * 64)


def test_images_at_once() -> None:
    assert images_at_once(10, 60, 2.0) == 3
    assert images_at_once(10, 59, 2.0) == 2
    with pytest.raises(ValueError, match=r"memory: the budget of 9 bytes .* one image needs 10"):
        images_at_once(10, 9, 1.0)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once by `work`, as the profiler saw them."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = most = 0
    for _, size in sizes:
        total += size
        most = max(most, total)
    return most


@pytest.mark.parametrize("name", ["ConvNetD2W16", "ConvNetD2W16BN", "ConvNetD2W16ASwish", "MLP"])
def test_passes_stay_within_what_is_reckoned(name) -> None:
    n, shape = 64, (3, 16, 16)
    net = nets.build(name, shape[0], 10, shape[1])
    each = activation_bytes(net, shape)
    weights = [p for p in net.parameters() if p.dim() > 1]
    fixed = 4 * sum(p.numel() * p.element_size() for p in net.parameters())  # some gradients
    x, y = torch.zeros(n, *shape), torch.zeros(n, dtype=torch.long)
    real = [torch.ones_like(w) for w in weights]

    def forward() -> None:
        with torch.no_grad():
            net.embed(x)

    def first_order() -> None:
        images = x.clone().requires_grad_()
        torch.autograd.grad(net.embed(images).square().sum(), images)

    def second_order() -> None:
        images = x.clone().requires_grad_()
        syn = torch.autograd.grad(cross_entropy(net(images), y), weights, create_graph=True)
        torch.autograd.grad(gradient_distance(syn, real), images)

    for work, cost in (
        (forward, FORWARD),
        (first_order, FIRST_ORDER),
        (second_order, SECOND_ORDER),
    ):
        used = peak(work)
        assert 0.02 * n * each < used <= cost * n * each + fixed


def test_the_peak_is_of_this_process_alone() -> None:
    """A small process started by a large one."""
    filled = bytearray(400 << 20)
    filled[::4096] = b"x" * len(filled[::4096])
    code = "from ddfast.memory import peak_resident; print(peak_resident())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = peak_resident()
    assert own >= len(filled)
    assert 10 << 20 < int(done.stdout) < own
