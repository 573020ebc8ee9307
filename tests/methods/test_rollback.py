"""Losses that are not finite, too high, or above a threshold; experts that do not move."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddfast.artefact import Artefact
from ddfast.distill import distill
from ddfast.experts.file import EXPERTS, mapped
from ddfast.methods import Diverged, Run, find, ftd, mtt, rollback, trajectory_matching
from ddfast.methods.run import learned

MODEL = "ConvNetD1W4"
SETTINGS: dict[str, Any] = {
    "ipc": 1,
    "model": MODEL,
    "syn_steps": 2,
    "expert_epochs": 1,
    "max_start_epoch": 3,
    "batch_syn": 0,
    "lr_teacher": 0.1,
    "lr_img": 1.0,
    "lr_lr": 1e-3,
}


@pytest.fixture
def run(make_dataset, make_run, make_experts) -> Run:
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(dataset, MODEL))
    made: Run = make_run("mtt", dataset, experts=experts, **SETTINGS)
    made.said = []  # type: ignore[attr-defined]
    made.say = made.said.append  # type: ignore[attr-defined]
    return made


def attempt(run: Run, loss: float, threshold: float | None = None, bad: str = "") -> bool:
    """An iteration with this loss and gradients of ones, or with one that is not finite."""
    gradients = {name: torch.ones_like(tensor) for name, tensor in run.tensors.items()}
    if bad:
        gradients[bad].view(-1)[0] = math.nan
    made = rollback.attempt(run, torch.full((3,), loss), gradients, threshold)
    run.iteration += 1
    return made


def now(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learned(run).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bad", ["loss", "images", "lr_parameter", "high"])
def test_a_bad_iteration_goes_back_to_the_last_good_one(run, bad) -> None:
    assert attempt(run, 0.5)
    good = now(run)
    assert attempt(run, 0.5)
    moved = now(run)
    assert not same(good, moved)
    loss = {"loss": math.nan, "high": 1.2}.get(bad, 0.5)
    assert not attempt(run, loss, bad=bad if bad in run.tensors else "")
    assert same(now(run), good)
    what = {"loss": "the loss is nan", "high": "the loss is 1.2"}.get(bad, "a gradient is not")
    assert run.said[0].startswith(f"iteration 2: {what}")
    assert "(1 of 20 times)" in run.said[0]
    assert attempt(run, 0.5)  # and on from there
    assert same(now(run), moved)


def test_losses_above_one_are_normal_at_the_beginning(run) -> None:
    for loss in (3.0, 2.5, 5.0, 1.5):
        assert attempt(run, loss)
    assert not attempt(run, 20.0)
    assert len(run.said) == 1


def test_the_limit_follows_the_losses_and_is_at_least_one(run) -> None:
    for _ in range(100):
        assert attempt(run, 2.0)
    assert attempt(run, 3.9)
    for _ in range(100):
        assert attempt(run, 0.1)
    assert attempt(run, 0.99)
    assert not attempt(run, 1.01)


def test_a_high_loss_of_a_restored_state_is_taken(run) -> None:
    assert attempt(run, 0.4)
    assert not attempt(run, 1.5)
    assert attempt(run, 1.5)
    assert len(run.said) == 1


def test_before_the_first_good_loss_nothing_moves(run) -> None:
    begin = now(run)
    for _ in range(3):
        assert not attempt(run, math.inf)
    assert same(now(run), begin)
    assert attempt(run, 7.0)


def test_twenty_in_a_row_end_the_run(run) -> None:
    assert attempt(run, 0.5)
    for _ in range(rollback.MOST - 1):
        assert not attempt(run, math.nan)
    with pytest.raises(
        Diverged, match=r"loss is nan at iteration 20, the 20th .* lr_img and lr_lr"
    ):
        attempt(run, math.nan)


def test_going_back_and_forth_ends_the_run(run) -> None:
    """Every update from a good state leads to a bad one."""
    assert attempt(run, 0.5)
    with pytest.raises(Diverged, match="the loss is 1e"):
        for _ in range(rollback.MOST):
            assert not attempt(run, 1e6)
            assert attempt(run, 0.5)
    assert len(run.said) == rollback.MOST - 1


def test_an_update_that_holds_starts_the_count_anew(run) -> None:
    for _ in range(2 * rollback.MOST):
        assert attempt(run, 0.5)
        assert attempt(run, 0.5)
        assert not attempt(run, math.nan)


def test_above_the_threshold_nothing_moves(run) -> None:
    assert attempt(run, 0.9, threshold=1.0)
    before = now(run)
    for count in range(1, 2 * rollback.ABOVE + 1):
        assert not attempt(run, 1.0001, threshold=1.0)
        assert len(run.said) == count // rollback.ABOVE
    assert same(now(run), before)
    assert "above the threshold of 1 for the 40th time in a row" in run.said[-1]
    assert attempt(run, 1.0, threshold=1.0)
    assert attempt(run, 50.0, threshold=60.0)  # no other limit then
    assert not attempt(run, math.nan, threshold=1.0)


def test_images_that_overflow_are_undone(run) -> None:
    assert attempt(run, 0.5)
    before = now(run)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in run.tensors.items()}
    gradients["images"][0] = 1e308
    run.optimiser.param_groups[0]["lr"] = 1e10
    assert not rollback.attempt(run, torch.full((3,), 0.5), gradients, None)
    assert same(now(run), before)
    assert "an image of class 0 (name0) is not finite" in run.said[0]


def test_a_raw_learning_rate_stays_above_zero(make_dataset, make_run, make_experts) -> None:
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(dataset, MODEL))
    settings = SETTINGS | {"lr_form": "raw", "lr_lr": 10.0, "lr_teacher": 0.1}
    run = make_run("mtt", dataset, experts=experts, **settings)
    said: list[str] = []
    run.say = said.append
    for _ in range(8):
        mtt.step(run)
        run.iteration += 1
        assert run.tensors["lr_parameter"] > 0
    assert any("the learning rate is no longer above 0" in line for line in said)
    for form in ("softplus", "log"):
        run = make_run("mtt", dataset, experts=experts, **settings | {"lr_form": form})
        for _ in range(8):
            mtt.step(run)
            run.iteration += 1
            assert run.config.learning_rate(run.tensors) > 0


def test_the_average_of_ftd_goes_back_too(
    make_dataset, make_run, make_experts, monkeypatch
) -> None:
    dataset = make_dataset([7, 6, 9])
    experts = str(make_experts(dataset, MODEL))
    run = make_run("ftd", dataset, experts=experts, ema_decay=0.5, **SETTINGS)
    ftd.step(run)
    run.iteration += 1
    first = run.state["average.images"].clone()
    ftd.step(run)
    run.iteration += 1
    assert not torch.equal(run.state["average.images"], first)
    found = trajectory_matching.gradients

    def broken(*arguments):
        losses, gradients = found(*arguments)
        return losses * math.nan, gradients

    monkeypatch.setattr(trajectory_matching, "gradients", broken)
    ftd.step(run)
    assert torch.equal(run.state["average.images"], first)


def test_an_expert_that_does_not_move_is_left_out(make_dataset, make_run, make_experts) -> None:
    dataset = make_dataset([7, 6, 9])
    folder = make_experts(dataset, MODEL, pace=0.0)
    run = make_run("mtt", dataset, experts=str(folder), **SETTINGS)
    said: list[str] = []
    run.say = said.append
    before, state = now(run), run.state
    assert torch.equal(mtt.step(run), torch.zeros(3, dtype=torch.float64))
    assert same(now(run), before) and run.state == state
    assert said == ["iteration 0: the expert did not move; left out"]


def test_experts_that_are_not_finite_end_a_run_with_advice(
    make_dataset, make_experts, tmp_path
) -> None:
    dataset = make_dataset([7, 6, 9])
    folder = make_experts(dataset, MODEL)
    mapped(folder / EXPERTS, "r+").trajectories[:, :, 0] = math.nan
    config = find("mtt").config(experts=str(folder), iterations=40, **SETTINGS)
    with pytest.raises(Diverged, match=r"at iteration 19, the 20th time .*last_good"):
        distill("mtt", dataset, config, tmp_path / "run", progress=False)


def test_what_is_kept_of_a_run_that_ends_is_its_last_good_state(
    make_dataset, make_experts, tmp_path, monkeypatch
) -> None:
    """Every update leads from a good state to a bad one, also the one before the last roll-back."""
    dataset = make_dataset([7, 6, 9])
    found, seen = trajectory_matching.gradients, []

    def going_bad(run, *arguments):
        losses, gradients = found(run, *arguments)
        seen.append(run.images.detach().clone())
        return losses * 0 + (math.nan if len(seen) % 2 == 0 else 0.5), gradients

    monkeypatch.setattr(trajectory_matching, "gradients", going_bad)
    config = find("mtt").config(
        experts=str(make_experts(dataset, MODEL)), iterations=99, **SETTINGS
    )
    with pytest.raises(Diverged, match="the 20th time"):
        distill("mtt", dataset, config, tmp_path / "run", progress=False)
    assert not torch.equal(seen[-1], seen[0])
    kept = Artefact.load(tmp_path / "run" / "last_good.safetensors").images
    assert torch.equal(kept, seen[0])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=refuse)["loss"] for line in lines]
    assert losses[:4] == [0.5, None, 0.5, None]
