"""What the networks compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddfast.nets import build, has_batchnorm, names
from ddfast.nets.resnet import ResNet18


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def shaken(name: str, channels: int, classes: int, size: int | tuple[int, int]) -> nn.Module:
    """A float64 network whose normalisations, too, have parameters that are not 0 and 1."""
    net = build(name, channels, classes, size, generator(1)).double()
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=number + 10))
    return net


def standardised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    variance = x.var(dims, unbiased=False, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) / (variance + 1e-5).sqrt()


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "IN": lambda x: standardised(x, (2, 3)),
    "BN": lambda x: standardised(x, (0, 2, 3)),
    "LN": lambda x: standardised(x, (1, 2, 3)),
    "GN": lambda x: standardised(x.unflatten(1, (4, -1)), (2, 3, 4)).flatten(1, 2),
    "NN": lambda x: x,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "AR": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "AL": lambda x: torch.where(x > 0, x, 0.01 * x),
    "AS": lambda x: 1 / (1 + torch.exp(-x)),
    "ASwish": lambda x: x / (1 + torch.exp(-x)),
}
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "AP": lambda x: windows(x).mean(-1),
    "MP": lambda x: windows(x).amax(-1),
    "NP": lambda x: x,
}
VARIANTS = [
    *(f"{norm}ARAP" for norm in NORMS),
    *(f"IN{activation}AP" for activation in ("AL", "AS", "ASwish")),
    *(f"INAR{pooling}" for pooling in ("MP", "NP")),
]


def windows(x: Tensor) -> Tensor:
    """2x2 windows, (N, C, H // 2, W // 2, 4); a last odd row or column is dropped."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("channels", "size", "padding"), [(3, (11, 6), 1), (1, (28, 28), 3), (1, (8, 8), 1)]
)
def test_convnet_against_its_definition(
    variant: str, channels: int, size: tuple[int, int], padding: int
) -> None:
    net = shaken(f"ConvNetD2W8{variant}", channels, 3, size)
    parameters = [p.detach() for p in net.parameters()]
    images = randn(4, channels, *size)
    x = images
    for block in range(2):
        x = F.conv2d(x, parameters.pop(0), parameters.pop(0), padding=1 if block else padding)
        x = NORMS[variant[:2]](x)
        if variant[:2] != "NN":
            weight, bias = parameters.pop(0), parameters.pop(0)
            if weight.dim() == 1:
                weight, bias = weight[:, None, None], bias[:, None, None]
            x = x * weight + bias
        x = POOLINGS[variant[-2:]](ACTIVATIONS[variant[2:-2]](x))
    x = x.reshape(4, -1)
    torch.testing.assert_close(net.embed(images), x, rtol=1e-10, atol=1e-10)
    weight, bias = parameters
    torch.testing.assert_close(net(images), x @ weight.T + bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 28)])
