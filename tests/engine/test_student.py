"""A student's gradient and its tangent: fused, in pieces and general, against double backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ddfast import nets
from ddfast.engine import Student, gradients
from tests.engine.conftest import make

EXACT = 1e-12
CLASSES = 4


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def labels_of(kind: str, count: int, random: torch.Generator, dtype=torch.float64) -> Tensor:
    if kind == "hard":
        return torch.arange(count) % CLASSES
    return torch.rand(count, CLASSES, generator=random, dtype=dtype)  # rows of any sum


class Case:
    def __init__(self, net: nn.Module, shape: tuple[int, ...], count: int, kind: str) -> None:
        random = torch.Generator().manual_seed(count)
        self.net, self.theta = net, flat(net)
        dtype = self.theta.dtype
        self.images = torch.randn(count, *shape, generator=random, dtype=dtype)
        self.labels = labels_of(kind, count, random, dtype)
        self.direction = torch.randn(self.theta.shape, generator=random, dtype=dtype)

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        shapes = {name: p.shape for name, p in self.net.named_parameters()}
        parts = theta.split([shape.numel() for shape in shapes.values()])
        weights = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        buffers = {name: b.clone() for name, b in self.net.named_buffers()}
        z = torch.func.functional_call(self.net, weights | buffers, (x,))
        if not y.is_floating_point():
            return cross_entropy(z, y)
        return -(y * log_softmax(z, 1)).sum(1).mean()

    def expected(self) -> dict[str, Tensor]:
        """By double backward through the module."""
        theta, x = (t.clone().requires_grad_() for t in (self.theta, self.images))
        y = self.labels.clone()
        soft = y.is_floating_point()
        leaves = [x, theta, y.requires_grad_()] if soft else [x, theta]
        loss = self.loss(theta, x, y)
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        slope = g @ self.direction
        found = torch.autograd.grad(slope, leaves, allow_unused=True)
        names = ["by_images", "by_parameters", "by_labels"][: len(leaves)]
        return {
            "loss": loss.detach(),
            "gradient": g.detach(),
            "slope": slope.detach(),
            **dict(zip(names, found, strict=True)),
        }

    def found(self, **options) -> dict[str, Tensor]:
        student = Student(self.net, **options)
        assert student.size == len(self.theta)
        loss, gradient = student.gradient(self.theta, self.images, self.labels)
        soft = self.labels.is_floating_point()
        tangent = student.tangent(
            self.theta, self.images, self.labels, self.direction, by_labels=soft
        )
        return {"loss": loss, "gradient": gradient, **vars(tangent)}

    def check(self, tolerance: float = EXACT, **options) -> dict[str, Tensor]:
        expected, found = self.expected(), self.found(**options)
        for name, wanted in expected.items():
            error = (found[name] - wanted).norm()
            assert error <= tolerance * wanted.norm(), (name, float(error))
        return found


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("norm", ["instancenorm", "groupnorm", "none"])
def test_convnets(norm, labels, path):
    net = make(norm=norm, classes=CLASSES)
    Case(net, (3, 8, 8), 6, labels).check(path=path)


@pytest.mark.parametrize("activation", ["leakyrelu", "sigmoid", "swish"])
@pytest.mark.parametrize("pooling", ["avgpooling", "maxpooling", "none"])
def test_activations_and_pools(activation, pooling):
    net = make(activation=activation, pooling=pooling, classes=CLASSES, depth=1)
    Case(net, (3, 8, 8), 3, "soft").check(path="fused")


@pytest.mark.parametrize(("channels", "side"), [(1, 7), (1, 28), (3, 5)])
@pytest.mark.parametrize("count", [1, 4])
def test_odd_sizes(channels, side, count):
    net = make(channels=channels, size=(side, side), classes=CLASSES, depth=2, width=4)
    Case(net, (channels, side, side), count, "hard").check(path="fused")


@pytest.mark.parametrize("path", ["fused", "general"])
def test_pieces_make_no_difference(monkeypatch, path):
    case = Case(make(classes=CLASSES), (3, 8, 8), 7, "soft")
    whole = case.found(path=path)
    monkeypatch.setattr(gradients, "CACHE", 3 * 8 * 4000)
    student = Student(case.net, 100_000, path)
    student.gradient(case.theta, case.images, case.labels)
    assert student._copy is not None
    (plan,) = student._copy.plans.values()
    assert plan.first < 7 and plan.second < 7
    for name, value in case.check(memory=100_000, path=path).items():
        assert (value - whole[name]).norm() <= EXACT * whole[name].norm(), name


@pytest.mark.parametrize("name", ["MLP", "AlexNet", "ResNet18", "ResNet18BN", "ConvNetD2W4BN"])
def test_other_networks_through_autograd(name):
    """In training mode; the running statistics of batch normalisation stay as they are."""
    random = torch.Generator().manual_seed(3)
    side = 32 if name == "AlexNet" else 8
    net = nets.build(name, 3, CLASSES, (side, side), random).double().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    Case(net, (3, side, side), 2, "hard").check(1e-11)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_batch_with_batch_normalisation_is_never_divided():
    random = torch.Generator().manual_seed(3)
    net = nets.build("ConvNetD2W4BN", 3, CLASSES, (8, 8), random).double().train()
    case = Case(net, (3, 8, 8), 5, "hard")
    case.check(1e-11, memory=200_000)


def test_without_the_hessian_nothing_else_changes():
    case = Case(make(classes=CLASSES), (3, 8, 8), 4, "hard")
    student = Student(case.net)
    arguments = (case.theta, case.images, case.labels, case.direction)
    whole, frozen = student.tangent(*arguments), student.tangent(*arguments, False)
    assert frozen.by_parameters is None and frozen.by_labels is None
    assert torch.equal(frozen.by_images, whole.by_images)
    assert torch.equal(frozen.slope, whole.slope)


def test_biases_under_instance_norm_have_zeros():
    case = Case(make(classes=CLASSES), (3, 8, 8), 4, "hard")
    found = case.found(path="fused")
    for vector in (found["gradient"], found["by_parameters"]):
        parts = vector.split([p.numel() for p in case.net.parameters()])
        named = dict(zip(dict(case.net.named_parameters()), parts, strict=True))
        assert not named["features.0.bias"].any()
        assert named["features.1.bias"].any() and named["classifier.bias"].any()


def test_constant_planes_stay_finite():
    case = Case(make(classes=CLASSES), (3, 8, 8), 3, "hard")
    case.images = torch.ones_like(case.images) * torch.tensor([0.0, 1.0, -2.0]).view(-1, 1, 1, 1)
    assert all(
        torch.isfinite(value).all()
        for value in case.found(path="fused").values()
        if value is not None
    )


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_float32_stays_within_twice_the_error_of_double_backward(labels):
    """On smooth activations: no input lies on the other side of a kink."""
    net = make(activation="swish", classes=CLASSES, dtype=torch.float32)
    case = Case(net, (3, 8, 8), 8, labels)
    eager, found = case.expected(), case.found(path="fused")
    wide = Case(make(activation="swish", classes=CLASSES), (3, 8, 8), 8, labels)
    for name in ("theta", "images", "direction", "labels"):
        value = getattr(case, name)
        setattr(wide, name, value.double() if value.is_floating_point() else value)
    for name, exact in wide.expected().items():
        scale = exact.abs().max()
        allowed = 2 * (eager[name].double() - exact).abs().max() + 2e-6 * scale
        assert (found[name].double() - exact).abs().max() <= allowed, name


def test_results_are_ordinary_tensors_and_the_network_stays():
    case = Case(make(classes=CLASSES), (3, 8, 8), 4, "soft")
    before = case.theta.clone()
    for value in case.found(path="fused").values():
        assert not value.requires_grad and not value.is_inference()
    assert torch.equal(flat(case.net), before)
    assert all(p.grad is None and p.requires_grad for p in case.net.parameters())


def test_theta_may_be_of_another_dtype_than_the_network():
    case = Case(make(classes=CLASSES), (3, 8, 8), 4, "hard")
    expected = case.found(path="fused")["gradient"]
    student = Student(make(classes=CLASSES, dtype=torch.float32), path="fused")
    found = student.gradient(case.theta, case.images, case.labels)[1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Student(make(), path="fast"), "path: got 'fast'"),
        (lambda: Student(make(), algorithm="fast"), "algorithm: got 'fast'"),
        (lambda: Student(nn.Sequential(nn.Dropout(), nn.Flatten())), "net: dropout '0'"),
    ],
)
def test_errors_name_the_argument(make_it, message):
    with pytest.raises(ValueError, match=message):
        student = make_it()
        case = Case(make(), (3, 8, 8), 1, "hard")
        student.gradient(case.theta, case.images, case.labels)


def test_a_label_without_a_logit_is_an_error():
    case = Case(make(classes=CLASSES), (3, 8, 8), 2, "hard")
    for path in ("fused", "general"):
        with pytest.raises(ValueError, match="labels: got 4"):
            Student(case.net, path=path).gradient(case.theta, case.images, case.labels + 3)
