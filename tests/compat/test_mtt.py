"""`ReparamModule` and MTT's `DiffAugment`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ddfast import nets
from ddfast.compat import dc, mtt

MODELS = ["ConvNetD2W4", "ConvNetD2W4BN", "MLP"]


def made(model: str = "ConvNetD2W4") -> nn.Module:
    return nets.build(model, 2, 3, 8).double()


def images() -> torch.Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("model", MODELS)
def test_output_and_two_derivatives_are_those_of_the_network(model) -> None:
    net, labels = made(model), torch.arange(4) % 3
    named = dict(net.named_parameters())
    student = mtt.ReparamModule(copy.deepcopy(net))
    student.train()
    x = images().requires_grad_()
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    flat = (flat + 0.01).requires_grad_()

    def literal(images):
        parts = flat.split([p.numel() for p in named.values()])
        views = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(net, views, (images,))

    found = []
    for forward in (lambda x: student(x, flat_param=flat[None]), literal):
        loss = F.cross_entropy(forward(x), labels)
        (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        found.append((loss.detach(), gradient.detach(), second))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_its_only_parameter_is_flat(model) -> None:
    net = made(model)
    student = mtt.ReparamModule(copy.deepcopy(net))
    assert [name for name, _ in student.named_parameters()] == ["flat_param"]
    assert student.param_numel == sum(p.numel() for p in net.parameters())
    assert len(list(student.buffers())) == len(list(net.buffers()))
    torch.testing.assert_close(student(images()), net(images()))
    before = student(images())
    student(images(), flat_param=torch.zeros(student.param_numel, dtype=torch.float64))
    torch.testing.assert_close(student.eval()(images()), student(images()))
    if "BN" not in model:  # whose running statistics have moved
        assert torch.equal(before, student(images()))
    assert student.float().flat_param.dtype == torch.float32
    student(images().float())


def test_buffers_may_be_given() -> None:
    net = made("ConvNetD2W4BN").eval()
    student = mtt.ReparamModule(copy.deepcopy(net)).eval()
    buffers = [b + 1 for b in net.buffers()]
    expected = functional_call(
        net, dict(zip((n for n, _ in net.named_buffers()), buffers, strict=True)), (images(),)
    )
    torch.testing.assert_close(student(images(), buffers=buffers), expected)
    torch.testing.assert_close(student(images()), net(images()))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.uses_global_random_state
def test_a_shared_parameter_counts_once() -> None:
    net = Shared()
    student = mtt.ReparamModule(copy.deepcopy(net))
    assert student.param_numel == 12
    flat = torch.randn(12, requires_grad=True)
    (gradient,) = torch.autograd.grad(student(torch.ones(1, 3), flat_param=flat).sum(), flat)
    weight, bias = flat.detach()[:9].view(3, 3).requires_grad_(), flat.detach()[9:]
    out = (torch.ones(1, 3) @ weight.T + bias) @ weight.T
    (expected,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(gradient[:9], expected.flatten())


def test_what_does_not_fit_is_refused() -> None:
    net = made()
    net.classifier.float()
    with pytest.raises(ValueError, match=r"module: has torch.float32, torch.float64, expected"):
        mtt.ReparamModule(net)
    with pytest.raises(ValueError, match="module: has no parameters"):
        mtt.ReparamModule(nn.ReLU())
    student = mtt.ReparamModule(made())
    with pytest.raises(ValueError, match=r"flat_param: got shape \(3,\), expected"):
        student(images(), flat_param=torch.zeros(3))


@pytest.mark.parametrize("operation", ["scale", "rotate", "crop"])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_pixel_centres_are_those_of_mtt(operation, size) -> None:
    """MTT's code samples with `align_corners=True`; DC's, on any newer torch, does not. It only
    matters for rotations of images that are not square."""
    random = torch.Generator()
    x = torch.randn(4, 2, *size, generator=random.manual_seed(1), dtype=torch.float64)
    found = mtt.DiffAugment(x, operation, 3, mtt.ParamDiffAug())
    like_dc = dc.DiffAugment(x, operation, 3, dc.ParamDiffAug())

    def uniform(seed):
        return torch.rand(len(x), generator=random.manual_seed(seed))[0].double()

    if operation == "scale":  # the choice of the operation takes the first number
        sx, sy = (uniform(seed) * (1.2 - 1 / 1.2) + 1 / 1.2 for seed in (4, 5))
        theta = torch.diag(torch.stack([sx, sy]))
    else:
        angle = (uniform(4) - 0.5) * 2 * 15 / 180 * torch.pi
        sine, cosine = angle.sin(), angle.cos()
        theta = torch.stack([cosine, -sine, sine, cosine]).view(2, 2)
    if operation != "crop":
        theta = F.pad(theta, (0, 1)).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=True)
        expected = F.grid_sample(x, grid, align_corners=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    differs = operation == "rotate" and size == (8, 12)
    assert torch.equal(found, like_dc) != differs