def test_a_convolution_in_front_has_no_pooling(channels: int, side: int) -> None:
    net = shaken("ConvNetD2W8NNPC", channels, 3, (side, side))
    *parameters, _, _ = (p.detach() for p in net.parameters())
    images = randn(4, channels, side, side)
    x = images
    for pool in (False, True, True):
        margin = 3 if x is images and side == 28 else 1
        x = F.conv2d(x, parameters.pop(0), parameters.pop(0), padding=margin).relu()
        x = F.avg_pool2d(x, 2) if pool else x
    assert not parameters
    torch.testing.assert_close(net.embed(images), x.flatten(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize(("channels", "size"), [(3, (35, 44)), (1, (28, 28))])
def test_logits_are_one_linear_layer_on_the_embedding(
    name: str, channels: int, size: tuple[int, int]
) -> None:
    net = build(name, channels, 7, size).eval()
    images = torch.randn(2, channels, *size, generator=generator())
    with torch.no_grad():
        features = net.embed(images)
        logits = net(images)
        assert features.shape == (2, net.classifier.in_features)
        assert logits.shape == (2, 7)
        assert torch.equal(logits, features @ net.classifier.weight.T + net.classifier.bias) or (
            torch.allclose(logits, F.linear(features, net.classifier.weight, net.classifier.bias))
        )
        assert list(net.parameters())[-2] is net.classifier.weight
        # A network that sees its input answers differently for different images.
        assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["ResNet18", "ResNet18BN", "ResNet18_AP", "ResNet18BN_AP"])
@pytest.mark.parametrize("size", [(8, 8), (2, 15)])
def test_resnet_still_sees_small_images(name: str, size: tuple[int, int]) -> None:
    net = build(name, 1, 4, size)
    with torch.device("meta"):
        reference = ResNet18(
            1, 4, (32, 32), "batchnorm" if "BN" in name else "instancenorm", "AP" in name
        )
    for (key, value), (other, official) in zip(
        net.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert key == other
        assert value.shape == official.shape or key == "classifier.weight"
    images = torch.randn(6, 1, *size, generator=generator())
    features = net.embed(images)
    assert features.std(0).mean() > 0.05  # 0 if the last planes were single pixels


@pytest.mark.parametrize("name", ["ResNet18", "ResNet18_AP"])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (28, 28), (40, 64)])
def test_resnet_planes_of_larger_images(name: str, size: tuple[int, int]) -> None:
    planes = []
    with torch.device("meta"):  # shapes only
        net = ResNet18(3, 2, size, average=name == "ResNet18_AP")
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda *call: planes.append(tuple(call[2].shape[1:])))
    with torch.no_grad():
        net(torch.zeros(1, 3, *size, device="meta"))
    height, width = size
    expected = []
    for channels in (64, 128, 256, 512):
        expected.append((channels, height, width))
        if name == "ResNet18":
            height, width = -(-height // 2), -(-width // 2)
        else:
            height, width = height // 2, width // 2
    assert planes == expected


def test_resnet_features_grow_with_the_image() -> None:
    with torch.device("meta"):  # shapes only
        for size, pooled, not_pooled in (
            ((28, 28), (1, 1), (3, 3)),
            ((32, 32), (1, 1), (4, 4)),
            ((64, 96), (2, 3), (8, 12)),
            ((224, 224), (7, 7), (28, 28)),
        ):
            for average, plane in ((False, pooled), (True, not_pooled)):
                net = ResNet18(3, 2, size, average=average)
                assert net.classifier.in_features == 512 * plane[0] * plane[1]
                if size[0] < 100:
                    assert net(torch.zeros(1, 3, *size)).shape == (1, 2)


@pytest.mark.parametrize("name", ["ConvNetD2W8", "ConvNetD2W8LN", "ConvNetD2W8GN", "ConvNetD2W8NN"])
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    net = shaken(name, 3, 4, 9)
    images = randn(5, 3, 9, 9).requires_grad_()
    together = net(images)
    for number in range(5):
        alone = net(images[number : number + 1])[0]
        torch.testing.assert_close(together[number], alone, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(together[number].sum(), images, retain_graph=True)
        assert all((gradient[other] == 0).all() for other in range(5) if other != number)
        assert (gradient[number] != 0).any()


def test_with_batchnorm_it_does_in_training_only() -> None:
    net = shaken("ConvNetD2W8BN", 3, 4, 9)
    images = randn(5, 3, 9, 9).requires_grad_()
    for training in (True, False):
        net.train(training)
        (gradient,) = torch.autograd.grad(net(images)[0].sum(), images)
        assert bool((gradient[1:] != 0).any()) is training


def test_has_batchnorm() -> None:
    with_batchnorm = {name for name in names() if has_batchnorm(build(name, 3, 2, 32))}
    assert with_batchnorm == {
        "FRePoNet",
        "AlexNetBN",
        "VGG11BN",
        "ResNet18BN",
        "ResNet18BN_AP",
        "ResNetAP10BN",
    }
    assert has_batchnorm(build("ConvNetASwishBN", 3, 2, 32))
    assert not has_batchnorm(build("ConvNetLN", 3, 2, 32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives(variant: str) -> None:
    net = shaken(f"ConvNetD1W4{variant}", 1, 2, (3, 4))
    keys = [key for key, _ in net.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in net.parameters()]

    def logits(images: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(net, dict(zip(keys, parameters, strict=True)), (images,))

    images = randn(2, 1, 3, 4, seed=3).requires_grad_()
    with torch.random.fork_rng():  # the checks draw from the global generator
        assert torch.autograd.gradcheck(logits, (images, *values))
        assert torch.autograd.gradgradcheck(logits, (images, *values))


@pytest.mark.parametrize("name", ["LeNet", "ResNet18BN_AP"])
def test_gradient_of_a_gradient_in_one_direction(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distillation gradient, d/dx of a function of dloss/dw, against a central difference."""
    for module in ("classic", "resnet"):  # smooth, so that no difference steps over a kink
        monkeypatch.setattr(f"ddfast.nets.{module}.relu", F.softplus)
    side = 16 if name == "LeNet" else 6
    net = build(name, 1, 3, side, generator(4)).double()
    if name == "LeNet":
        net.features[1] = net.features[4] = nn.Softplus()
    labels = torch.tensor([0, 2, 1])
    images, direction = randn(3, 1, side, side), randn(3, 1, side, side, seed=1)
    weights = [p for p in net.parameters() if p.dim() > 1]

    def matched(images: Tensor, create_graph: bool = False) -> Tensor:
        loss = F.cross_entropy(net(images), labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=create_graph)
        return torch.stack(
            [(g * torch.cos(w)).sum() for g, w in zip(gradients, weights, strict=True)]
        ).sum()

    images.requires_grad_()
    (gradient,) = torch.autograd.grad(matched(images, create_graph=True), images)
    h = 1e-6
    with torch.no_grad():
        ahead, behind = images + h * direction, images - h * direction
    difference = (matched(ahead) - matched(behind)) / (2 * h)
    exact = (gradient * direction).sum()
    assert exact.abs() > 1e-3
    torch.testing.assert_close(exact, difference.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [*(name for name in names() if "VGG" not in name), "ConvNetASwishLN"]
)
def test_nothing_is_overwritten_in_place(name: str) -> None:
    net = build(name, 3, 2, 16).eval()
    images = torch.randn(1, 3, 16, 16, generator=generator())
    before = images.clone()
    kept: list[tuple[Tensor, Tensor]] = []
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output: kept.extend(
                    (t, t.clone()) for t in (*inputs, output)
                )
            )
    with torch.no_grad():
        net(images)
    assert torch.equal(images, before)
    assert len(kept) > 4
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("name", ["ConvNetD2W8BN", "LeNet", "ResNet18"])
def test_compiles_without_a_graph_break(name: str) -> None:
    net = build(name, 1, 3, 16)
    images = torch.randn(4, 1, 16, 16, generator=generator())
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), net(images))


def test_float64_float32_and_bfloat16() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        net = shaken("ConvNetD2W8", 3, 4, 16)
        images = randn(3, 3, 16, 16)
        exact = net(images)
        result = net.to(dtype)(images.to(dtype))
        assert result.dtype == dtype
        assert (result.double() - exact).abs().max() < tolerance * exact.abs().max()
