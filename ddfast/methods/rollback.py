"""What keeps the images and learning rate of trajectory matching from running away.

An iteration ends in one of four ways:

- the update is made, if the loss and all gradients are finite and the loss is not too high;
- the state is rolled back to that of the last accepted loss, if something is not finite, before or
  after the update, or if the loss is above max(1, 2 x the running mean of the accepted losses);
- with a threshold (DATM) nothing moves while the loss is above it, and no loss is too high beside;
- the run ends with `Diverged` after `MOST` roll-backs without an accepted update in between.

A loss above 1 is normal of images that have hardly been distilled, so the first finite loss is
accepted whatever it is. So is a high one of a state that was just restored: that state was good
for another expert or epoch, and the update that spoilt it has been undone already. An update only
counts as accepted when a loss after it is, so a run that goes back and forth between a good state
and a bad one ends, too.

All that this needs is in `Run.state`, so that a resumed run rolls back to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddfast.methods.run import Diverged, Run, learned, restore

GOOD, OF_STATE = "good.", "good state."
"""In `Run.state`, before the names of what was learned and of its other parts at the last loss."""

RECORD = "rollback"
"""In `Run.state`: running mean, roll-backs, whether restored, iterations above the threshold."""

MOST, ABOVE = 20, 20
"""Roll-backs after which a run ends; iterations above the threshold after which it says so."""

KEPT = 0.9
"""What the running mean keeps of itself at each accepted loss."""


def attempt(
    run: Run,
    losses: Tensor,
    gradients: Mapping[str, Tensor],
    threshold: float | None,
    sound: Callable[[], bool] = lambda: True,
) -> bool:
    """Make the update or one of the other ends of an iteration; whether it was made.

    Args:
        losses: (num_classes,), all the same.
        gradients: of it, by what is learned.
        threshold: see above; None for none.
        sound: whether what the update made can be used.

    Raises:
        Diverged: too many roll-backs; the message names the last loss and says what may help.
        Interrupted: the run was asked to stop.
    """
    loss = losses[0].item()
    mean, rollbacks, restored, above = _record(run)
    finite = math.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in gradients.values())
    if finite and threshold is not None and loss > threshold:
        if (above + 1) % ABOVE == 0:
            run.say(
                f"iteration {run.iteration}: the loss, {loss:.4g}, is above the threshold of "
                f"{threshold:g} for the {above + 1:.0f}th time in a row, so nothing moves; a "
                "smaller lr_teacher or a larger expert_epochs may help"
            )
        _write(run, mean, rollbacks, restored, above + 1)
        return False
    begun = mean > 0
    too_high = threshold is None and begun and not restored and loss > max(1.0, 2 * mean)
    if not finite or too_high:
        _go_back(run)
        _count(
            run,
            "a gradient is not finite"
            if math.isfinite(loss) and not too_high
            else f"the loss is {loss:.4g}",
        )
        return False
    good = {GOOD + name: tensor.clone() for name, tensor in learned(run).items()}
    wrong = ""
    try:
        run.update(gradients, losses)
    except Diverged as error:
        wrong = str(error).split(" at iteration")[0]
    if not wrong and not sound():
        wrong = "the learning rate is no longer above 0"
    if wrong:
        restore(run, {name.removeprefix(GOOD): tensor for name, tensor in good.items()})
        _count(run, wrong)
        return False
    others = _others(run)
    # Copies: a checkpoint takes no two names of the same memory.
    copies = {OF_STATE + name: tensor.clone() for name, tensor in others.items()}
    run.state = {**others, **good, **copies}
    mean = KEPT * mean + (1 - KEPT) * loss if begun else loss
    _write(run, mean, rollbacks if restored else 0, 0, 0)
    return True


def _others(run: Run) -> dict[str, Tensor]:
    """The parts of the state that are not of this module."""
    own = GOOD, OF_STATE
    return {n: t for n, t in run.state.items() if n != RECORD and not n.startswith(own)}


def _record(run: Run) -> list[float]:
    found: list[float] = run.state.get(RECORD, torch.zeros(4)).tolist()
    return found


def _write(run: Run, *values: float) -> None:
    run.state = {**run.state, RECORD: torch.tensor(values, dtype=torch.float64)}


def _go_back(run: Run) -> None:
    """To the state of the last accepted loss. Before the first one nothing has moved."""
    good = {n.removeprefix(GOOD): t for n, t in run.state.items() if n.startswith(GOOD)}
    if not good:
        return
    restore(run, {name: tensor.clone() for name, tensor in good.items()})
    mine = {n: t for n, t in run.state.items() if n not in _others(run)}
    others = {
        n.removeprefix(OF_STATE): t.clone() for n, t in mine.items() if n.startswith(OF_STATE)
    }
    run.state = {**mine, **others}


def _count(run: Run, what: str) -> None:
    """Say what happened, or end the run."""
    mean, rollbacks, _, above = _record(run)
    rollbacks += 1
    _write(run, mean, rollbacks, 1, above)
    if rollbacks >= MOST:
        config: Any = run.config
        error = Diverged(
            f"{what} at iteration {run.iteration}, the {MOST}th time that the run had to be rolled "
            f"back without an update in between that held; smaller lr_img and lr_lr (now "
            f"{config.lr_img:g} and {config.lr_lr:g}) or a smaller lr_teacher may help"
        )
        error.rolled_back = True
        raise error
    run.say(
        f"iteration {run.iteration}: {what}; rolled back to the last good state "
        f"({rollbacks:.0f} of {MOST} times)"
    )
