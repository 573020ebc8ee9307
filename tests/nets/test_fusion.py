"""ConvNet with normalisation, activation and pooling as one operator."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import cross_entropy

from ddfast.nets import Network, build, convnet, fusion

VARIANTS = [
    *(f"{norm}ARAP" for norm in ("IN", "GN", "NN")),
    *(f"IN{activation}AP" for activation in ("AL", "AS", "ASwish")),
    *(f"INAR{pooling}" for pooling in ("MP", "NP")),
]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Every call of the operator, however small the images."""
    seen: list[str] = []
    original = convnet.norm_relu_pool
    monkeypatch.setattr(fusion, "LEAST", 0)
    monkeypatch.setattr(
        convnet, "norm_relu_pool", lambda *a, **k: (seen.append("fused"), original(*a, **k))[1]
    )
    return seen


def network(name: str = "ConvNetD2W8", size=(11, 6)) -> Network:
    net = build(name, 3, 4, size).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)
    return net


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def to_second_order(net: Network, images: Tensor) -> list[Tensor]:
    """Features, gradients, and the gradient of their squares."""
    images = images.clone().requires_grad_()
    leaves = [images, *net.parameters()]
    features = net.embed(images)
    loss = cross_entropy(net.classifier(features), torch.arange(len(images)) % 4)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
    return [features, *first, *second]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_the_layers_compute(variant, calls):
    net, images = network(f"ConvNetD2W8{variant}"), draw(5, 3, 11, 6)
    fused = to_second_order(net, images)
    assert len(calls) == 2
    net.fused = False
    layer_by_layer = to_second_order(net, images)
    assert len(calls) == 2
    torch.testing.assert_close(fused, layer_by_layer, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_features_come_in_the_order_of_the_linear_layer(form, calls):
    net = network(size=(16, 16)).float()
    images = draw(40, 3, 16, 16).float().contiguous(memory_format=form)
    features = net.embed(images)
    net.fused = False
    torch.testing.assert_close(features, net.embed(images), rtol=1e-4, atol=1e-5)
    assert calls


def test_few_values_are_not_worth_it():
    blocks = convnet._blocks(network(size=(8, 8)).features)
    assert blocks is not None
    for images, enough in ((256, False), (257, True)):
        x = torch.zeros(images, 3, 8, 8)
        assert convnet._values(x, blocks[0]) == images * 512
        assert fusion.can_fuse(x, nn.Sequential(), convnet._values(x, blocks[0])) is enough


def test_hooks_see_every_layer(calls):
    seen: list[str] = []
    net, images = network(), draw(2, 3, 11, 6)
    for layer in net.features:
        layer.register_forward_hook(lambda module, *call: seen.append(type(module).__name__))
    net(images)
    assert not calls and seen == ["Conv2d", "GroupNorm", "ReLU", "AvgPool2d"] * 2
    bare = network()
    handle = nn.modules.module.register_module_forward_hook(lambda *call: seen.append("global"))
    try:
        bare(images)
    finally:
        handle.remove()
    assert not calls and seen.count("global") == 11  # eight layers, their chain, classifier and net
    bare(images)
    assert len(calls) == 2


def test_other_layers_are_left_alone(calls):
    for name in ("ConvNetD2W8BN", "ConvNetD2W8LN"):
        network(name)(draw(2, 3, 11, 6))
    net = network()
    net.features[2] = nn.Softplus()
    net(draw(2, 3, 11, 6))
    assert not calls


def test_transforms_and_forward_mode_go_layer_by_layer(calls):
    net, images = network(), draw(2, 3, 11, 6)
    parameters = dict(net.named_parameters())

    def loss(parameters, images):
        return torch.func.functional_call(net, parameters, (images,)).square().sum()

    torch.func.grad(loss)(parameters, images)
    torch.func.vmap(loss, in_dims=(None, 0))(parameters, images[:, None])
    torch.func.jvp(lambda x: loss(parameters, x), (images,), (images,))
    with forward_ad.dual_level():
        out = net(forward_ad.make_dual(images, images))
        assert forward_ad.unpack_dual(out).tangent is not None
    assert not calls
    torch.func.functional_call(net, parameters, (images,))
    assert len(calls) == 2


def test_other_dtypes_devices_and_compilers_go_layer_by_layer(calls):
    net = network()
    copy.deepcopy(net).to(torch.bfloat16)(draw(2, 3, 11, 6).to(torch.bfloat16))
    with torch.no_grad():
        copy.deepcopy(net).to("meta")(torch.empty(2, 3, 11, 6, dtype=torch.float64, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copy.deepcopy(net).float()(draw(2, 3, 11, 6).float())
    torch.compile(net, fullgraph=True, backend="eager")(draw(2, 3, 11, 6))
    assert not calls


@pytest.mark.parametrize("width", [2, 20])
def test_training_does_not_depend_on_it(width, calls):
    """Weights after a few steps, momentum and all."""
    results = []
    for fused in (True, False):
        net = network(f"ConvNetD2W{width}")
        net.fused = fused
        optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for step in range(3):
            optimiser.zero_grad()
            cross_entropy(net(draw(6, 3, 11, 6, seed=step)), torch.arange(6) % 4).backward()
            optimiser.step()
        results.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    assert len(calls) == 6
