"""The unrolled student: the reverse against one graph of autograd, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ddfast import nets
from ddfast.augment import DSA
from ddfast.random import generator
from ddfast.unroll import SGD, Adam, final_parameters, unroll
from ddfast.unroll.graph import mean_loss

EXACT = 1e-12
IMAGES, CLASSES = 7, 3

OPTIMISERS = {"sgd": SGD(), "momentum": SGD(0.9), "adam": Adam(eps=1e-4)}


class Task:
    """Seven images of 3x8x8 in batches of three; a loss of the parameters that is not linear."""

    def __init__(self, steps: int, model: str = "ConvNetD2W4", labels: str = "hard") -> None:
        random = torch.Generator().manual_seed(steps)
        self.net = nets.build(model, 3, CLASSES, (8, 8), random).double().train()
        self.start = nn.utils.parameters_to_vector(self.net.parameters()).detach()
        self.images = torch.randn(IMAGES, 3, 8, 8, generator=random, dtype=torch.float64)
        self.labels = torch.arange(IMAGES) % CLASSES
        if labels != "hard":
            self.labels = torch.rand(IMAGES, CLASSES, generator=random, dtype=torch.float64)
        self.soft = "logits" if labels == "logits" else "probabilities"
        self.lr = torch.tensor(0.05, dtype=torch.float64)
        order = [torch.randperm(IMAGES, generator=random) for _ in range(steps)]
        self.batches = list(itertools.chain(*(o.split(3) for o in order)))[:steps]
        self.target = self.start + 0.1 * torch.randn(
            self.start.shape, generator=random, dtype=torch.float64
        )

    def loss_of(self, theta: Tensor) -> Tensor:
        return ((theta - self.target) ** 2).sum().sqrt()

    def gradients(self, adjoint: str, *names: str, **options) -> tuple[Tensor, list[Tensor]]:
        leaves = {
            name: getattr(self, name).clone().requires_grad_(name in names)
            for name in ("start", "images", "labels", "lr")
        }
        loss = unroll(
            self.net,
            leaves["start"],
            leaves["images"],
            leaves["labels"],
            leaves["lr"],
            self.batches,
            self.loss_of,
            adjoint,
            soft=self.soft,
            **options,
        )
        return loss.detach(), list(torch.autograd.grad(loss, [leaves[name] for name in names]))


def close(a: Tensor, b: Tensor, tolerance: float = EXACT) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def check(task: Task, *names: str, **options) -> None:
    loss, expected = task.gradients("graph", *names, **options)
    found_loss, found = task.gradients("exact", *names, **options)
    assert close(found_loss, loss)
    for name, a, b in zip(names, found, expected, strict=True):
        assert b.norm() > 0, name
        assert close(a, b), name


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_exact_is_the_gradient_of_the_graph(optimiser, steps):
    check(Task(steps), "start", "images", "lr", optimiser=OPTIMISERS[optimiser])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("labels", ["probabilities", "logits"])
def test_soft_labels(labels, optimiser):
    """That need not sum to one, or the softmax of logits."""
    check(Task(4, labels=labels), "images", "labels", "lr", optimiser=OPTIMISERS[optimiser])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_learning_rate_for_each_step(optimiser):
    task = Task(5)
    task.lr = torch.linspace(0.02, 0.08, 5, dtype=torch.float64)
    check(task, "images", "lr", optimiser=OPTIMISERS[optimiser])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_learning_rate_of_zero_still_has_a_derivative(optimiser):
    task = Task(3, "ConvNetD2W4NN")  # no biases whose gradients are rounding errors alone
    task.lr = torch.zeros((), dtype=torch.float64)
    check(task, "lr", optimiser=OPTIMISERS[optimiser])
    _, (by_images,) = task.gradients("exact", "images", optimiser=OPTIMISERS[optimiser])
    assert not by_images.any()


def test_images_repeated_within_a_batch():
    task = Task(4)
    task.batches = [torch.tensor(rows) for rows in ([0, 0, 1], [1, 0], [2, 2, 2], [0])]
    check(task, "images")
    _, (by_images,) = task.gradients("exact", "images")
    assert not by_images[3:].any() and by_images[:3].flatten(1).any(1).all()


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_last_steps_alone(optimiser, window):
    names = ("images", "lr")
    check(Task(7), *names, optimiser=OPTIMISERS[optimiser], window=window)


@pytest.mark.parametrize("window", [0, None])
def test_no_steps_to_differentiate(window):
    task = Task(0 if window is None else 2)
    images = task.images.clone().requires_grad_()
    arguments = (task.net, task.start, images, task.labels, task.lr, task.batches)
    found = final_parameters(*arguments, window=window)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert not gradient.any()
    assert torch.equal(found.detach(), task.start) == (window is None)


@pytest.mark.parametrize("history", ["host", "checkpoints"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_histories_are_equal_bit_for_bit(optimiser, history):
    task = Task(7)
    options = {"optimiser": OPTIMISERS[optimiser], "window": 6}
    _, expected = task.gradients("exact", "images", "lr", **options)
    _, found = task.gradients("exact", "images", "lr", history=history, **options)
    assert all(map(torch.equal, found, expected))


def augmentation(task: Task):
    dsa = DSA("color_crop_cutout_flip_scale_rotate")
    draws = [
        dsa.draw(generator(0, "augmentation", step), (8, 8), count=len(rows))
        for step, rows in enumerate(task.batches)
    ]
    seen: list[tuple[int, Tensor]] = []

    def augment(x: Tensor, step: int) -> Tensor:
        seen.append((step, dsa(x, draws[step])))
        return seen[-1][1]

    return augment, seen


def test_augmentation_is_replayed_bit_for_bit():
    task = Task(7)
    augment, seen = augmentation(task)
    check(task, "images", "lr", augment=augment)
    del seen[:]
    task.gradients("exact", "images", augment=augment, history="checkpoints")
    assert [step for step, _ in seen].count(0) == 3  # forward, again from the checkpoint, reverse
    for step, x in seen:
        assert torch.equal(x.detach(), next(first for s, first in seen if s == step).detach())


@pytest.mark.parametrize("model", ["MLP", "ConvNetD2W4NN", "ConvNetD2W4BN"])
def test_other_networks(model):
    """Batch normalisation by the batch's own statistics; the running ones stay."""
    task = Task(3, model)
    before = [b.clone() for b in (*task.net.buffers(), *task.net.parameters())]
    check(task, "images", "lr")
    assert all(map(torch.equal, before, (*task.net.buffers(), *task.net.parameters())))
    assert all(p.grad is None for p in task.net.parameters())


