"""Forward mode and torch.func: refused by every operator, never answered with silent zeros."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from ddfast import augment, layers, losses
from ddfast.ops import class_weight_grad as convolutions
from ddfast.reference import gradient_distance as reference
from ddfast.synthetic import multi_formation

OTHER = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4)
DRAW = torch.tensor([[[0.0, 0.1, 1.2, 0.9]]], dtype=torch.float64)  # color
FUNCTIONS = {
    "gradient_distance": lambda x: losses.gradient_distance([x], [OTHER]),
    "class_mean": lambda x: losses.class_mean(x),
    "class_mean_distance": lambda x: losses.class_mean_distance(x, OTHER).sum(),
    "mmd": lambda x: losses.mmd(x, OTHER.flip(1)).sum(),
    "augment": lambda x: augment.apply(x[None], DRAW),
    "multi_formation": lambda x: multi_formation.decode(x[None], torch.zeros(1), 2)[0],
}
# Operators that only the engine calls; no public function refuses torch.func before them.
WEIGHT = OTHER[:1, :2]  # of a linear layer
OPERATORS = {
    "class_conv": lambda x: convolutions.class_conv(x[:, 0], WEIGHT, [2], 0, "auto"),
    "class_input_grad": lambda x: convolutions.class_input_grad(
        x[:, 0], WEIGHT.mT, [2], [], 0, "auto"
    ),
    "class_weight_grad": lambda x: convolutions.class_weight_grad(
        x[:, 0], x[:, 1], [2], [], 0, "auto"
    ),
    "norm_relu_pool": lambda x: layers.norm_relu_pool(x[None], groups=2),
}


@pytest.fixture
def x():
    return OTHER.cos()


@pytest.mark.parametrize("name", [*FUNCTIONS, *OPERATORS])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(name, requires_grad, x):
    f = {**FUNCTIONS, **OPERATORS}[name]
    with forward_ad.dual_level():
        f(x)  # without a tangent there is nothing to lose
        dual = forward_ad.make_dual(x.requires_grad_(requires_grad), OTHER)
        with pytest.raises(NotImplementedError):
            f(dual)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func(name, x):
    f = FUNCTIONS[name]
    for transformed in (
        lambda: torch.func.jvp(f, (x,), (OTHER,)),
        lambda: torch.func.grad(lambda t: f(t).sum())(x),
        lambda: torch.func.vmap(f)(x[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func.*ddfast\.reference"):
            transformed()


def test_the_reference_has_them(x):
    def f(t):
        return reference.gradient_distance([t], [OTHER])

    value, tangent = torch.func.jvp(f, (x,), (OTHER,))
    step = 1e-6
    finite = (f(x + step * OTHER) - f(x - step * OTHER)) / (2 * step)
    torch.testing.assert_close(tangent, finite, rtol=1e-7, atol=1e-9)
    assert torch.func.grad(lambda t: f(t).sum())(x).abs().sum() > 0 and value.shape == (1,)
