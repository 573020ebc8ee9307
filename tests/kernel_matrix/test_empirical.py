"""The empirical kernel of random networks against one graph of all of them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from ddfast import nets
from ddfast.kernel_matrix import empirical, empirical_nngp, kernel_matrix
from ddfast.random import generator

MODELS = ("ConvNetD2W4NN", "ConvNetD2W4", "FRePoNetD2W4", "MLP")


def images(count: int, seed: int, dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, size, size, generator=random, dtype=torch.float64).to(dtype)


def drawing(model: str, dtype: torch.dtype = torch.float64, size: int = 8, seed: int = 0, step=0):
    """Networks by their number: one module whose weights are drawn anew."""
    net = nets.build(model, 2, 3, size).to(dtype).eval()

    def network(number: int) -> nets.Network:
        nets.initialise_wide(net, generator(seed, "random network", step, number))
        return net

    return network


def one_graph(x: Tensor, y: Tensor, network, count: int) -> tuple[Tensor, Tensor]:
    """The formula, with plain torch and all networks side by side."""

    class Embed(torch.nn.Module):
        def __init__(self, net: nets.Network) -> None:
            super().__init__()
            self.net = net

        def forward(self, z: Tensor) -> Tensor:
            return self.net.embed(z)

    on_x, on_y = [], []
    for number in range(count):
        weights = {n: p.detach().clone() for n, p in network(number).named_parameters()}
        buffers = {n: b.clone() for n, b in network(number).named_buffers()}
        net = network(number)
        named = {f"net.{n}": t for n, t in (weights | buffers).items()}
        on_x.append(torch.func.functional_call(Embed(net), named, (x,)))
        on_y.append(torch.func.functional_call(Embed(net), named, (y,)))
    phi_x, phi_y = torch.cat(on_x, 1), torch.cat(on_y, 1)
    return tuple(2 * p @ phi_x.mT / phi_x.shape[1] + 0.01 for p in (phi_x, phi_y))


def loss_of(k_ss: Tensor, k_ts: Tensor) -> Tensor:
    """Something of both matrices, not symmetric in the first."""
    random = torch.Generator().manual_seed(5)
    weights = torch.randn(k_ss.shape, generator=random, dtype=k_ss.dtype)
    return (weights * k_ss).sin().sum() + (k_ts.square() - k_ts).mean()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("memory", ["1GiB", "60KiB"])
@pytest.mark.parametrize("count", [1, 3])
def test_streamed_equals_one_graph(model, memory, count) -> None:
    """Kept or computed again, in one piece or many: to 1e-12 of the largest number."""
    x, y = images(5, 1).requires_grad_(), images(90, 2)
    expected = one_graph(x, y, drawing(model), count)
    (wanted,) = torch.autograd.grad(loss_of(*expected), x)
    found = empirical_nngp(x, y, drawing(model), count, memory=memory)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(loss_of(*found), x)
    assert (gradient - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_of_one_matrix(which) -> None:
    x, y = images(4, 1).requires_grad_(), images(6, 2)
    (wanted,) = torch.autograd.grad(one_graph(x, y, drawing(MODELS[0]), 2)[which].sin().sum(), x)
    found = empirical_nngp(x, y, drawing(MODELS[0]), 2)[which].sin().sum()
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], wanted, rtol=1e-12, atol=1e-14)


def test_kept_features_and_those_computed_again_give_the_same_bits(monkeypatch) -> None:
    x, y = images(5, 1).requires_grad_(), images(9, 2)
    gradients, original = [], empirical._forward
    for kept in (True, False):
        monkeypatch.setattr(
            empirical, "_forward", lambda a, b, keep, kept=kept: original(a, b, keep and kept)
        )
        found = empirical_nngp(x, y, drawing(MODELS[0]), 3)
        gradients.append(torch.autograd.grad(loss_of(*found), x)[0])
    assert torch.equal(*gradients)


def test_factor_and_offset() -> None:
    """2 / (M F) of the products and 0.01 beside it, as RFAD; FRePo has the plain products."""
    x, y = images(3, 1), images(4, 2)
    network = drawing(MODELS[0])
    with torch.no_grad():
        products = sum(network(r).embed(y) @ network(r).embed(x).mT for r in range(5))
    width = network(0).embed(x).shape[1]
    _, k_ts = empirical_nngp(x, y, network, 5)
    torch.testing.assert_close(k_ts, 2 * products / (5 * width) + 0.01, rtol=1e-12, atol=0)
    plain = empirical_nngp(x, y, network, 5, weight_var=1.0, bias_var=0.0, normalise=False)[1]
    torch.testing.assert_close(plain, products, rtol=1e-12, atol=0)


def test_networks_are_those_of_seed_step_and_number() -> None:
    x, y = images(3, 1).requires_grad_(), images(4, 2)

    def gradient(count: int, **draw: int) -> Tensor:
        found = empirical_nngp(x, y, drawing(MODELS[0], **draw), count)
        return torch.cat(
            [k.flatten() for k in found] + [torch.autograd.grad(loss_of(*found), x)[0].flatten()]
        )

    assert torch.equal(gradient(3), gradient(3))
    for other in ({"seed": 1}, {"step": 1}):
        assert not torch.allclose(gradient(3), gradient(3, **other), rtol=1e-3)
    assert not torch.allclose(gradient(3), gradient(2), rtol=1e-3)


def test_memory_does_not_depend_on_the_number_of_networks() -> None:
    """No more bytes of tensors are alive at once for 12 networks than for 2."""

    def peak(count: int) -> int:
        x, y = images(4, 1).requires_grad_(), images(200, 2)
        inner, most = drawing(MODELS[0]), 0

        def network(number: int) -> nets.Network:
            nonlocal most
            gc.collect()
            alive = [o for o in gc.get_objects() if type(o) is Tensor and o.device.type == "cpu"]
            most = max(most, sum(t.numel() for t in alive))
            return inner(number)

        loss_of(*empirical_nngp(x, y, network, count, memory="60KiB")).backward()
        return most

    assert peak(12) <= peak(2) + 64


@pytest.mark.parametrize("model", [MODELS[0], "FRePoNetD2W4"])
def test_bfloat16_features_keep_the_gradient(model) -> None:
    """Its direction to a cosine of 0.999, which needs the products in float32."""
    x, y = images(6, 1).float().requires_grad_(), images(40, 2).float()
    network = drawing(model.replace("W4", "W32"), torch.float32)
    gradients = []
    for precision in (None, "bfloat16"):
        k_ss, k_ts = empirical_nngp(x, y, network, 2, precision=precision)
        assert k_ss.dtype == k_ts.dtype == torch.float32
        ridge = 1e-2 * k_ss.diagonal().mean() * torch.eye(6)
        target = torch.eye(6)[torch.arange(40) % 6] - 1 / 6
        solved = torch.linalg.solve(k_ss + ridge, torch.eye(6) - 1 / 6)
        gradients.append(torch.autograd.grad((k_ts @ solved - target).square().mean(), x)[0])
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0)
    assert cosine > 0.999
    assert not torch.equal(*gradients)


def test_second_derivatives_and_transforms_are_refused() -> None:
    x, y = images(3, 1).requires_grad_(), images(4, 2)
    network = drawing(MODELS[0])
    loss = loss_of(*empirical_nngp(x, y, network, 1))
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda z: loss_of(*empirical_nngp(z, y, network, 1)))(x)


def test_under_compile_it_stays_outside_the_graph() -> None:
    x, y = images(3, 1).requires_grad_(), images(4, 2)
    network = drawing(MODELS[0])

    def step(x: Tensor) -> Tensor:
        return loss_of(*empirical_nngp(x * 2, y, network, 2))

    (wanted,) = torch.autograd.grad(step(x), x)
    (found,) = torch.autograd.grad(torch.compile(step, backend="eager")(x), x)
    assert torch.equal(found, wanted)


def test_inputs_are_left_alone() -> None:
    x, y = images(3, 1), images(4, 2)
    before = x.clone(), y.clone()
    k_ss, k_ts = empirical_nngp(x[:, :, ::1], y.transpose(2, 3), drawing(MODELS[0]), 2)
    assert not k_ss.requires_grad and torch.equal(k_ss, k_ss.mT)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    again = empirical_nngp(x, y.transpose(2, 3).contiguous(), drawing(MODELS[0]), 2)
    assert torch.equal(k_ts, again[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 2, 8)}, ValueError, r"x: got shape \(2, 2, 8\)"),
        ({"x": torch.zeros(0, 2, 8, 8)}, ValueError, r"x: got shape \(0,"),
        ({"x": [1]}, TypeError, "x: got list"),
        ({"y": torch.zeros(2, 2, 8, 8, dtype=torch.half)}, TypeError, r"y: got torch\.float16"),
        ({"y": torch.zeros(2, 3, 8, 8)}, ValueError, r"y: got \(2, 3, 8, 8\)"),
        ({"y": torch.zeros(2, 2, 8, 8, requires_grad=True)}, ValueError, "y: requires a gradient"),
        ({"network": 3}, TypeError, "network: got int"),
        ({"network": lambda number: torch.nn.ReLU()}, TypeError, "network: made ReLU of 0"),
        ({"network": drawing(MODELS[0])}, ValueError, r"network: number 0 is torch\.float64"),
        ({"network": lambda n: nets.build("ConvNetD2W4BN", 2, 3, 8)}, ValueError, "training mode"),
        ({"count": 0}, ValueError, "count: got 0"),
        ({"count": True}, ValueError, "count: got True"),
        ({"weight_var": -1.0}, ValueError, r"weight_var: got -1\.0"),
        ({"bias_var": float("nan")}, ValueError, "bias_var: got nan"),
        ({"precision": "float16"}, ValueError, "precision: got 'float16'"),
        ({"memory": "1KiB"}, ValueError, "memory: the budget of 341 bytes is too small"),
    ],
)
def test_what_is_wrong_is_named(changes, error, message) -> None:
    given = {
        "x": torch.zeros(2, 2, 8, 8),
        "y": torch.zeros(3, 2, 8, 8),
        "network": drawing(MODELS[0], torch.float32),
        "count": 1,
    } | changes
    with pytest.raises(error, match=message):
        empirical_nngp(**given)


@pytest.mark.parametrize("depth", [1, 2])
def test_converges_to_the_kernel_of_wide_networks(depth) -> None:
    """More networks come nearer, as one over the root of their number, to `kernel_matrix`.

    From two blocks on there is a bias of the order of one over the width, hence 256.
    """
    x, y = images(4, 1), images(6, 2)
    options = {"kind": "nngp", "net": "conv", "depth": depth}
    exact = kernel_matrix(y, x, **options), kernel_matrix(x, **options)
    errors = {}
    for count in (4, 64):
        k_ss, k_ts = empirical_nngp(x, y, drawing(f"ConvNetD{depth}W256NN"), count)
        errors[count] = max(
            float((a - b).norm() / b.norm()) for a, b in ((k_ts, exact[0]), (k_ss, exact[1]))
        )
    assert errors[64] < 0.02
    assert 2 < errors[4] / errors[64] < 12  # 4 expected
