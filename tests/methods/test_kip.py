"""KIP against a loop written out by hand, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.augment import DSA
from ddfast.data import normalise, whitened
from ddfast.distill import distill
from ddfast.distill.folder import unfinished
from ddfast.methods import Diverged, infinite_width, kip
from ddfast.random import generator

SETTINGS: dict[str, Any] = {
    "ipc": 2,
    "kernel": "ntk-fc2",
    "batch_real": 11,
    "iterations": 100,
    "lr_img": 0.03,
    "reg": 1e-4,
}


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([5, 6, 7])


def kernel(x: Tensor, y: Tensor, depth: int = 2) -> Tensor:
    """The recursion of the neural tangent kernel, layer by layer and variance by variance.

    Of equal images the angle is zero, and its derivative, which is infinite, counts for nothing.
    """
    x, y = x.flatten(1), y.flatten(1)
    same = (x[:, None] == y[None]).all(2)
    kx, ky = (2 * (t * t).mean(1) + 0.01 for t in (x, y))
    k = 2 * x @ y.mT / x.shape[1] + 0.01
    k = torch.where(same, (kx[:, None] + ky[None]) / 2, k)
    theta = k
    for _ in range(depth):
        p = (kx[:, None] * ky[None, :]).sqrt()
        c = (k / p).masked_fill(same, 0.0)
        angle = torch.arccos(c)
        s = torch.where(same, k / 2, p / (2 * math.pi) * (angle.sin() + (math.pi - angle) * c))
        slope = ((math.pi - angle) / (2 * math.pi)).masked_fill(same, 0.5)
        k = 2 * s + 0.01
        kx, ky = kx + 0.01, ky + 0.01
        theta = k + 2 * slope * theta
    return theta


def literal(run, iterations: int) -> tuple[dict[str, Tensor], list[float]]:
    config, data = run.config, run.dataset
    state = {name: t.detach().clone().requires_grad_() for name, t in run.tensors.items()}
    m = {name: torch.zeros_like(t) for name, t in state.items()}
    s = {name: torch.zeros_like(t) for name, t in state.items()}
    rates = {"images": config.lr_img, "label_weights": config.lr_labels}
    classes, history = data.num_classes, []
    for it in range(iterations):
        rows = torch.arange(len(data.train_labels))
        if len(rows) > config.batch_real:
            rows = run.sampler.sample_all(
                config.batch_real // classes, generator(0, "real images", it)
            )[0]
        t = normalise(data.train_images[rows], data.mean, data.std, torch.float64)
        if data.whitening is not None:
            t = data.whitening(t)
        dsa = DSA(config.dsa_strategy)
        draw = dsa.draw(generator(0, "augmentation", it), data.size, len(rows), independent=True)
        t = dsa(t, draw)
        x = state["images"]
        y = state.get("label_weights", F.one_hot(run.labels, classes).double() - 1 / classes)
        k_ss, k_ts = kernel(x, x), kernel(t, x)
        ridge = config.reg * k_ss.trace() / len(x) * torch.eye(len(x), dtype=torch.float64)
        p = k_ts @ torch.linalg.solve(k_ss + ridge, y)
        wanted = F.one_hot(data.train_labels[rows], classes).double() - 1 / classes
        loss = ((p - wanted) ** 2).mean() / 2
        history.append(loss.item())
        found = torch.autograd.grad(loss, list(state.values()))
        for (name, old), g in zip(list(state.items()), found, strict=True):
            m[name] = 0.9 * m[name] + 0.1 * g
            s[name] = 0.999 * s[name] + 0.001 * g * g
            root = (s[name] / (1 - 0.999 ** (it + 1))).sqrt() + 1e-8
            moved = old.detach() - rates[name] * m[name] / (1 - 0.9 ** (it + 1)) / root
            state[name] = moved.requires_grad_()
    return state, history


def go(run, iterations: int) -> list[float]:
    history = []
    for _ in range(iterations):
        losses = kip.step(run)
        assert losses.shape == (run.dataset.num_classes,) and len(set(losses.tolist())) == 1
        history.append(losses[0].item())
        run.iteration += 1
    return history


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_labels": True, "lr_labels": 0.01},
        {"batch_real": 5000, "init": "noise"},
        {"zca": "frepo"},
        {"zca": "kip", "learn_labels": True},
        {"dsa_strategy": "crop_flip"},
    ],
)
def test_equals_the_literal_loop(dataset, make_run, changes) -> None:
    run = make_run("kip", dataset, **SETTINGS | changes)
    if "zca" in changes:
        assert torch.equal(
            run.dataset.whitening.matrix, whitened(dataset, changes["zca"]).whitening.matrix
        )
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the real images, where the kernel's slope is infinite
        run.images.add_(torch.randn(run.images.shape, generator=random), alpha=0.1)
    state, history = literal(run, 4)
    assert go(run, 4) == pytest.approx(history, rel=1e-9)
    assert set(state) == set(run.tensors)
    for name, tensor in state.items():
        torch.testing.assert_close(run.tensors[name], tensor, rtol=1e-7, atol=1e-9)


def test_a_real_image_is_the_same_as_its_copy_among_the_targets(dataset) -> None:
    config = methods.resolve(kip.Config(**SETTINGS), dataset)
    run = methods.start(config, dataset, 1 << 30)
    support = run.images.detach().double()
    every = torch.arange(len(dataset.train_labels))
    (images, _), *_ = infinite_width.targets(run, every, support, None)
    same = (support[:, None] == images[None]).flatten(2).all(2)
    assert same.any(1).all()


def test_blocks_change_nothing_beyond_rounding(dataset, make_run) -> None:
    settings = SETTINGS | {"learn_labels": True, "dsa_strategy": "crop_flip"}
    whole, cut = make_run("kip", dataset, **settings), make_run("kip", dataset, **settings)
    cut.memory = 16_000  # three images
    assert go(cut, 4) == pytest.approx(go(whole, 4), rel=1e-10)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(cut.tensors[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kernel", ["nngp-fc1", "ntk-conv2", "ntk-conv1-gap", "ntk-kip_convnet"])
def test_other_kernels_learn(dataset, make_run, kernel) -> None:
    run = make_run("kip", dataset, **SETTINGS | {"kernel": kernel, "batch_real": 18})
    history = go(run, 8)
    assert history[-1] < 0.9 * history[0]


def test_other_parametrisations_learn(dataset, make_run) -> None:
    settings = {"parametrisation": "multi_formation", "batch_real": 18, "learn_labels": True}
    run = make_run("kip", dataset, **SETTINGS | settings)
    history = go(run, 8)
    assert history[-1] < 0.9 * history[0]
    assert run.tensors["label_weights"].shape == (6, 3)


@pytest.mark.parametrize("changes", [{}, {"learn_labels": True, "zca": "rfad"}])
def test_interrupted_and_resumed_is_the_same_bits(dataset, same_when_resumed, changes) -> None:
    config = kip.Config(**SETTINGS | {"iterations": 6} | changes)
    artefact = same_when_resumed("kip", dataset, config, 4)
    assert (artefact.soft_labels is None, artefact.whitening is None) == (not changes,) * 2


def test_the_artefact_has_what_it_takes(tmp_path, dataset) -> None:
    config = kip.Config(**SETTINGS | {"iterations": 3, "learn_labels": True, "zca": "mtt"})
    distill("kip", dataset, config, tmp_path, progress=False, device="cpu")
    found = Artefact.load(tmp_path / "distilled.safetensors")
    assert found.soft_labels.shape == (6, 3) and found.soft_labels.min() < 0
    assert found.whitening.mode == "mtt" and found.config["zca"] == "mtt"
    assert (found.config["kernel"], found.config["reg"]) == ("ntk-fc2", 1e-4)
    assert (tmp_path / "grid.png").exists()


def test_an_unfinished_whitened_run_is_not_shown_as_it_is(dataset, same_when_resumed) -> None:
    def refused(folder) -> None:
        with pytest.raises(ValueError, match=r"its images are whitened; grid\.png there shows"):
            unfinished(folder)

    config = kip.Config(**SETTINGS | {"iterations": 6, "zca": "mtt"})
    same_when_resumed("kip", dataset, config, 4, between=refused)


def test_learned_labels_are_off(dataset, make_run) -> None:
    run = make_run("kip", dataset, **SETTINGS)
    assert set(run.tensors) == {"images"} and run.config.beside == ()


def test_published_settings(make_dataset) -> None:
    dataset = dataclasses.replace(make_dataset([3, 3], channels=3, size=(32, 32)), name="CIFAR10")
    config = methods.resolve(kip.Config(ipc=1), dataset)
    assert (config.kernel, config.dtype, config.reg) == ("ntk-kip_convnet", "float64", 1e-6)
    assert (config.weight_var, config.bias_var) == (2.0, 0.01)
    assert (config.iterations, config.batch_real, config.init) == (50_000, 5000, "real")
    assert (config.lr_img, config.lr_labels, config.momentum) == (4e-2, 4e-2, 0.9)
    assert (config.learn_labels, config.dsa_strategy, config.zca) == (False, "none", "none")
    assert methods.resolve(kip.Config(ipc=1, lr_img=0.1), dataset).lr_labels == 0.1


def test_dtype_is_of_the_kernel(dataset, tmp_path) -> None:
    """In float32 the same images to rounding, for images that are no near-duplicates."""
    found = []
    for dtype in ("float32", "float64"):
        config = kip.Config(**SETTINGS | {"iterations": 5, "dtype": dtype, "reg": 1e-2})
        out = tmp_path / dtype
        found.append(distill("kip", dataset, config, out, progress=False, device="cpu").images)
    assert not torch.equal(*found)
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def test_what_is_not_finite_is_named(dataset, make_run) -> None:
    run = make_run("kip", dataset, **SETTINGS)
    with torch.no_grad():
        run.images[3] = float("nan")
    with pytest.raises(Diverged, match=r"the loss of class .* is not finite at iteration 0"):
        kip.step(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "resnet"}, "kernel: got 'resnet', expected KIND-NETWORK"),
        ({"kernel": "ntk-conv4"}, "x: got images of 8 x 8, expected at least 16 x 16"),
        ({"batch_real": 2}, "batch_real: got 2, expected an image of each of the 3 classes"),
        ({"memory": 3000}, "memory: the budget of 3000 bytes is too small"),
        ({"zca": "kip", "parametrisation": "bases"}, "zca: got 'kip' with parametrisation bases"),
        ({"zca": "pca"}, "zca: got 'pca'"),
    ],
)
def test_what_cannot_work_is_refused(dataset, make_run, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_run("kip", dataset, **SETTINGS | changes)
