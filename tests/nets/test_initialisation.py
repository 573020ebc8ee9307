"""Weights: their distribution, and where their randomness comes from."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ddfast.nets import build, has_batchnorm, initialise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert list(a) == list(b)
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "name", ["ConvNet", "ConvNetLN", "MLP", "LeNet", "AlexNetBN", "VGG11", "ResNet18BN"]
)
def test_every_tensor_has_its_distribution(name: str) -> None:
    net = build(name, 3, 10, 32, generator(5))
    drawn = 0
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = (
                module.in_features
                if isinstance(module, nn.Linear)
                else (module.in_channels * module.kernel_size[0] * module.kernel_size[1])
            )
            bound = 1 / math.sqrt(fan_in)
            for tensor in (module.weight, module.bias):
                if tensor is None:
                    continue
                x = tensor.detach().double() / bound
                n = x.numel()
                assert x.abs().max() <= 1 + 1e-6
                # the largest of n uniform draws is below 1 - 30 / n once in e^30
                assert x.abs().max() >= 1 - 30 / n
                assert x.mean().abs() < 6 / math.sqrt(3 * n)
                assert (x.square().mean() - 1 / 3).abs() < 6 * math.sqrt(4 / 45 / n)
                drawn += n
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            drawn += 2 * module.weight.numel()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()
            assert module.num_batches_tracked == 0
    assert drawn == sum(p.numel() for p in net.parameters())
    assert net.training
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in net.parameters())


@pytest.mark.parametrize("name", ["ConvNetW16", "ConvNetW16BN", "LeNet", "MLP", "ConvNetLNW16"])
def test_the_generator_alone_decides(name: str) -> None:
    first = values(build(name, 3, 10, 32, generator(1)))
    assert same(first, values(build(name, 3, 10, 32, generator(1))))
    other = values(build(name, 3, 10, 32, generator(2)))
    for key, value in first.items():
        if value.dim() > 1 and (value != 1).any() and (value != 0).any():
            assert (value != other[key]).float().mean() > 0.99
    one = generator(1)
    build(name, 3, 10, 32, one)
    assert not same(first, values(build(name, 3, 10, 32, one)))  # the generator has moved on


def test_without_a_generator_the_seed_is_0() -> None:
    assert same(values(build("LeNet", 3, 10, 32)), values(build("LeNet", 3, 10, 32, generator(0))))


@pytest.mark.parametrize("name", ["ConvNetLN", "MLP", "LeNet", "AlexNetBN", "VGG11", "ResNet18BN"])
def test_the_global_generator_is_neither_read_nor_written(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = build(name, 3, 2, 32, generator(3))
        initialise(first, generator(4))
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        second = build(name, 3, 2, 32, generator(3))
        initialise(second, generator(4))
        assert same(values(first), values(second))


def test_initialise_forgets_everything() -> None:
    net = build("ConvNetD2W8BN", 3, 10, 16, generator(1))
    fresh = values(net)
    addresses = {key: value.data_ptr() for key, value in net.state_dict().items()}
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    net(torch.randn(8, 3, 16, 16, generator=generator())).square().sum().backward()
    optimiser.step()
    assert all(not torch.equal(fresh[key], value) for key, value in net.state_dict().items())
    gradient = net.classifier.weight.grad.clone()
    net.eval()
    initialise(net, generator(1))
    assert same(fresh, values(net))
    assert addresses == {key: value.data_ptr() for key, value in net.state_dict().items()}
    assert torch.equal(net.classifier.weight.grad, gradient)
    assert not net.training
    assert all(p.requires_grad and p.grad_fn is None for p in net.parameters())


def test_the_same_numbers_as_pytorch_constructors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(16, 16), nn.Conv2d(16, 16, 3)]
        layers += [nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1, bias=False), nn.Linear(128, 10)]
    net = nn.Sequential(*copy.deepcopy(layers))
    expected = values(net)
    initialise(net, generator(12))
    assert not same(expected, values(net))
    initialise(net, generator(11))
    assert same(expected, values(net))


@pytest.mark.parametrize("name", ["ConvNetD2W16", "ConvNetD2W16BN"])
def test_memory_format_does_not_matter(name: str) -> None:
    net = build(name, 3, 10, 16, generator(1))
    expected = values(net)
    net.to(memory_format=torch.channels_last)
    assert not net.features[0].weight.is_contiguous()
    initialise(net, generator(1))
    assert not net.features[0].weight.is_contiguous()
    assert same(expected, values(net))


def test_defaults_of_the_process_do_not_matter() -> None:
    expected = values(build("ConvNetD2W8BN", 3, 10, 16))
    with torch.device("meta"):
        assert same(expected, values(build("ConvNetD2W8BN", 3, 10, 16)))
        net = build("ConvNetD2W8BN", 3, 10, 16).to(memory_format=torch.channels_last)
        initialise(net, generator(0))
    assert same(expected, values(net))


@pytest.mark.gpu
def test_the_same_numbers_on_the_gpu() -> None:
    expected = values(build("ConvNetBN", 3, 10, 32, generator(1)))
    net = build("ConvNetBN", 3, 10, 32, generator(2)).cuda()
    before = torch.cuda.get_rng_state()
    initialise(net, generator(1))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(value.is_cuda for value in net.state_dict().values())
    assert same(expected, {key: value.cpu() for key, value in net.state_dict().items()})


def test_layers_without_a_rule_are_refused_before_anything_changes() -> None:
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(3, 4), nn.PReLU())
    before = values(net)
    with pytest.raises(TypeError, match="does not know how to draw the parameters of PReLU"):
        initialise(net, generator())
    assert same(before, values(net))


def test_layers_without_parameters_are_fine() -> None:
    with torch.random.fork_rng():
        net = nn.Sequential(
            nn.Linear(3, 4, bias=False),
            nn.GroupNorm(2, 4, affine=False),
            nn.BatchNorm1d(4, affine=False, track_running_stats=False),
            nn.LayerNorm(4, bias=False),
            nn.Dropout(),
        )
    with torch.no_grad():
        net[3].weight.fill_(7.0)
    initialise(net, generator())
    assert (net[3].weight == 1).all()
    assert (net[0].weight.abs() <= 1 / math.sqrt(3)).all()
    assert has_batchnorm(net)


def test_bad_generators() -> None:
    net = build("MLP", 1, 2, 8)
    for wrong in (None, 3):
        with pytest.raises(TypeError, match="generator must be a"):
            initialise(net, wrong)
