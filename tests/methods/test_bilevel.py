"""DD, LinBa and RaT-BPTT against literal loops through the whole training, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import methods
from ddfast.data import normalise
from ddfast.methods import bilevel, dd, linba, rat_bptt
from ddfast.methods.pretrained import flattened
from ddfast.random import generator
from ddfast.unroll import SGD, Adam

MODEL = "ConvNetD1W4"
SETTINGS: dict[str, dict[str, Any]] = {
    "dd": {"ipc": 4, "distill_steps": 2, "distill_epochs": 2, "distill_lr": 0.1, "batch_real": 7},
    "linba": {
        "ipc": 2,
        "inner_steps": 5,
        "batch_per_class": 1,
        "batch_real": 3,
        "shared": 2,
        "dsa_strategy": "flip_rotate",
        "clip": 0.01,
        "inner_lr": 0.05,
    },
    "rat_bptt": {
        "ipc": 2,
        "window": 3,
        "totwindow": 6,
        "batch_per_class": 1,
        "task_sampler_nc": 2,
        "learn_labels": True,
        "lr_y": 0.1,
        "dsa_strategy": "flip_rotate",
        "inner_lr": 1e-2,
    },
}
ALL = tuple(SETTINGS)


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([5, 6, 7])


def settings_of(method: str, **changes) -> dict[str, Any]:
    return {"model": MODEL, "iterations": 3, "lr_img": 0.05, **SETTINGS[method], **changes}


def logits_of(net: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    named = dict(net.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    weights = {n: p.view(named[n].shape) for n, p in zip(named, parts, strict=True)}
    return torch.func.functional_call(net, weights, (x,))


def real(run, rows: Tensor) -> tuple[Tensor, Tensor]:
    data = run.dataset
    x = normalise(data.train_images[rows], data.mean, data.std, torch.float64)
    return x, data.train_labels[rows]


def literal_dd(run, leaves: dict[str, Tensor]) -> Tensor:
    config, rates = run.config, F.softplus(leaves["lr"])
    order = torch.randperm(18, generator=generator(0, "real images", run.iteration // 3))
    x, y = real(run, order.split(7)[run.iteration % 3])  # 7, 7 and 4 are an epoch
    losses = []
    for number in range(config.sample_n_nets):
        random = generator(0, "network", run.iteration, number)
        if config.init_net == "fixed":
            random = generator(0, "fixed network", number)
        dd.draw_weights(run.net, random, config.init_weights)
        theta = flattened(run.net).requires_grad_()
        for i in range(4):  # two groups of two images a class, twice
            rows = torch.cat([torch.arange(2) + 4 * c + 2 * (i % 2) for c in range(3)])
            out = logits_of(run.net, theta, leaves["images"][rows])
            loss = F.cross_entropy(out, run.labels[rows])
            (g,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - rates[i] * g
        losses.append(F.cross_entropy(logits_of(run.net, theta, x), y))
    return torch.stack(losses).mean()


def literal_linba(run, leaves: dict[str, Tensor]) -> Tensor:
    flat = torch.einsum("nk,kchw->nchw", leaves["coefficients"], leaves["images"])
    images = F.interpolate(flat, size=(8, 8), mode="bilinear", align_corners=False)
    per_class = len(images) // 3
    theta = bilevel.fresh_start(run).requires_grad_()
    b = torch.zeros_like(theta)
    draw = run.augment.draw(run.generator("augmentation"), (8, 8))
    random = run.generator("minibatches")
    for _ in range(5):
        rows = torch.cat(
            [c * per_class + torch.randperm(per_class, generator=random)[:1] for c in range(3)]
        )
        x = run.augment(images[rows], draw)
        loss = F.cross_entropy(logits_of(run.net, theta, x), rows // per_class)
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        b = 0.9 * b + g
        theta = theta - 0.05 * b
    random = run.generator("real batch")
    x, y = real(run, torch.cat([run.sampler.sample(c, 3, random) for c in range(3)]))
    return F.cross_entropy(logits_of(run.net, theta, run.augment(x, draw)), y)


def literal_rat_bptt(run, leaves: dict[str, Tensor]) -> Tensor:
    before = 3  # the longest training
    if run.config.cctype == "random":
        before = int(torch.randint(0, 4, (), generator=run.generator("window")))
    theta = bilevel.fresh_start(run).requires_grad_()
    m, s = torch.zeros_like(theta), torch.zeros_like(theta)
    random = run.generator("minibatches")
    for i in range(before + 3):
        if i == before:  # what came before is a constant
            theta, m, s = theta.detach().requires_grad_(), m.detach(), s.detach()
        chosen = torch.randperm(3, generator=random)[:2].sort().values.tolist()
        rows = torch.cat([2 * c + torch.randperm(2, generator=random)[:1] for c in chosen])
        draw = run.augment.draw(run.generator("augmentation", i), (8, 8), count=2)
        out = logits_of(run.net, theta, run.augment(leaves["images"][rows], draw))
        loss = -(leaves["label_weights"][rows] * F.log_softmax(out, 1)).sum(1).mean()
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        root = torch.where(s > 0, s, 1).sqrt() * (s > 0)
        denominator = root / (1 - 0.999 ** (i + 1)) ** 0.5 + 1e-8
        theta = theta - 1e-2 * m / (1 - 0.9 ** (i + 1)) / denominator
    x, y = real(run, torch.randperm(18, generator=generator(0, "real images", run.iteration)))
    draw = run.augment.draw(run.generator("real augmentation"), (8, 8), count=18)
    return F.cross_entropy(logits_of(run.net, theta, run.augment(x, draw)), y)


LITERAL = {"dd": literal_dd, "linba": literal_linba, "rat_bptt": literal_rat_bptt}


def literal(run, method: str, iterations: int) -> tuple[dict[str, Tensor], list[float]]:
    """The published loops: one graph, torch's optimisers."""
    config = run.config
    leaves = {name: t.detach().clone().requires_grad_() for name, t in run.tensors.items()}
    everything = list(leaves.values())
    images = [t for name, t in leaves.items() if name not in config.beside]
    if method == "dd":
        optimiser: Any = torch.optim.Adam(everything, 0.05, (config.momentum, 0.999))
    elif method == "linba":
        optimiser = torch.optim.SGD(everything, 0.05, 0.5)
    else:
        groups = [{"params": images}, {"params": [leaves["label_weights"]], "lr": 0.1}]
        optimiser = torch.optim.Adam(groups, 0.05)
    losses, mean = [], run.state.get("norm.images")
    for iteration in range(iterations):
        run.iteration = iteration
        loss = LITERAL[method](run, leaves)
        optimiser.zero_grad()
        loss.backward()
        if method == "linba":
            torch.nn.utils.clip_grad_norm_(everything, config.clip)
        if method == "rat_bptt":
            norm = leaves["images"].grad.norm()
            mean = norm if mean is None else 0.9 * mean + 0.1 * norm
            torch.nn.utils.clip_grad_norm_([leaves["images"]], 2 * float(mean))
        optimiser.step()
        if method == "rat_bptt":
            with torch.no_grad():
                leaves["label_weights"].clamp_(min=0)
        losses.append(loss.item())
    run.iteration = 0
    return {name: leaf.detach() for name, leaf in leaves.items()}, losses


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dd", {}),
        ("dd", {"sample_n_nets": 2, "init_weights": "default", "momentum": 0.9}),
        ("dd", {"init_net": "fixed", "init": "real"}),
        ("linba", {}),
        ("linba", {"clip": 100.0, "init": "real", "history": "checkpoints"}),
        ("rat_bptt", {}),
        ("rat_bptt", {"clipped": True}),
        ("rat_bptt", {"cctype": "fixed"}),
    ],
)
def test_steps_of_the_literal_loop(method, changes, make_run, dataset):
    # Without a norm every bias counts: Adam would make steps of what are rounding errors alone.
    model = "ConvNetD1W4NN" if method == "rat_bptt" else MODEL
    changes = dict(changes)
    cut = changes.pop("clipped", False)
    run = make_run(method, dataset, **settings_of(method, model=model, **changes))
    if cut:  # of an earlier time with far smaller gradients
        run.state = {"norm.images": torch.tensor(1e-4, dtype=torch.float64)}
    expected, losses = literal(run, method, 4)
    begin = {name: t.detach().clone() for name, t in run.tensors.items()}
    for loss in losses:
        found = methods.find(method).step(run)
        assert found.shape == (3,) and found.tolist() == pytest.approx([loss] * 3, rel=1e-11)
        run.iteration += 1
    for name, tensor in run.tensors.items():
        moved, wanted = tensor.detach() - begin[name], expected[name] - begin[name]
        assert wanted.norm() > 0
        assert (moved - wanted).norm() <= 1e-10 * wanted.norm(), name


