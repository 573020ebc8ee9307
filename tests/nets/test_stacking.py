"""Several networks at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from ddfast.nets import Network, build, stack


def networks(name: str, channels: int = 1, size: int = 16, count: int = 3) -> list[Network]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return [build(name, channels, 4, size, g).double() for g in generators]


def images(size: int = 16) -> Tensor:
    return torch.randn(
        5, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )


@pytest.mark.parametrize(
    "name",
    [
        "ConvNetD2W8",
        "ConvNetD2W8LNAS",
        "ConvNetD2W8GNASwishMP",
        "ConvNetD2W8NNALNP",
        "ConvNetD2W8BN",
        "MLP",
        "LeNet",
        "AlexNetBN",
    ],
)
def test_stacked_networks_compute_what_each_computes(name: str) -> None:
    nets = networks(name)
    x, labels = images(), torch.tensor([0, 3, 1, 2, 0])
    parameters, buffers = stack(nets)
    apart = copy.deepcopy(nets)  # batch normalisation changes its buffers: run a copy one by one

    def loss(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = functional_call(nets[0], (parameters, buffers), (x,))
        return cross_entropy(logits, labels), logits

    gradients, logits = vmap(grad(loss, has_aux=True), in_dims=(0, 0, None))(parameters, buffers, x)
    for number, net in enumerate(apart):
        expected = net(x)
        torch.testing.assert_close(logits[number], expected, rtol=1e-9, atol=1e-9)
        cross_entropy(expected, labels).backward()
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(gradients[key][number], parameter.grad, rtol=1e-8, atol=1e-9)
        for key, buffer in net.named_buffers():
            torch.testing.assert_close(buffers[key][number], buffer, rtol=1e-9, atol=1e-9)
            assert not torch.equal(buffer, dict(nets[number].named_buffers())[key])
    assert not torch.equal(logits[0], logits[1])


def test_stack_is_a_copy_with_leaves() -> None:
    nets = networks("ConvNetD2W8BN")
    parameters, buffers = stack(nets)
    assert list(parameters) == [key for key, _ in nets[0].named_parameters()]
    assert list(buffers) == [key for key, _ in nets[0].named_buffers()]
    for key, value in (parameters | buffers).items():
        for number, net in enumerate(nets):
            assert torch.equal(value[number], net.state_dict()[key])
    assert all(value.is_leaf and value.requires_grad for value in parameters.values())
    with torch.no_grad():
        parameters["classifier.bias"].zero_()
    assert (nets[0].classifier.bias != 0).any()


def test_one_batchnorm_buffer_for_several_networks_is_refused() -> None:
    nets = networks("ConvNetD2W8BN")
    parameters, _ = stack(nets)
    x = images()
    with pytest.raises(RuntimeError, match="running_mean or running_var"):
        vmap(lambda parameters: functional_call(nets[0], parameters, (x,)))(parameters)


def test_networks_that_differ_are_refused() -> None:
    net = build("ConvNetD2W8", 1, 4, 16)
    with pytest.raises(ValueError, match="at least one network"):
        stack([])
    for other in (
        build("ConvNetD2W8AL", 1, 4, 16),  # the same shapes, another activation
        build("ConvNetD2W8MP", 1, 4, 16),
        build("ConvNetD2W8", 1, 4, 32),
        build("ConvNetD2W16", 1, 4, 16),
        build("MLP", 1, 4, 16),
    ):
        with pytest.raises(ValueError, match="of one architecture: number 1 differs"):
            stack([net, other])
    with pytest.raises(ValueError, match=r"in one mode \(train or eval\): number 2"):
        stack([net, build("ConvNetD2W8", 1, 4, 16), build("ConvNetD2W8", 1, 4, 16).eval()])
