"""The engine on networks that are not ConvNets, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddfast import engine, nets
from ddfast.engine import gradients
from ddfast.memory import FIRST_ORDER, SECOND_ORDER, activation_bytes

COUNTS = [2, 0, 3, 1]


class Residual(nn.Module):
    """Strides, batch normalisation and a skip connection, as in ResNets, but small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + torch.relu(self.inner(x))).mean((2, 3)))


def network(name: str, size: tuple[int, int] = (8, 8)) -> nn.Module:
    random = torch.Generator().manual_seed(5)
    if name == "Residual":
        with torch.device("meta"):
            net = Residual()
        net = net.to_empty(device="cpu").double()
        nets.initialise(net, random)
    else:
        net = nets.build(name, 3, 4, size, random).double()
    if nets.has_batchnorm(net):  # the frozen-statistics rule: one pass, then evaluation mode
        net(torch.randn(16, 3, *size, generator=torch.Generator().manual_seed(6)).double())
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    return net


@pytest.mark.parametrize("name", ["MLP", "Residual", "ConvNetD2W8BN", "ConvNetD2W8LN", "LeNet"])
@pytest.mark.parametrize("at_once", [None, 2])
def test_equals_double_backward(engine_tools, name, at_once) -> None:
    size = (32, 32) if name == "LeNet" else (8, 8)
    net = network(name, size)
    images, labels = engine_tools.batch(COUNTS, (3, *size))
    names = engine.weight_names(net)
    memory = None
    if at_once:
        memory = int(at_once * SECOND_ORDER * activation_bytes(net, (3, *size))) + 1
        assert int(memory // (FIRST_ORDER * activation_bytes(net, (3, *size)))) >= at_once
    found = engine.segment_gradients(net, images, labels, COUNTS, names, memory)
    exact = engine_tools.class_loop(net, images, labels, COUNTS, names)
    for ours, theirs in zip(found, exact, strict=True):
        assert engine_tools.relative(ours, theirs) < 1e-10
    real = engine_tools.real_gradients(net, names, 4)
    losses, gradient = engine.match_gradients(net, images, labels, COUNTS, real, memory=memory)
    exact_losses, expected = engine_tools.double_backward(net, images, labels, COUNTS, real, names)
    assert engine_tools.relative(losses, exact_losses) < 1e-10
    assert engine_tools.relative(gradient, expected) < 1e-10


def test_a_layer_that_the_loss_does_not_reach_has_zeros(engine_tools) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            random = torch.Generator().manual_seed(1)
            self.used, self.idle = (
                nn.Parameter(torch.randn(4, 12, generator=random).double()) for _ in range(2)
            )

        def forward(self, x):
            return x.flatten(1) @ self.used.T

    net = Idle()
    images, labels = engine_tools.batch([2, 1, 1, 1], (3, 2, 2))
    found = engine.class_gradients(net, images, labels, 4)
    assert found[0].abs().max() > 0 and not found[1].any()
    real = [g + 1 for g in found]
    losses, gradient = engine.match_gradients(
        net, images, labels, [2, 1, 1, 1], real, engine.weight_names(net, "all"), "mse"
    )
    assert torch.isfinite(losses).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["ConvNetD2W8", "MLP"])
def test_the_network_is_left_alone(engine_tools, name) -> None:
    net = network(name).requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    images, labels = engine_tools.batch([2, 2])
    kept = images.clone()
    real = engine.segment_gradients(net, images, labels, [2, 2], engine.weight_names(net))
    images.requires_grad_()
    losses, gradient = engine.match_gradients(net, images, labels, [2, 2], [2 * g for g in real])
    assert not losses.requires_grad and not gradient.requires_grad and images.grad is None
    assert gradient.abs().max() > 0
    assert torch.equal(images, kept)
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None and not p.requires_grad


