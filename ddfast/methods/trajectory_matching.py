"""What MTT, TESLA, FTD and DATM share: a student is to end where an expert went.

Cazenavette et al., Dataset Distillation by Matching Training Trajectories, CVPR 2022. From the
parameters of an expert after t epochs, t uniform, a student makes `syn_steps` plain SGD steps on
the synthetic images; with theta* the expert's parameters the loss is

    L = |theta_T - theta*_{t + expert_epochs}|^2 / |theta*_t - theta*_{t + expert_epochs}|^2

and its gradient reaches the images and the student's learning rate. 1 means no progress at all,
more that the student went elsewhere, as most do before the images have learned anything.
Minibatches are pieces of a permutation of all images, taken from its end, so that a short one comes
first; each is augmented anew (DSA, one operation a batch, parameters for each image). The expert of
an iteration is drawn uniformly; the official scripts go through shuffled files.

The learning rate is learned as its logarithm and so stays positive; `lr_lr` is scaled such that the
first step moves it as far as in the raw form that the papers have (`lr_form` "raw").

What may go wrong is caught:

- The expert did not move between the two epochs: the iteration is left out, with a message.
- L above `threshold`, if there is one (DATM has 1): the iteration changes nothing.
- A loss, gradient or learning rate that is not finite (or, raw, not above 0), or L beyond both 1
  and twice the running mean of the losses so far: images, learning rate and optimiser go back to
  what they were when L was good last, with a message. After 20 times in a row the run ends.

The papers whiten most data sets (ZCA); here images are normalised by channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.experts import Experts, check_experts, open_experts
from ddfast.losses import trajectory_distance
from ddfast.methods.config import Config as Shared
from ddfast.methods.config import dsa_strategy, setting
from ddfast.methods.run import Decoded, Diverged, Run, learned, refuse_batchnorm, restore
from ddfast.unroll import unroll

MOST_ROLL_BACKS = 20
MEAN_DECAY = 0.9
GOOD = "good."


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of trajectory matching."""

    beside: ClassVar[tuple[str, ...]] = ("lr",)

    experts: str = setting(
        "folder or file from `ddfast experts` (required)", group="task", aliases=("buffer_path",)
    )
    syn_steps: int = setting("SGD steps of the student", least=1)
    expert_epochs: int = setting("epochs from the start to the target", least=1)
    max_start_epoch: int = setting("the student begins at an epoch below this one", least=1)
    min_start_epoch: int = setting("and not before this one (0)", least=0)
    batch_syn: int = setting("images of a student's step (all)", least=1)
    lr_teacher: float = setting("learning rate of the student at first", above=0)
    lr_lr: float = setting("learning rate of that learning rate", least=0)
    lr_form: Literal["log", "raw"] = setting("how the student's learning rate is learned", "log")
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    adjoint: Literal["exact", "frozen", "graph"] = setting(
        "gradient: exact, TESLA's frozen, or exact with all steps in memory"
    )
    history: Literal["device", "host", "checkpoints"] = setting(
        "where the student's parameters of each step wait", "device"
    )
    threshold: float = setting("an iteration with a loss above it changes nothing", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.dsa_strategy)  # raises if it does not know an operation

    def shared_settings(self, dataset: Dataset) -> Mapping[str, Any]:
        """What all four methods have in common."""
        return {
            **Shared.published(self, dataset),
            "init": "real",
            "dsa_strategy": dsa_strategy(dataset),
            "adjoint": "exact",
            "min_start_epoch": 0,
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The images, and the student's learning rate."""
        tensors, labels = super().starting_set(dataset, generator)
        value = self.lr_teacher if self.lr_form == "raw" else math.log(self.lr_teacher)
        return {**tensors, "lr": torch.tensor(value)}, labels

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """SGD with momentum 0.5, as published."""
        scale = 1.0 if self.lr_form == "raw" else self.lr_teacher**-2
        lr = {"params": [tensors["lr"]], "lr": self.lr_lr * scale}
        groups = [*self.parameter_groups(tensors), lr]
        return torch.optim.SGD(groups, self.lr_img, self.momentum)

    def student_lr(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The student's learning rate, 0-d, with a graph to what is learned."""
        return tensors["lr"] if self.lr_form == "raw" else tensors["lr"].exp()

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Also the learning rate, and soft labels if the method has some."""
        made = super().distilled({k: v for k, v in tensors.items() if k not in self.beside}, state)
        lr = self.student_lr({k: v.detach().double() for k, v in tensors.items()}).item()
        return {**made, "lr": lr, "soft_labels": state.get("soft_labels")}

    def start_epochs(self, iteration: int) -> tuple[int, int]:
        """Epochs that the student may begin at, the second excluded."""
        return self.min_start_epoch, self.max_start_epoch


def pick(
    table: Mapping[tuple[str, int], Mapping[str, Any]], dataset: Dataset, ipc: int
) -> dict[str, Any]:
    """The published settings for this data set, else for the most similar one; for ipc or below.

    Similar is: the size of images, and for 32 pixels whether there are more than 20 classes.
    """
    name = dataset.name
    if name not in {key for key, _ in table}:
        side = max(dataset.size)
        names = ["ImageNet"] if side > 64 else []
        names += ["TinyImageNet"] if side > 32 else []
        names += ["CIFAR100"] if dataset.num_classes > 20 else []
        name = next(n for n in (*names, "CIFAR10") if n in {key for key, _ in table})
    listed = sorted(ipc_ for key, ipc_ in table if key == name)
    below = [each for each in listed if each <= ipc]
    return dict(table[name, below[-1] if below else listed[0]])


def check(run: Run, method: str) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: no experts, or those of another data set or network, or too few epochs of them;
            batch normalisation; a student that does not fit into the memory.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, method, "whose running statistics are not part of a trajectory")
    if not config.experts:
        raise ValueError(
            f"experts: missing; make some with `ddfast experts --dataset {config.dataset} --model "
            f"{config.model} --max_start_epoch {config.max_start_epoch} --expert_epochs "
            f"{config.expert_epochs} --out FOLDER`"
        )
    experts = open_experts(config.experts)
    check_experts(experts, run.dataset, run.net, config.model)
    if config.min_start_epoch >= config.max_start_epoch:
        raise ValueError(
            f"min_start_epoch: got {config.min_start_epoch}, expected less than max_start_epoch, "
            f"{config.max_start_epoch}"
        )
    needed = config.max_start_epoch - 1 + config.expert_epochs
    if experts.epochs < needed:
        raise ValueError(
            f"experts: {experts.path} has {experts.epochs} epochs, and max_start_epoch "
            f"{config.max_start_epoch} with expert_epochs {config.expert_epochs} needs {needed}: "
            f"`ddfast experts --max_start_epoch {config.max_start_epoch} --expert_epochs "
            f"{config.expert_epochs} ...`"
        )


class Drawn(NamedTuple):
    """What an iteration matches.

    Attributes:
        start, target: parameters of the expert, (P,).
        batches: positions of the images of each step.
        draws: the augmentation of each step.
    """

    start: Tensor
    target: Tensor
    batches: list[Tensor]
    draws: list[Tensor]


def draw(run: Run, experts: Experts, images: int) -> Drawn:
    """The expert, its epochs, minibatches and augmentations of this iteration."""
    config = run.config
    assert isinstance(config, Config)
    random = run.generator("trajectory")
    expert = int(torch.randint(experts.num_experts, (), generator=random))
    first, end = config.start_epochs(run.iteration)
    epoch = int(torch.randint(first, end, (), generator=random))
    order, batches = run.generator("minibatches"), []
    chunks: list[Tensor] = []
    for _ in range(config.syn_steps):
        if not chunks:
            chunks = list(torch.randperm(images, generator=order).split(config.batch_syn or images))
        batches.append(chunks.pop().to(run.device))
    draws = [
        run.augment.draw(run.generator("augmentation", step), run.dataset.size, count=len(rows))
        for step, rows in enumerate(batches)
        if run.augment.operations
    ]
    start, target = (
        experts.snapshot(expert, at).to(run.device, run.dtype)
        for at in (epoch, epoch + config.expert_epochs)
    )
    return Drawn(start, target, batches, draws)


LabelsOf = Callable[[Run, Decoded, Drawn, Mapping[str, Tensor]], tuple[Tensor, str]]


def step(
    run: Run,
    labels_of: LabelsOf | None = None,
    **options: Any,
) -> Tensor:
    """One update of images and learning rate. Returns the loss, once for each class.

    Args:
        labels_of: from (run, decoded images, what was drawn, leaves of what is learned beside the
            images) to soft labels of all images and what they are, see `unroll`'s `soft`; None for
            hard labels.
        options: of `unroll`.
    """
    config = run.config
    assert isinstance(config, Config)
    experts = open_experts(config.experts)
    made = run.decoded(0, run.dataset.num_classes)
    drawn = draw(run, experts, len(made.images))
    if torch.equal(drawn.start, drawn.target):
        run.say(f"iteration {run.iteration}: the expert did not move; left out")
        return _each(run, run.state.get("mean_loss", torch.ones(())))
    gradients, loss = _gradients(run, made, drawn, labels_of, options)
    return _each(run, settle(run, gradients, loss))


def _gradients(
    run: Run,
    made: Decoded,
    drawn: Drawn,
    labels_of: LabelsOf | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Tensor], Tensor]:
    """The loss, and its gradient by all that is learned."""
    config = run.config
    assert isinstance(config, Config)
    x = made.images.detach().requires_grad_()
    beside = {name: run.tensors[name].detach().requires_grad_() for name in config.beside}
    labels, soft = made.labels, "probabilities"
    if labels_of is not None:
        labels, soft = labels_of(run, made, drawn, beside)
    loss = unroll(
        run.net,
        drawn.start,
        x,
        labels,
        config.student_lr(beside),
        drawn.batches,
        lambda theta: trajectory_distance(theta, drawn.start, drawn.target),
        config.adjoint,
        augment=(lambda x, step: run.augment(x, drawn.draws[step])) if drawn.draws else None,
        history=config.history,
        memory=run.memory,
        soft=soft,
        **options,
    )
    by_images, *others = torch.autograd.grad(loss, [x, *beside.values()], materialize_grads=True)
    gradients = run.no_gradients()
    run.chain(gradients, made, made.images, by_images)
    gradients |= dict(zip(beside, others, strict=True))
    run.processed += sum(map(len, drawn.batches))
    return gradients, loss.detach()


def settle(run: Run, gradients: dict[str, Tensor], loss: Tensor) -> Tensor:
    """Make the step, or not: see the module's docstring. Returns the loss."""
    config = run.config
    assert isinstance(config, Config)
    mean = run.state.get("mean_loss")
    problem = ""
    if not all(torch.isfinite(g).all() for g in (loss, *gradients.values())):
        problem = "the loss or its gradient is not finite"
    elif config.threshold is None and mean is not None and loss > max(1.0, 2 * mean.item()):
        problem = f"the loss {loss.item():.3g} is beyond twice its mean {mean.item():.3g}"
    if problem:
        return roll_back(run, problem)
    if config.threshold is not None and loss > config.threshold:
        return loss
    good = {GOOD + name: tensor.clone() for name, tensor in learned(run).items()}
    try:
        run.update(gradients, _each(run, loss))
        if not config.student_lr({k: v.detach() for k, v in run.tensors.items()}) > 0:
            raise Diverged("the student's learning rate is not above 0")
    except Diverged as error:
        restore(run, {name.removeprefix(GOOD): tensor for name, tensor in good.items()})
        return roll_back(run, str(error))
    new = loss if mean is None else MEAN_DECAY * mean + (1 - MEAN_DECAY) * loss
    kept = {name: t for name, t in run.state.items() if not name.startswith(GOOD)}
    run.state = {**kept, **good, "mean_loss": new, "roll_backs": torch.zeros(())}
    return loss


def roll_back(run: Run, problem: str) -> Tensor:
    """Go back to where the loss was good last. Returns the mean loss.

    Raises:
        Diverged: it never was, or this is happening again and again.
    """
    config = run.config
    good = {name.removeprefix(GOOD): t for name, t in run.state.items() if name.startswith(GOOD)}
    count = run.state.get("roll_backs", torch.zeros(())) + 1
    if not good or count > MOST_ROLL_BACKS:
        raise Diverged(
            f"{problem} at iteration {run.iteration}"
            + (f", after {MOST_ROLL_BACKS} roll-backs in a row" if good else "")
            + f"; a smaller lr_teacher (now {config.lr_teacher:g}), "  # type: ignore[attr-defined]
            f"lr_lr (now {config.lr_lr:g}) or lr_img (now {config.lr_img:g}) may help"  # type: ignore[attr-defined]
        )
    restore(run, good)
    run.say(f"iteration {run.iteration}: {problem}; went back to where it was good last")
    run.state = {**run.state, "roll_backs": count}
    return run.state["mean_loss"]


def _each(run: Run, loss: Tensor) -> Tensor:
    return loss.detach().reshape(1).expand(run.dataset.num_classes)