# --- frozen -------------------------------------------------------------------------------------


def frozen_graph(task: Task, names: tuple[str, ...], optimiser) -> list[Tensor]:
    """All steps in one graph, in which theta_i is a constant in the gradient of its step."""
    leaves = {name: getattr(task, name).clone() for name in ("images", "labels", "lr")}
    for name in names:
        leaves[name].requires_grad_()
    state = optimiser.begin(task.start)
    shapes = {name: p.shape for name, p in task.net.named_parameters()}
    for number, rows in enumerate(task.batches):
        theta = state[0].detach().requires_grad_()
        parts = theta.split([shape.numel() for shape in shapes.values()])
        weights = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        y = leaves["labels"][rows]
        y = y.softmax(1) if task.soft == "logits" else y
        logits = torch.func.functional_call(task.net, weights, (leaves["images"][rows],))
        (g,) = torch.autograd.grad(mean_loss(logits, y), theta, create_graph=True)
        lr = leaves["lr"]
        state = optimiser.step(state, g, lr[number] if lr.dim() else lr, number)
    loss = task.loss_of(state[0])
    return list(torch.autograd.grad(loss, [leaves[name] for name in names]))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_frozen_is_the_graph_with_constant_parameters(optimiser):
    task = Task(5, labels="logits")
    names = ("images", "labels", "lr")
    expected = frozen_graph(task, names, OPTIMISERS[optimiser])
    _, found = task.gradients("frozen", *names, optimiser=OPTIMISERS[optimiser])
    for name, a, b in zip(names, found, expected, strict=True):
        assert close(a, b), name
    _, exact = task.gradients("exact", *names, optimiser=OPTIMISERS[optimiser])
    assert not close(found[0], exact[0], 1e-3)


def test_one_step_has_nothing_to_freeze():
    task = Task(1)
    _, exact = task.gradients("exact", "images", "lr")
    _, frozen = task.gradients("frozen", "images", "lr")
    assert all(close(a, b) for a, b in zip(frozen, exact, strict=True))


def test_the_published_code_halves_the_gradient_of_the_images():
    task = Task(3)
    _, (images, lr) = task.gradients("frozen", "images", "lr")
    _, (half, same) = task.gradients("frozen", "images", "lr", half_image_gradient=True)
    assert close(half, 0.5 * images)
    assert torch.equal(same, lr)


# --- derivatives of the loss, and beyond ----------------------------------------------------------


def test_other_leaves_of_the_loss_get_their_gradient():
    task = Task(2)
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    images = task.images.clone().requires_grad_()
    loss = unroll(
        *(task.net, task.start, images, task.labels, task.lr, task.batches),
        lambda theta: weight * task.loss_of(theta),
    )
    by_weight, by_images = torch.autograd.grad(loss, [weight, images], retain_graph=True)
    assert close(by_weight, loss.detach() / 2)
    again = torch.autograd.grad(loss, images)[0]  # the history serves any number of times
    assert torch.equal(again, by_images)


