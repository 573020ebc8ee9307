"""Networks in a stack: how many, and logits and gradients against each network alone."""

from __future__ import annotations

import pytest
import torch

from ddfast import nets
from ddfast.evaluate import Protocol, side_by_side
from ddfast.evaluate.stacked import can_stack, stacked_logits
from ddfast.nets import fusion


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_stack_follows_the_rule():
    images = torch.zeros(1, 100, 1, 8, 8)
    chosen = Protocol("dm", 1)

    def stack(name, at_once=None, images=images, networks=30) -> int:
        net = nets.build(name, images.shape[2], 3, tuple(images.shape[3:]))
        batch = min(chosen.batch, images.shape[1])
        return side_by_side.stack_size(net, images.shape[2:], batch, at_once, networks)

    assert stack("ConvNetD2W32") == side_by_side.STACKED_FLOATS // (100 * 32 * 64) == 5
    assert stack("ConvNetD2W16") == side_by_side.MOST_STACKED == 8
    assert stack("ConvNetD2W16", networks=5) == 3
    assert stack("ConvNetD2W16", networks=1) == 1
    assert stack("ConvNetD2W16", 3) == 3
    assert stack("ConvNetD2W16", 1) == 0
    assert stack("ConvNetD2W16BN") == stack("ConvNetD2W16BN", 4) == 0
    assert stack("ConvNetD2W128", images=torch.zeros(1, 256, 1, 16, 16)) == 1
    assert stack("ConvNetD2W16", images=torch.zeros(1, 10, 3, 32, 32)) == 0
    assert can_stack(nets.build("AlexNet", 1, 3, 8))
    assert not can_stack(nets.build("ResNet18", 1, 3, 8))


@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("ConvNetD3W4", 1, 8),
        ("ConvNetD2W4", 3, 16),
        ("ConvNetD2W8GN", 4, 10),
        ("ConvNetD2W4NNALMP", 2, 9),
        ("ConvNetD1W4ASNP", 1, 28),
        ("ConvNetD2W4", 3, 20),
        ("ConvNetD2W4", 2, (8, 4)),
        ("AlexNet", 1, (8, 9)),
        ("MLP", 2, 5),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_stacked_logits_and_gradients_are_each_network_s(name, channels, side, fused, monkeypatch):
    monkeypatch.setattr(fusion, "LEAST", 0 if fused else 1 << 60)
    g = torch.Generator().manual_seed(1)
    group = [nets.build(name, channels, 4, side, g).double() for _ in range(3)]
    with torch.no_grad():
        for net in group:  # affine parameters away from 1 and 0
            for value in net.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=g, dtype=torch.float64))
    parameters, _ = nets.stack(group)
    size = (side, side) if isinstance(side, int) else side
    images = torch.randn((3, 5, channels, *size), generator=g, dtype=torch.float64)
    cotangent = torch.randn((3, 5, 4), generator=g, dtype=torch.float64)
    logits = stacked_logits(group[0], parameters, images)
    found = torch.autograd.grad(logits, list(parameters.values()), cotangent)
    for k, net in enumerate(group):
        net.fused = False
        wanted = net(images[k])
        torch.testing.assert_close(logits[k], wanted, rtol=1e-10, atol=1e-11)
        gradients = torch.autograd.grad(wanted, list(net.parameters()), cotangent[k])
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours[k], theirs, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="ResNet18"):
        stacked_logits(nets.build("ResNet18", 1, 3, 8), {}, torch.zeros(1, 1, 1, 8, 8))