def test_linba_adjoint_as_its_docstring_has_it(make_run, dataset):
    run = make_run("linba", dataset, **settings_of("linba", parametrisation="pixels"))
    made, net = run.decoded(0, 3), run.net
    batches = bilevel.minibatches(run, made, 5, 1)
    training = bilevel.Training(
        bilevel.fresh_start(run), batches, torch.tensor(0.05).double(), torch.arange(18), SGD(0.9)
    )
    found, _ = bilevel.gradients(run, made, {}, training)

    def gradient(theta: Tensor, images: Tensor, rows: Tensor) -> Tensor:
        loss = F.cross_entropy(logits_of(net, theta, images[rows]), run.labels[rows])
        return torch.autograd.grad(loss, theta, create_graph=True)[0]

    images, theta = run.images.detach().clone().requires_grad_(), training.start
    lr, b, thetas = training.lr, torch.zeros_like(theta), []
    for rows in batches:
        thetas.append(theta.clone().requires_grad_())
        b = 0.9 * b + gradient(thetas[-1], images, rows).detach()
        theta = theta - lr * b
    end = theta.requires_grad_()
    x, y = real(run, training.real)
    (a,) = torch.autograd.grad(F.cross_entropy(logits_of(net, end, x), y), end)
    c, total = torch.zeros_like(a), torch.zeros_like(images)
    for rows, theta in reversed(list(zip(batches, thetas, strict=True))):
        c = c - lr * a
        inner = (gradient(theta, images, rows) * c).sum()
        by_images, by_theta = torch.autograd.grad(inner, [images, theta])
        total, a, c = total + by_images, a + by_theta, 0.9 * c
    assert (found["images"] - total).norm() <= 1e-12 * total.norm()


