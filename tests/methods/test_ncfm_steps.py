"""In which steps NCFM moves its images: batches, the optimiser, its schedule; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddfast.methods import Run, ncfm

SETTINGS: dict[str, Any] = {
    "ipc": 1,
    "model": "ConvNetD2W4",
    "batch_real": 5,
    "factor": 2,
    "num_freqs": 40,
    "num_premodel": 2,
    "pretrain_epochs": 3,
    "batch_train": 6,
    "lr_img": 0.05,
    "weight_decay": 0.1,
    "iterations": 3,
}


def prepared(make_run, dataset, **settings: Any) -> Run:
    run = make_run("ncfm", dataset, **SETTINGS | settings)
    for _ in ncfm.prepare(run):
        pass
    return run


def go(run: Run, iterations: int) -> None:
    for _ in range(iterations):
        ncfm.step(run)
        run.iteration += 1


def test_in_the_course_of_a_run_every_image_of_a_class_is_matched(make_dataset, make_run) -> None:
    """The released code has the first ones always."""
    dataset = make_dataset([30, 12, 4])
    run = make_run("ncfm", dataset, **SETTINGS)
    seen = set()
    for run.iteration in range(60):
        batch = ncfm.real_batch(run)
        assert batch.counts == [5, 5, 4]
        labels = torch.arange(3).repeat_interleave(torch.tensor(batch.counts))
        assert torch.equal(dataset.train_labels[batch.indices], labels)
        seen |= set(batch.indices.tolist())
    assert len(seen) == 46
    run = make_run("ncfm", dataset, **SETTINGS, real_batches="first")
    batches = []
    for run.iteration in range(3):
        batches.append(ncfm.real_batch(run).indices)
    first = [(dataset.train_labels == c).nonzero()[:5, 0] for c in range(3)]
    assert all(torch.equal(batch, torch.cat(first)) for batch in batches)


@pytest.mark.parametrize(("step", "steps"), [("joint", 2), ("per_class", 6)])
def test_steps_of_the_optimiser(make_dataset, make_run, step, steps) -> None:
    """Two an iteration, or as released two for each class, on all images."""
    run = prepared(make_run, make_dataset([9, 4, 12]), step=step)
    go(run, 2)
    assert run.optimiser.state[run.images]["step"].item() == 2 * steps


def test_the_order_of_the_classes_matters_to_the_released_steps_only(
    make_dataset, make_run, monkeypatch
) -> None:
    """With the same gradient for every image they go equally far in a joint step."""
    monkeypatch.setattr(
        ncfm, "distances", lambda group, **_: (torch.ones(len(group.made.counts)).double(),
                                               torch.ones_like(group.features))
    )  # fmt: skip
    monkeypatch.setattr(Run, "chain", lambda run, into, made, x, by:
                        into["images"][run.of_classes(*made.classes)].add_(1))  # fmt: skip
    moved = {}
    for step in ("joint", "per_class"):
        settings = {"step": step, "calib_weight": 0.0, "weight_decay": 0.0, "lr_img": 1e-3}
        run = prepared(make_run, make_dataset([9, 4, 12]), **settings)
        with torch.no_grad():
            run.images.fill_(0.5)
        go(run, 1)
        moved[step] = 0.5 - run.images.detach().amax(dim=(1, 2, 3))
    torch.testing.assert_close(moved["joint"], torch.full((3,), 1e-3).double(), rtol=1e-6, atol=0)
    first, _, last = moved["per_class"].tolist()
    assert first > 1.5 * last


def test_the_learning_rate_falls_as_torch_s_does(monkeypatch) -> None:
    monkeypatch.setattr(ncfm, "PATIENCE", 3)
    random = torch.Generator().manual_seed(2)
    losses = (torch.rand(400, generator=random) + 4 / torch.arange(1, 401)).tolist()
    leaf = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.SGD([leaf], 1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=3)
    plateau = torch.tensor([float("inf"), 0, 1], dtype=torch.float64)
    scales = set()
    for loss in losses:
        scheduler.step(loss)
        plateau = ncfm.after_loss(plateau, loss, 1e-3)
        assert plateau[2].item() * 1e-3 == optimiser.param_groups[0]["lr"]
        scales.add(plateau[2].item())
    assert len(scales) > 10


def test_images_are_clamped_when_an_iteration_begins(make_dataset, make_run, monkeypatch) -> None:
    run = prepared(make_run, make_dataset([9, 4, 12]))
    with torch.no_grad():
        run.images.copy_(torch.linspace(-1, 2, run.images.numel()).view_as(run.images))
    ranges, update = [], Run.update

    def seen(run, *arguments):
        ranges.append((run.images.min().item(), run.images.max().item()))
        update(run, *arguments)

    monkeypatch.setattr(Run, "update", seen)
    go(run, 1)
    assert ranges[0] == (0, 1)
    assert ranges[1][0] < 0  # the second update follows without


def test_what_cannot_work_is_refused(make_dataset, make_run) -> None:
    dataset = make_dataset([9, 4, 12])
    for settings, message in (
        ({"model": "ConvNetD2W4BN"}, "model: ConvNetD2W4BN has batch normalisation"),
        ({"factor": 9, "init": "noise"}, "factor: got 9 for images of"),
        ({"memory": 1000}, "memory"),
        ({"cutmix": 1.5}, "cutmix: got 1.5, expected a probability"),
        ({"alpha": 0.0, "beta": 0}, "alpha, beta: got 0 for both"),
        ({"num_freqs": 0}, "num_freqs: got 0"),
        ({"num_premodel": 0}, "num_premodel: got 0"),
        ({"calib_weight": -1}, "calib_weight: got -1"),
        ({"sampling_net": "yes"}, "sampling_net: got 'yes', expected 'none' or 'learned'"),
        ({"real_batches": "last"}, "real_batches: got 'last'"),
        ({"aug_type": "spin"}, "spin"),
    ):
        with pytest.raises(ValueError, match=message):
            make_run("ncfm", dataset, **SETTINGS | settings)
