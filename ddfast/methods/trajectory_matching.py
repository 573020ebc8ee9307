"""What MTT, TESLA, FTD and DATM share: a student follows a part of an expert's trajectory.

An expert is a network whose parameters theta*_t were kept after every epoch t of its training on
the real images (`ddfast experts`). A student starts at one of them, makes T steps on the synthetic
images with the step size lr, which is learned, too, and should end where M epochs led the expert:

    theta_{i+1} = theta_i - lr g_i,   g_i the gradient of the mean cross-entropy of minibatch i
    L = |theta_T - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2

T = `syn_steps`, M = `expert_epochs`, t uniform from 0 (DATM: `min_start_epoch`) up to but not
including `max_start_epoch`. Each iteration takes the next expert of a random order of all, which is
drawn anew when all have been taken (the published code does so with the files and within each). The
minibatches are cut from a permutation of all images and taken from its end, so that a short one
comes first; then follows another permutation. Every step has one augmentation with parameters of
its own for each image, the same again when the step is reversed.

Where an expert did not move (start equals target), L is not defined: the iteration is left out with
a message, and its loss is reported as 0. See `ddfast.methods.rollback` for losses that are not
finite or too high.

The step size. The published code learns lr itself, which may cross over to negative values and run
away. With `lr_form="softplus"`, the default,

    lr = s softplus(r / s),   s = lr_teacher / 4

and r is learned: lr is always above 0, and yet moves as the raw number does while it is above s,
for there dlr/dr is near 1 (0.98 at lr_teacher, so that the first step is 0.96 of the raw one, and
nearer to 1 above). Thus the published lr_lr keep their meaning. "log" learns log lr with
lr_lr / lr_teacher^2, so that the first step moves lr as the raw form does; but later ones by
(lr / lr_teacher)^2 times as much, and where lr has to grow from 0.001 to 0.01, as with the
published setting for CIFAR-10 at ipc 10, that is too much. "raw" is as published, but an update
that takes lr to 0 or below is rolled back.

Whitening is that of the experts: `ddfast experts --zca mtt` trains such as most of the published
settings have for CIFAR. Not offered: MTT's textures of a larger canvas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ddfast.augment import DSA
from ddfast.data import Dataset
from ddfast.data.whitening import Recipe
from ddfast.experts import Experts, check_experts, open_experts
from ddfast.losses import trajectory_distance
from ddfast.memory import FORWARD, SECOND_ORDER
from ddfast.methods.config import ZCA_HELP, dsa_strategy, setting
from ddfast.methods.config import Config as Shared
from ddfast.methods.pretrained import set_weights
from ddfast.methods.rollback import attempt
from ddfast.methods.run import Decoded, Run, check_student, refuse_batchnorm
from ddfast.random import generator
from ddfast.unroll import final_parameters

RATE = "lr_parameter"
"""Name of what is learned of the step size, see `Config.learning_rate`."""


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings that all four methods have."""

    beside: ClassVar[tuple[str, ...]] = (RATE,)

    experts: str = setting(
        "folder or file from `ddfast experts` (required)",
        aliases=("buffer_path",),
        group="task",
        identity=False,
    )
    experts_fingerprint: str = setting("hash of the experts (that of the file)", group="task")
    batch_real: int = setting("of no meaning: only experts see real images", 256, least=1)
    syn_steps: int = setting("T, steps of the student", least=1)
    expert_epochs: int = setting("M, epochs of the expert that these should match", least=1)
    max_start_epoch: int = setting("start epochs lie below this one", least=1)
    batch_syn: int = setting("synthetic images in a step of the student; 0: all", least=0)
    lr_teacher: float = setting("step size of the student to start from", above=0)
    lr_lr: float = setting("learning rate of that step size", above=0)
    lr_form: Literal["softplus", "log", "raw"] = setting(
        "how it is learned: softplus or log, always above 0, or raw as published", "softplus"
    )
    dsa_strategy: str = setting("augmentations to draw from, joined by _, or none")
    adjoint: Literal["exact", "frozen", "graph"] = setting(
        "gradient: exact, frozen (second order left out), or graph (exact, all steps in memory)",
        "exact",
    )
    history: Literal["device", "host", "checkpoints"] = setting(
        "where each step's parameters wait: device, host, or checkpoints (only some are kept)",
        "device",
    )
    zca: Recipe = setting(f"{ZCA_HELP}; the experts'")
    threshold: float = setting("no update while the loss is above this (none)", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        DSA(self.dsa_strategy)  # raises if it does not know an operation

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """What the methods have in common, with the hash and the whitening of the experts."""
        found = {**super().published(dataset), "init": "real", "zca": "none"}
        if self.parametrisation == "multi_formation":
            found["init"] = "mix"
        if self.experts is not None:
            experts = opened(self)
            found["experts_fingerprint"] = fingerprint(experts)
            found["zca"] = experts.settings.get("zca", "none")
        return {**found, "dsa_strategy": dsa_strategy(dataset)}

    def start_epochs(self, iteration: int) -> tuple[int, int]:
        """First start epoch, and the one behind the last."""
        return 0, self.max_start_epoch

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """With the step size, float64 (a run has a dtype of its own)."""
        tensors, labels = super().starting_set(dataset, generator)
        lr = torch.tensor(self.lr_teacher, dtype=torch.float64)
        if self.lr_form == "log":
            lr = lr.log()
        elif self.lr_form == "softplus":
            lr = lr + self.scale * (-torch.expm1(-lr / self.scale)).log()
        return {**tensors, RATE: lr}, labels

    @property
    def scale(self) -> float:
        """s, see above."""
        return self.lr_teacher / 4

    def learning_rate(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The step size, 0-d, differentiable in the tensor that is learned."""
        if self.lr_form == "log":
            return tensors[RATE].exp()
        if self.lr_form == "softplus":
            return self.scale * softplus(tensors[RATE] / self.scale)
        return tensors[RATE]

    def parameter_groups(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        rate = self.lr_lr / (self.lr_teacher**2 if self.lr_form == "log" else 1.0)
        return [*super().parameter_groups(tensors), {"params": [tensors[RATE]], "lr": rate}]

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """With the step size."""
        images = {name: tensor for name, tensor in tensors.items() if name not in self.beside}
        lr = self.learning_rate(tensors).item()
        return {**super().distilled(images, state), "lr": lr}


def opened(config: Config) -> Experts:
    """The experts' file.

    Raises:
        FileNotFoundError, ValueError: see `ddfast.experts.open_experts`.
    """
    return open_experts(config.experts)


def fingerprint(experts: Experts) -> str:
    """A hash of how experts were made, how many there are, and what the first one ended with."""
    facts = [dict(experts.settings), experts.num_experts, experts.epochs, experts.parameters]
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    sha.update(experts.snapshot(0, experts.epochs).numpy().data)
    return sha.hexdigest()[:16]


def check_trajectories(run: Run, method: str) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: no experts, or of another data set or network, or too short ones; batch
            normalisation; start epochs of which there are none; beyond the memory.
    """
    config = run.config
    assert isinstance(config, Config)
    refuse_batchnorm(run, method, "whose running statistics are no part of a trajectory")
    needed = config.max_start_epoch - 1 + config.expert_epochs
    advice = (
        f"`ddfast experts --dataset {config.dataset} --model {config.model} --max_start_epoch "
        f"{config.max_start_epoch} --expert_epochs {config.expert_epochs} --out FOLDER` makes some"
    )
    if not config.experts:
        raise ValueError(f"experts: missing; {advice}")
    experts = opened(config)
    check_experts(experts, run.dataset, run.net, config.model)
    if experts.epochs < needed:
        raise ValueError(
            f"experts: {config.experts} has {experts.epochs} epochs, and max_start_epoch "
            f"{config.max_start_epoch} with expert_epochs {config.expert_epochs} needs {needed}; "
            f"{advice} of as many"
        )
    if fingerprint(experts) != config.experts_fingerprint:
        raise ValueError(
            f"experts_fingerprint: got {config.experts_fingerprint}, and that of "
            f"{config.experts} is {fingerprint(experts)}"
        )
    check_memory(run)


def check_memory(run: Run) -> None:
    """Plan the memory of the student's steps and of their history.

    Raises:
        ValueError: it is more than the run may take; the message says what would fit.
    """
    config = run.config
    assert isinstance(config, Config)
    run.at_once(SECOND_ORDER)
    images = run.decoded_per_class * run.dataset.num_classes
    choices = {"adjoint": config.adjoint, "history": config.history}
    check_student(run, min(config.batch_syn or images, images), config.syn_steps, **choices)


class Segment(NamedTuple):
    """The part of a trajectory that is matched in an iteration: (P,) each, on the run's device."""

    start: Tensor
    target: Tensor


class Labels(NamedTuple):
    """Of the decoded images.

    Attributes:
        values: int64 (N,), or soft ones (N, num_classes).
        soft: what soft ones are, see `ddfast.unroll.final_parameters`.
        leaves: what is learned of them, by its name in `Run.tensors`.
    """

    values: Tensor
    soft: str = "probabilities"
    leaves: Mapping[str, Tensor] = {}


Labelling = Callable[[Run, Decoded, Segment, list[Tensor]], Labels]
"""Labels from the decoded images, the segment and the minibatches of the steps."""


def classes_of(run: Run, made: Decoded, part: Segment, batches: list[Tensor]) -> Labels:
    """Hard labels."""
    return Labels(made.labels)


def step(run: Run, labelling: Labelling = classes_of, half_image_gradient: bool = False) -> Tensor:
    """One iteration. Returns the distance, the same for each class, (num_classes,)."""
    return advance(run, labelling, half_image_gradient)[0]


def advance(
    run: Run, labelling: Labelling = classes_of, half_image_gradient: bool = False
) -> tuple[Tensor, bool]:
    """One iteration: the distance, (num_classes,), and whether anything was updated."""
    config = run.config
    assert isinstance(config, Config)
    part = segment(run)
    if torch.equal(part.start, part.target):
        run.say(f"iteration {run.iteration}: the expert did not move; left out")
        return part.start.new_zeros(run.dataset.num_classes), False
    losses, found = gradients(run, part, labelling, half_image_gradient)

    def sound() -> bool:
        return config.learning_rate(run.tensors).item() > 0

    return losses, attempt(run, losses, found, config.threshold, sound)


def gradients(
    run: Run,
    part: Segment,
    labelling: Labelling = classes_of,
    half_image_gradient: bool = False,
    adjoint: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The distance of this iteration, (num_classes,), and its gradients by what is learned.

    Args:
        half_image_gradient: see `ddfast.unroll.final_parameters`.
        adjoint: in place of the config's.
    """
    config = run.config
    assert isinstance(config, Config)
    made = run.decoded(0, run.dataset.num_classes)
    images = run.normalised(made.images)
    x = images.detach().requires_grad_()
    batches = minibatches(run, len(x))
    labels = labelling(run, made, part, batches)
    leaves = {RATE: run.tensors[RATE].detach().requires_grad_(), **labels.leaves}
    end = final_parameters(
        run.net.train(),
        part.start,
        x,
        labels.values,
        config.learning_rate(leaves),
        batches,
        adjoint or config.adjoint,
        augment=augmentation(run, batches),
        soft=labels.soft,
        history=config.history,
        half_image_gradient=half_image_gradient,
        memory=run.memory,
    )
    loss = trajectory_distance(end, part.start, part.target)
    by_images, *others = torch.autograd.grad(loss, [x, *leaves.values()])
    found = run.no_gradients()
    run.chain(found, made, images, by_images)
    found |= dict(zip(leaves, others, strict=True))
    run.processed += sum(map(len, batches))
    return loss.detach().expand(run.dataset.num_classes).clone(), found


def segment(run: Run) -> Segment:
    """Where the student of this iteration starts, and where it should end."""
    config = run.config
    assert isinstance(config, Config)
    experts = opened(config)
    turn, place = divmod(run.iteration, experts.num_experts)
    order = torch.randperm(experts.num_experts, generator=generator(config.seed, "experts", turn))
    first, end = config.start_epochs(run.iteration)
    epoch = int(torch.randint(first, end, (), generator=run.generator("start epoch")))
    both = (
        experts.snapshot(int(order[place]), each).to(run.device, run.dtype)
        for each in (epoch, epoch + config.expert_epochs)
    )
    return Segment(*both)


def minibatches(run: Run, count: int) -> list[Tensor]:
    """Of each step, int64 positions in `count` images, on the run's device."""
    config = run.config
    assert isinstance(config, Config)
    random, size = run.generator("minibatches"), min(config.batch_syn or count, count)
    chunks: list[Tensor] = []
    found = []
    for _ in range(config.syn_steps):
        if not chunks:
            chunks = list(torch.randperm(count, generator=random).split(size))
        found.append(chunks.pop().to(run.device))
    return found


def augmentation(run: Run, batches: list[Tensor]) -> Callable[[Tensor, int], Tensor] | None:
    """Of the images of a step, by its number: always the same; None for none."""
    if not run.augment.operations:
        return None
    draws = [
        run.augment.draw(run.generator("augmentation", number), run.dataset.size, count=len(batch))
        for number, batch in enumerate(batches)
    ]
    return lambda x, number: run.augment(x, draws[number])


@torch.no_grad()
def logits(run: Run, theta: Tensor, images: Tensor) -> Tensor:
    """(N, num_classes), of normalised images in the network with parameters (P,), in pieces."""
    net = set_weights(run.net, theta)
    return torch.cat([net(piece) for piece in images.split(run.at_once(FORWARD))])


def of_rows(run: Run, values: Tensor) -> Tensor:
    """For each decoded image what `values` has for the row that it is made of."""
    return values.repeat_interleave(run.decoded_per_class // run.rows_per_class, 0)


def mean_of_rows(run: Run, values: Tensor) -> Tensor:
    """For each row the mean of `values` over the images that are made of it."""
    return values.unflatten(0, (len(run.labels), -1)).mean(1)


def say_of_training(run: Run, wanted: str, method: str) -> str:
    """A line for the user if the experts were trained otherwise than published; else empty."""
    config = run.config
    assert isinstance(config, Config)
    made = opened(config).settings.get("training", {}).get("optimiser", wanted)
    if made == wanted:
        return ""
    return (
        f"the experts were trained by {made}; {method} as published has those of "
        f"`ddfast experts --optimiser {wanted}`"
    )