def test_classes_without_images_and_labels_in_any_order(engine_tools) -> None:
    for name in ("ConvNetD2W8", "MLP"):
        net = network(name)
        images, _ = engine_tools.batch([6])
        labels = torch.tensor([3, 0, 3, 1, 0, 3])
        found = engine.class_gradients(net, images, labels, 5)
        for c in range(5):
            mine = images[labels == c]
            if not len(mine):
                assert all(not g[c].any() for g in found)
                continue
            names = engine.weight_names(net, "all")
            one = engine_tools.class_loop(net, mine, labels[labels == c], [len(mine)], names)
            for g, expected in zip(found, one, strict=True):
                torch.testing.assert_close(g[c], expected[0], rtol=1e-9, atol=1e-13)
        empty = engine.class_gradients(net, images[:0], labels[:0], 2)
        assert all(not g.any() for g in empty)


def test_convnets_are_recognised_and_others_are_not() -> None:
    assert gradients.recognise(network("ConvNetD2W8")) is not None
    for name in ("ConvNetD2W8BN", "ConvNetD2W8LN", "MLP"):
        assert gradients.recognise(network(name)) is None
    hooked = network("ConvNetD2W8")
    hooked.features[0].register_forward_hook(lambda *_: None)
    assert gradients.recognise(hooked) is None
    assert gradients.recognise(network("ConvNetD2W8").bfloat16()) is None


def test_what_is_wrong_is_named(engine_tools) -> None:
    net = network("ConvNetD2W8")
    images, labels = engine_tools.batch([2, 2])
    names = engine.weight_names(net)
    real = engine_tools.real_gradients(net, names, 2)

    def refused(match: str, error=ValueError, **changes) -> None:
        arguments = {
            "net": net,
            "images": images,
            "labels": labels,
            "counts": [2, 2],
            "real": real,
        } | changes
        with pytest.raises(error, match=match):
            engine.match_gradients(**arguments)

    refused("images: expected a floating", TypeError, images=images.long())
    refused(r"images: got torch.float32 on cpu, expected torch.float64", images=images.float())
    refused("labels: expected", TypeError, labels=labels.double())
    refused("labels: got 3, expected 4", labels=labels[:3])
    refused("labels: got -1", labels=labels - 1)
    refused("labels: got 11, .* 4 classes", labels=labels + 10)
    refused(r"counts: got \[2, 1\]", counts=[2, 1])
    refused(r"counts: got \[5, -1\]", counts=[5, -1])
    refused("real: got 1 tensors", real=real[:1])
    refused(r"real: got .* for features.0.weight", real=[real[0][:1], *real[1:]])
    refused("names: got .*nothing", names=("nothing",))
    refused("names: got none", names=())
    refused("metric: got 'far'", metric="far", names=names)
    refused("path: got 'fast'", path="fast")
    refused("algorithm: got 'fft'", algorithm="fft")
    refused("graph: CUDA graphs need tensors on a GPU", graph=True)
    refused("graph: only the fused path", graph=True, path="general")
    refused("memory: the budget of 10 bytes is too small", memory=10)
    refused("path: 'fused' cannot serve", net=network("ConvNetD2W8LN"), path="fused", names=names)
    refused("batch normalisation .* is in training mode", net=network("ConvNetD2W8BN").train())
    refused("dropout .* is in training mode", net=nn.Sequential(nn.Dropout(), net))
    with pytest.raises(ValueError, match="num_classes: got 1, and the largest label is 1"):
        engine.class_gradients(net, images, labels, 1)
    with pytest.raises(ValueError, match="weights: got shape"):
        engine.segment_gradients(net, images, labels, [2, 2], weights=torch.ones(3))
    with pytest.raises(ValueError, match="kind: got 'dense'"):
        engine.weight_names(net, "dense")
    with pytest.raises(ValueError, match="has no parameters of kind 'conv'"):
        engine.weight_names(network("MLP"), "conv")
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: engine.match_gradients(net, x, labels, [2, 2], real)[0].sum())(
            images
        )
