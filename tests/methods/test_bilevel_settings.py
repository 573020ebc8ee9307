"""What is particular to DD, LinBa and RaT-BPTT, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from ddfast import methods
from ddfast.data import generated
from ddfast.methods import Diverged, bilevel, dd, linba, rat_bptt
from ddfast.random import generator
from tests.methods.test_bilevel import settings_of


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([5, 6, 7])


def test_step_i_of_the_student_takes_group_i_mod_s(make_run, dataset, monkeypatch):
    run = make_run("dd", dataset, **settings_of("dd", distill_epochs=3, distill_lr=0.02))
    seen = []

    def gradients(run, made, beside, training):
        seen.append(training)
        return run.no_gradients(), torch.zeros((), dtype=torch.float64)

    monkeypatch.setattr(bilevel, "gradients", gradients)
    dd.step(run)
    assert [rows.tolist() for rows in seen[0].batches] == [
        [0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11],
    ] * 3  # fmt: skip
    assert seen[0].lr.tolist() == pytest.approx([0.02] * 6)  # inverse softplus and back


def test_every_real_image_once_an_epoch(make_run, dataset):
    run = make_run("dd", dataset, **settings_of("dd"))
    epochs = []
    for _ in range(2):
        taken = []
        for _ in range(3):
            taken.append(bilevel.in_turn(run, 7))
            run.iteration += 1
        assert [len(each) for each in taken] == [7, 7, 4]
        epochs.append(torch.cat(taken))
        assert sorted(epochs[-1].tolist()) == list(range(18))
    assert not torch.equal(*epochs)
    assert sorted(bilevel.in_turn(run, 5000).tolist()) == list(range(18))


def test_a_fixed_network_is_the_same_in_every_iteration(make_run, dataset):
    for how, same in (("fixed", True), ("random", False)):
        run = make_run("dd", dataset, **settings_of("dd", init_net=how))
        first = dd.start(run, 0)
        run.iteration = 1
        assert torch.equal(first, dd.start(run, 0)) == same
        assert not torch.equal(first, dd.start(run, 1))


def test_glorots_weights(dataset):
    config = methods.resolve(dd.Config(ipc=1, model="ConvNetD1W64"), dataset)
    net = methods.start(config, dataset, 1 << 30).net
    dd.draw_weights(net, generator(0, "x"), "xavier")
    weight = net.classifier.weight
    assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)
    assert not net.classifier.bias.any() and not net.features[0].bias.any()


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
    assert config.history == "host"
    for name, rows, columns in (("images", 2, 32), ("coefficients", len(labels), 2)):
        bound = (6 / (rows + columns)) ** 0.5  # Glorot's uniform distribution
        assert 0.9 * bound < tensors[name].abs().max() <= bound


def test_norms_are_clipped_to_twice_their_mean(make_run, dataset):
    run = make_run("rat_bptt", dataset, **settings_of("rat_bptt"))
    labels = torch.ones(6, 3, dtype=torch.float64)
    small = {"images": torch.ones(6, 2, 8, 8, dtype=torch.float64), "label_weights": labels}
    clipped, norms = rat_bptt.clip(run, small)
    size = small["images"].norm()
    assert norms == {"norm.images": size}  # the first is its own mean
    assert torch.equal(clipped["images"], small["images"])
    run.state = norms
    large = {"images": 10 * small["images"], "label_weights": 100 * labels}
    clipped, norms = rat_bptt.clip(run, large)
    torch.testing.assert_close(norms["norm.images"], 1.9 * size, rtol=1e-14, atol=0)
    torch.testing.assert_close(clipped["images"].norm(), 3.8 * size, rtol=1e-7, atol=0)
    assert torch.equal(clipped["label_weights"], large["label_weights"])


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
        ("rat_bptt", {"task_sampler_nc": 4}, "task_sampler_nc: got 4, and small has 3 classes"),
        (
            "dd",
            {"images_per_class_per_step": 3},
            "images_per_class_per_step: got 3, with 2 distill_steps for 6 .* expected ipc, 4",
        ),
        ("linba", {"model": "ConvNetD1W4BN"}, "batch normalisation"),
        ("dd", {"distill_lr": 1e39}, "distill_lr: got 1e[+]39, expected less than 1000000"),
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
    with pytest.raises(Diverged, match="not finite at iteration 7, after 4 steps of the student"):
        dd.step(run)


def test_a_failed_step_leaves_no_trace_of_its_norm(make_run, dataset):
    run = make_run("rat_bptt", dataset, **settings_of("rat_bptt", inner_lr=1e300))
    with pytest.raises(Diverged, match=r"iteration 0, after [3-6] steps of the student; a smaller"):
        rat_bptt.step(run)
    assert run.state == {}


@pytest.mark.parametrize(
    ("method", "ipc", "wanted"),
    [
        ("dd", 1, {"distill_steps": 1, "distill_epochs": 3, "distill_lr": 0.02, "lr_img": 0.01}),
        ("dd", 10, {"distill_steps": 10, "init": "noise", "batch_real": 1024, "momentum": 0.5}),
        ("linba", 1, {"inner_steps": 150, "inner_lr": 0.01, "lr_img": 0.1, "clip": 2.0}),
        ("linba", 1, {"shared": 16, "base_scale": 2, "iterations": 500_000, "momentum": 0.5}),
        ("rat_bptt", 10, {"window": 60, "totwindow": 200, "lr_img": 1e-3, "batch_real": 5000}),
        ("rat_bptt", 10, {"inner_lr": 1e-3, "cctype": "random", "learn_labels": False}),
    ],
)
def test_published_settings(method, ipc, wanted):
    """Of ten classes at 32x32, which take CIFAR-10's."""
    data = generated(classes=10, size=32, train_per_class=10, test_per_class=1)
    config = methods.resolve(methods.find(method).config(ipc=ipc), data)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("classes", "size", "ipc", "wanted"),
    [
        (100, 32, 1, {"window": 90, "totwindow": 130, "lr_img": 3e-4, "learn_labels": True}),
        (100, 32, 10, {"window": 100, "totwindow": 300, "lr_img": 1e-3, "learn_labels": True}),
        (200, 64, 10, {"window": 100, "task_sampler_nc": 50, "batch_real": 1000}),
        (1000, 64, 1, {"window": 80, "totwindow": 280, "lr_img": 3e-4, "batch_real": 1500}),
    ],
)
def test_rat_bptt_settings_of_larger_sets(classes, size, ipc, wanted):
    data = generated(classes=classes, size=size, train_per_class=1, test_per_class=1)
    config = methods.resolve(rat_bptt.Config(ipc=ipc), data)
    assert {name: getattr(config, name) for name in wanted} == wanted