@pytest.mark.parametrize("adjoint", ["exact", "frozen"])
@pytest.mark.parametrize("linear", [False, True])
def test_a_third_derivative_is_refused(adjoint, linear):
    """Also where the loss is linear, and its gradient therefore a constant for autograd."""
    task = Task(2)
    images = task.images.clone().requires_grad_()
    arguments = (task.net, task.start, images, task.labels, task.lr, task.batches)
    loss_fn = torch.sum if linear else task.loss_of
    loss = unroll(*arguments, loss_fn, adjoint)
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(NotImplementedError, match="adjoint='graph'"):
        torch.autograd.grad(gradient.square().sum(), images)


def test_graph_has_the_next_derivative_too():
    task = Task(2, "ConvNetD1W4ASwishNN")
    arguments = (task.labels, task.lr, task.batches, task.loss_of, "graph")

    def squared_gradient(images: Tensor) -> Tensor:
        loss = unroll(task.net, task.start, images, *arguments)
        return torch.autograd.grad(loss, images, create_graph=True)[0].square().sum()

    images = task.images.clone().requires_grad_()
    (third,) = torch.autograd.grad(squared_gradient(images), images)
    direction = torch.randn(images.shape, dtype=images.dtype, generator=generator(0, "direction"))
    ahead, behind = (squared_gradient(images + sign * 1e-5 * direction) for sign in (1, -1))
    difference = (ahead - behind) / 2e-5
    assert (third * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_under_compile():
    task = Task(2)
    images = task.images.clone().requires_grad_()

    def loss_of(images: Tensor) -> Tensor:
        return unroll(
            *(task.net, task.start, 2 * images, task.labels, task.lr, task.batches), task.loss_of
        )

    expected = torch.autograd.grad(loss_of(images), images)[0]
    found = torch.autograd.grad(torch.compile(loss_of, backend="eager")(images), images)[0]
    assert close(found, expected)


# --- errors -------------------------------------------------------------------------------------

ROWS = torch.arange(3)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"net": 3}, TypeError, "net: got int"),
        ({"start": torch.zeros(4, dtype=torch.float64)}, ValueError, r"start: got shape \(4,\)"),
        ({"start": [1.0]}, TypeError, "start: expected a floating-point tensor"),
        ({"images": torch.zeros(3, dtype=torch.long)}, TypeError, "images"),
        ({"images": torch.zeros(7, 3, 8, 8)}, ValueError, "images: got torch.float32"),
        ({"labels": torch.zeros(6, dtype=torch.long)}, ValueError, r"labels: got \(6,\)"),
        ({"labels": torch.zeros(7, dtype=torch.int32)}, TypeError, "labels: got torch.int32"),
        ({"labels": torch.zeros(7, dtype=torch.float64)}, ValueError, "labels: got soft ones"),
        ({"lr": torch.zeros(5)}, ValueError, r"lr: got .* \(5,\), expected .* \(2,\)"),
        ({"lr": torch.tensor(1)}, ValueError, "lr: got torch.int64"),
        ({"batches": [ROWS, ROWS + 5]}, ValueError, r"batches\[1\]: positions 5 to 7"),
        ({"batches": [ROWS[:0]]}, ValueError, r"batches\[0\]: is empty"),
        ({"batches": [[0, 1]]}, TypeError, r"batches\[0\]: expected an int64 vector"),
        ({"adjoint": "exakt"}, ValueError, "adjoint: got 'exakt', expected one of exact, frozen"),
        ({"soft": "hard"}, ValueError, "soft: got 'hard'"),
        ({"history": "disk"}, ValueError, "history: got 'disk'"),
        ({"window": 3}, ValueError, "window: got 3, expected 0 to 2"),
        ({"loss_fn": 1}, TypeError, "loss_fn: got int"),
        ({"loss_fn": lambda theta: theta}, ValueError, "loss_fn: returned"),
        ({"adjoint": "graph", "half_image_gradient": True}, ValueError, "half_image_gradient"),
    ],
)
def test_errors_name_the_argument(changes, kind, message):
    task = Task(2)
    arguments = {
        **{name: getattr(task, name) for name in ("net", "start", "images", "labels", "lr")},
        "batches": [ROWS, ROWS],
        "loss_fn": task.loss_of,
        **changes,
    }
    with pytest.raises(kind, match=message):
        unroll(**arguments)


def test_a_window_and_a_gradient_of_the_start_exclude_each_other():
    with pytest.raises(ValueError, match="start: requires a gradient"):
        Task(2).gradients("exact", "start", window=1)


def test_optimisers_check_their_settings():
    for make in (lambda: SGD(1.0), lambda: Adam((0.9, 1.0)), lambda: Adam(eps=0.0)):
        with pytest.raises(ValueError, match="got"):
            make()
