"""DD, LinBa and RaT-BPTT against literal loops through the whole training, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.cli import main
from ddfast.data import normalise
from ddfast.distill import distill, loop
from ddfast.evaluate import evaluate, train_networks
from ddfast.evaluate.protocols import by_own_schedule, protocol
from ddfast.methods import Diverged, bilevel, dd, linba, rat_bptt
from ddfast.random import generator

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


@pytest.fixture(scope="module")
def dataset():
    from tests.methods.conftest import _dataset

    return _dataset([5, 6, 7])


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
    rates = F.softplus(leaves["lr"])
    nets_random = run.generator("network", 0)
    dd.draw_weights(run.net, nets_random, "xavier")
    theta = bilevel.parameters_of(run.net).requires_grad_()
    for i in range(4):  # two groups of two images a class, twice
        group = i % 2
        rows = torch.cat([torch.arange(2) + 4 * c + 2 * group for c in range(3)])
        loss = F.cross_entropy(logits_of(run.net, theta, leaves["images"][rows]), run.labels[rows])
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - rates[i] * g
    rows = torch.randperm(18, generator=run.generator("real batch"))[:7]
    x, y = real(run, rows)
    return F.cross_entropy(logits_of(run.net, theta, x), y)


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
    rows = torch.randperm(18, generator=run.generator("real batch"))[:5000]
    x, y = real(run, rows)
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
        optimiser: Any = torch.optim.Adam(everything, 0.05, (0.5, 0.999))
    elif method == "linba":
        optimiser = torch.optim.SGD(everything, 0.05, 0.5)
    else:
        groups = [{"params": images}, {"params": [leaves["label_weights"]], "lr": 0.1}]
        optimiser = torch.optim.Adam(groups, 0.05)
    losses, mean = [], None
    for iteration in range(iterations):
        run.iteration = iteration
        loss = LITERAL[method](run, leaves)
        optimiser.zero_grad()
        loss.backward()
        if method == "linba":
            torch.nn.utils.clip_grad_norm_(everything, 0.01)
        if method == "rat_bptt":
            norm = leaves["images"].grad.norm()
            mean = norm if mean is None else mean
            leaves["images"].grad *= min(1.0, float(2 * mean / norm))
            mean = 0.9 * mean + 0.1 * norm
        optimiser.step()
        if method == "rat_bptt":
            with torch.no_grad():
                leaves["label_weights"].clamp_(min=0)
        losses.append(loss.item())
    run.iteration = 0
    return {name: leaf.detach() for name, leaf in leaves.items()}, losses


@pytest.mark.parametrize("method", ALL)
def test_steps_of_the_literal_loop(method, make_run, dataset):
    # Without a norm every bias counts: Adam would make steps of what are rounding errors alone.
    model = "ConvNetD1W4NN" if method == "rat_bptt" else MODEL
    run = make_run(method, dataset, **settings_of(method, model=model))
    expected, losses = literal(run, method, 3)
    begin = {name: t.detach().clone() for name, t in run.tensors.items()}
    for loss in losses:
        found = methods.find(method).step(run)
        assert found.shape == (3,) and found.tolist() == pytest.approx([loss] * 3, rel=1e-9)
        run.iteration += 1
    for name, tensor in run.tensors.items():
        # clip_grad_norm_ divides by the norm plus 1e-6
        rtol = 2e-3 if method == "linba" else 1e-6
        moved, wanted = tensor.detach() - begin[name], expected[name] - begin[name]
        assert wanted.norm() > 0
        assert (moved - wanted).norm() <= rtol * wanted.norm(), name


@pytest.mark.parametrize("method", ALL)
def test_real_images_in_pieces_make_no_difference(method, make_run, dataset, monkeypatch):
    monkeypatch.setattr(bilevel, "fitting", lambda *arguments, **options: "")
    gradients = []
    for memory in (1 << 30, 200_000):
        run = make_run(method, dataset, memory, **settings_of(method))
        methods.find(method).step(run)
        gradients.append(torch.cat([t.detach().flatten() for t in run.tensors.values()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ALL)
def test_any_parametrisation(method, make_run, dataset):
    for name in ("pixels", "multi_formation", "hallucinators", "bases"):
        changes = {"parametrisation": name, "ipc": 4, "learn_labels": False}
        changes |= {"shared": 2} if name == "bases" else {"shared": None}
        if name == "bases":
            changes |= {"distill_steps": 1}
        known = {k: v for k, v in settings_of(method, **changes).items() if k in fields(method)}
        run = make_run(method, dataset, **known)
        before = {k: t.detach().clone() for k, t in run.tensors.items()}
        methods.find(method).step(run)
        assert all(not torch.equal(before[k], t.detach()) for k, t in run.tensors.items()), name


def fields(method: str) -> set[str]:
    return set(methods.find(method).config.__dataclass_fields__)


# --- each one's own -----------------------------------------------------------------------------


def test_groups_take_turns_and_hold_every_image_once():
    groups = dd.group_rows(4, 3, 2)
    assert [rows.tolist() for rows in groups] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_a_fixed_network_is_the_same_in_every_iteration(make_run, dataset):
    for how, same in (("fixed", True), ("random", False)):
        run = make_run("dd", dataset, **settings_of("dd", init_net=how))
        first = dd.start(run, 0)
        run.iteration = 1
        assert torch.equal(first, dd.start(run, 0)) == same
        assert not torch.equal(first, dd.start(run, 1))


def test_glorots_weights():
    net = methods.start(
        methods.resolve(dd.Config(ipc=1, model="ConvNetD1W64"), noise()), noise(), 1 << 30
    ).net
    dd.draw_weights(net, generator(0, "x"), "xavier")
    weight = net.classifier.weight
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)
    assert not net.classifier.bias.any() and not net.features[0].bias.any()


def noise():
    from tests.methods.conftest import _dataset

    return _dataset([5, 6, 7])


def test_gradients_of_several_networks_are_averaged(make_run, dataset):
    run = make_run("dd", dataset, **settings_of("dd", sample_n_nets=2))
    found = []

    def note(gradients, *arguments):
        found.append({k: v.clone() for k, v in gradients.items()})

    run.update = note
    dd.step(run)
    parts = []
    for number in range(2):
        made, beside = run.decoded(0, 3), bilevel.leaves_beside(run)
        random = run.generator("real batch")
        rows = torch.randperm(18, generator=random)[:7]
        training = bilevel.Training(
            *(dd.start(run, number), dd.group_rows(4, 3, 2) * 2, F.softplus(beside["lr"]), rows)
        )
        parts.append(bilevel.gradients(run, made, beside, training)[0]["images"])
    torch.testing.assert_close(found[0]["images"], (parts[0] + parts[1]) / 2)


def test_the_learning_rate_of_dd_is_halved(make_run, dataset):
    run = make_run("dd", dataset, **settings_of("dd", decay_iterations=2))
    for wanted in (0.05, 0.05, 0.025, 0.025, 0.0125):
        dd.step(run)
        assert {group["lr"] for group in run.optimiser.param_groups} == {wanted}
        run.iteration += 1


def test_storage_of_linba(dataset):
    """Two bases of 2x4x4 and two coefficients an image, in the storage of two images a class."""
    run_images = linba.Config(**settings_of("linba"))
    config = methods.resolve(run_images, dataset)
    tensors, labels = config.starting_set(dataset, torch.Generator().manual_seed(0))
    assert tensors["images"].shape == (2, 2, 4, 4)
    assert len(labels) == 3 * ((3 * 2 * 128 - 2 * 32) // (3 * 2))
    assert config.history == "host" and "dsa_strategy" in fields("linba")


def test_norms_are_clipped_to_twice_their_mean(make_run, dataset):
    run = make_run("rat_bptt", dataset, **settings_of("rat_bptt"))
    labels = torch.ones(6, 3, dtype=torch.float64)
    small = {"images": torch.ones(6, 2, 8, 8, dtype=torch.float64), "label_weights": labels}
    clipped, norms = rat_bptt.clip(run, small)
    assert torch.equal(clipped["images"], small["images"])  # the first is its own mean
    run.state = norms
    large = {"images": 10 * small["images"], "label_weights": 100 * labels}
    clipped, norms = rat_bptt.clip(run, large)
    torch.testing.assert_close(clipped["images"], 2 * small["images"])
    assert torch.equal(clipped["label_weights"], large["label_weights"])
    size = small["images"].norm()
    torch.testing.assert_close(norms["norm.images"], 0.9 * size + 0.1 * 10 * size)


def test_noise_of_unit_norm_and_labels_that_stay_above_zero(make_run, dataset):
    run = make_run("rat_bptt", dataset, **settings_of("rat_bptt", lr_y=5.0))
    norms = run.images.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)
    rat_bptt.step(run)
    assert run.tensors["label_weights"].min() == 0 and run.tensors["label_weights"].max() > 1


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("dd", {"distill_steps": 3}, "distill_steps: got 3, expected a divisor of the 4 images"),
        ("rat_bptt", {"window": 7}, "window: got 7 behind at least 0 steps, expected at most"),
        ("rat_bptt", {"parametrisation": "bases"}, "learn_labels: labels belong to images"),
        ("linba", {"model": "ConvNetD1W4BN"}, "batch normalisation"),
        ("linba", {"clip": 0.0}, "clip: got 0.0, expected more than 0"),
    ],
)
def test_refusals_before_the_first_step(make_run, dataset, method, changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(method, dataset, **settings_of(method, **changes))


def test_what_is_not_finite_names_the_iteration(make_run, dataset):
    run = make_run("dd", dataset, **settings_of("dd"))
    run.images.data[5] = torch.nan
    run.iteration = 7
    with pytest.raises(Diverged, match="is not finite at iteration 7"):
        dd.step(run)


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_interrupted_and_resumed_is_the_same_bits(method, tmp_path, dataset, monkeypatch):
    config = methods.find(method).config(**settings_of(method, iterations=5))
    whole = distill(method, dataset, config, tmp_path / "whole", progress=False, device="cpu")
    original, calls = loop._Loop.iterate, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(loop._Loop, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(method, dataset, config, tmp_path / "cut", progress=False, device="cpu")
    monkeypatch.setattr(loop._Loop, "iterate", original)
    resumed = distill(method, dataset, config, tmp_path / "cut", progress=False, device="cpu")
    assert torch.equal(resumed.images, whole.images) and resumed.lr == whole.lr
    assert Artefact.load(tmp_path / "cut" / "distilled.safetensors").lr == whole.lr


def test_networks_follow_the_schedule_of_dd(tmp_path, dataset):
    """The protocol against a literal loop; random selections have one of their own."""
    config = dd.Config(**settings_of("dd"))
    artefact = distill("dd", dataset, config, tmp_path, progress=False, device="cpu")
    assert isinstance(artefact.lr, tuple) and len(artefact.lr) == 4
    own = by_own_schedule(protocol("dd", dataset), artefact.lr, 2, "xavier")
    sets = [(artefact.images, artefact.labels)]
    for at_once in (1, 2):
        trained = train_networks(
            sets, MODEL, dataset, own, 2, 3, dtype=torch.float64, at_once=at_once, device="cpu"
        )[0]
        for number, found in enumerate(trained):
            net = methods.start(methods.resolve(config, dataset), dataset, 1 << 30).net
            dd.draw_weights(net, generator(3, "evaluate: weights", 0, number), "xavier")
            net = net.double()
            for i, rate in enumerate(artefact.lr):
                rows = dd.group_rows(4, 3, 2)[i % 2]
                loss = F.cross_entropy(net(artefact.images[rows].double()), artefact.labels[rows])
                for p, g in zip(
                    net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
                ):
                    p.data -= rate * g
            theirs, ours = (bilevel.parameters_of(n) for n in (net, found))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    report = evaluate(
        artefact, dataset, MODEL, "dd", 1, selections=1, progress=False, device="cpu", epochs=1
    )
    rates = {row.name: row.protocol.rates for row in report.rows}
    assert rates == {"distilled": artefact.lr, "random selection": (), "full data": ()}
    with pytest.raises(ValueError, match="protocol: dd needs a set with a learned rate"):
        evaluate(sets[0], dataset, MODEL, "dd", 1, progress=False, device="cpu")


def test_the_commands(tmp_path, capsys):
    words = ["--dataset", "digits", "--model", MODEL, "--ipc", "1", "--iterations", "1", "--quiet"]
    few = {"dd": ["--distill_epochs", "2"], "linba": ["--inner_steps", "2"], "rat_bptt": []}
    for method, more in few.items():
        out = str(tmp_path / method)
        assert main(["distill", method, *words, *more, "--threads", "1", "--out", out]) == 0
    capsys.readouterr()


def test_protocols():
    from tests.test_evaluate_protocols import named

    chosen = protocol("linba", named("CIFAR10"))
    assert (chosen.epochs, chosen.batch, chosen.weight_decay, chosen.decay(150)) == (300, 640, 0, 1)
    chosen = protocol("rat_bptt", named("CIFAR10"), ipc=300)
    assert (chosen.optimiser, chosen.lr, chosen.epochs) == ("adamw", 1e-3, 334)
    assert chosen.strategy == "flip_rotate"
    assert protocol("rat_bptt", named("digits")).strategy == "rotate"
    assert protocol("dd", named("CIFAR10")).epochs == 300