@pytest.mark.parametrize("window", [None, 0])
def test_without_steps_nothing_is_learned(make_run, dataset, window):
    """No steps at all, or none with derivatives."""
    run = make_run("rat_bptt", dataset, **settings_of("rat_bptt"))
    made, beside = run.decoded(0, 3), bilevel.leaves_beside(run)
    batches = [] if window is None else bilevel.minibatches(run, made, 2, 1)
    start = bilevel.fresh_start(run)
    training = bilevel.Training(
        *(start, batches, torch.tensor(0.1), torch.arange(18), Adam()),
        labels=beside["label_weights"],
        window=window,
    )
    found, loss = bilevel.gradients(run, made, beside, training)
    assert not any(gradient.any() for gradient in found.values()) and len(found) == 2
    x, y = real(run, training.real)
    at_start = F.cross_entropy(logits_of(run.net, start, x), y).item()
    assert (loss.item() == pytest.approx(at_start, rel=1e-12)) == (window is None)


def test_linba_without_steps_stays_as_it_is(make_run, dataset):
    run = make_run("linba", dataset, **settings_of("linba", inner_steps=0))
    begin = {name: t.detach().clone() for name, t in run.tensors.items()}
    linba.step(run)
    assert all(torch.equal(begin[name], t) for name, t in run.tensors.items())


@pytest.mark.parametrize("method", ALL)
def test_real_images_in_pieces_make_no_difference(method, make_run, dataset, monkeypatch):
    monkeypatch.setattr("ddfast.methods.run.fitting", lambda *arguments, **options: "")
    gradients = []
    for memory in (1 << 30, 200_000):
        run = make_run(method, dataset, memory, **settings_of(method))
        methods.find(method).step(run)
        gradients.append(torch.cat([t.detach().flatten() for t in run.tensors.values()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", ["pixels", "multi_formation", "hallucinators", "bases"])
def test_any_parametrisation(method, name, make_run, dataset, monkeypatch):
    """The gradient of all that is learned, labels and rates too, against a difference."""
    changes: dict[str, Any] = {"parametrisation": name, "ipc": 2, "model": "ConvNetD1W4NN"}
    changes |= {"shared": 2} if name in ("bases", "hallucinators") else {"shared": None}
    changes |= {"distill_steps": 1, "init": "real", "window": 6}
    known = methods.find(method).config.__dataclass_fields__
    settings = {k: v for k, v in settings_of(method, **changes).items() if k in known}
    run = make_run(method, dataset, **settings)
    gradients: list[dict[str, Tensor]] = []
    monkeypatch.setattr(run, "update", lambda found, *rest: gradients.append(dict(found)))

    def loss_at(move: float) -> float:
        with torch.no_grad():
            for tensor, begin, way in zip(run.tensors.values(), begins, ways, strict=True):
                tensor.copy_(begin + move * way)
        return methods.find(method).step(run)[0].item()

    monkeypatch.setattr(rat_bptt, "clip", lambda run, gradients: (gradients, {}))
    begins = [t.detach().clone() for t in run.tensors.values()]
    ways = [torch.zeros_like(t) for t in begins]
    loss_at(0)
    ways = [gradients[0][tensor] for tensor in run.tensors]
    assert all(way.any() for way in ways)
    ways = [way / way.norm() for way in ways]  # each tensor's counts as much
    slope = sum(
        (gradients[0][t] * way).sum().item() for t, way in zip(run.tensors, ways, strict=True)
    )
    found = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    assert found == pytest.approx(slope, rel=1e-5)
