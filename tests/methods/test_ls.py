"""LS against the closed form of whole matrices, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ddfast.artefact import Artefact
from ddfast.data import normalise
from ddfast.distill import distill
from ddfast.kernel_matrix import kernel_matrix
from ddfast.methods import ls


@pytest.fixture
def dataset(make_dataset):
    return make_dataset([15, 16, 17])


def expected(run) -> torch.Tensor:
    data, n = run.dataset, len(run.images)
    x = run.images.detach()
    t = normalise(data.train_images, data.mean, data.std, torch.float64)
    t = t if data.whitening is None else data.whitening(t)
    k_ss, k_ts = kernel_matrix(x, depth=1), kernel_matrix(t, x, depth=1)
    ridge = run.config.reg * k_ss.trace() / n * torch.eye(n, dtype=torch.float64)
    wanted = F.one_hot(data.train_labels, 3).double() - 1 / 3
    return torch.linalg.pinv(k_ts @ torch.linalg.inv(k_ss + ridge)) @ wanted


@pytest.mark.parametrize("memory", [1 << 30, 20_000])
@pytest.mark.parametrize("zca", ["none", "frepo"])
def test_equals_the_closed_form(dataset, make_run, memory, zca) -> None:
    run = make_run("ls", dataset, ipc=2, kernel="ntk-fc1", zca=zca, reg=1e-3)
    run.memory = memory
    before, wanted = run.images.detach().clone(), expected(run)
    losses = ls.step(run)
    torch.testing.assert_close(run.tensors["label_weights"], wanted, rtol=1e-8, atol=1e-10)
    assert torch.equal(run.images, before)
    assert losses.shape == (3,) and losses[0] > 0


def test_the_labels_are_the_best(dataset, make_run) -> None:
    """Their loss is the smallest: any change of them makes it larger."""
    run = make_run("ls", dataset, ipc=2, kernel="ntk-fc1")
    best = ls.step(run)[0]
    data, x = run.dataset, run.images.detach()
    t = normalise(data.train_images, data.mean, data.std, torch.float64)
    k_ss, k_ts = kernel_matrix(x, depth=1), kernel_matrix(t, x, depth=1)
    k_ss += 1e-6 * k_ss.trace() / 6 * torch.eye(6, dtype=torch.float64)
    wanted = F.one_hot(data.train_labels, 3).double() - 1 / 3

    def loss(labels):
        return (k_ts @ torch.linalg.solve(k_ss, labels) - wanted).square().mean() / 2

    labels = run.tensors["label_weights"].detach()
    torch.testing.assert_close(best, loss(labels), rtol=1e-9, atol=0)
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        change = torch.randn(labels.shape, generator=random, dtype=torch.float64)
        assert loss(labels + 1e-3 * change) > best


def test_the_artefact_has_labels_and_real_images(dataset, tmp_path) -> None:
    config = ls.Config(ipc=2, kernel="ntk-fc1")
    distill("ls", dataset, config, tmp_path, progress=False, device="cpu")
    found = Artefact.load(tmp_path / "distilled.safetensors")
    assert found.soft_labels.shape == (6, 3)
    pixels = found.to_pixels()
    assert all((dataset.train_images == image).flatten(1).all(1).any() for image in pixels)
    assert found.config["iterations"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 2}, "iterations: got 2, expected 1, a closed form"),
        (
            {"parametrisation": "multi_formation"},
            "parametrisation: got 'multi_formation', expected",
        ),
        ({"kernel": "x"}, "kernel: got 'x'"),
    ],
)
def test_what_cannot_work_is_refused(dataset, make_run, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_run("ls", dataset, **{"ipc": 1} | changes)
