"""What a method's `step` works on: the run's data, synthetic set, optimiser and network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddfast import nets
from ddfast.augment import DSA
from ddfast.data import ClassSampler, Dataset
from ddfast.memory import images_at_once
from ddfast.methods.config import Config
from ddfast.random import generator
from ddfast.synthetic import decode, repeats
from ddfast.unroll import fitting

OPTIMISER = "optimiser."
"""Before the names of its tensors, in a checkpoint."""


class Diverged(RuntimeError):
    """A loss or an image is no longer finite; the message says when, and of which class.

    Attributes:
        rolled_back: whether the run was left in a state that is good, in place of the one that it
            had before the step, which may be what led here.
    """

    rolled_back = False


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and stops between two image updates."""


@dataclass
class Decoded:
    """Images of some classes as a network sees them, and what they are made of.

    Attributes:
        classes: first and end.
        leaves: the tensors they are made of, with a graph to `images`: of the classes' rows, or
            whole where all classes share them.
        images: (n, channels, H, W), class after class, in the space that the config says.
        labels: int64, of each image.
        counts: images of each class.
        sources: the row, counted from the first class's first, that each image is made of.
    """

    classes: tuple[int, int]
    leaves: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    counts: list[int]
    sources: Tensor | None = None


@dataclass
class Run:
    """The state of a run, handed to the method's `step` once per iteration.

    Attributes:
        config: resolved; a method finds its own fields in it.
        dataset: what is distilled.
        tensors: what is learned, floating, by name. The one called `rows` has as many rows for each
            class, class 0 first; `images` is (num_classes * ipc, channels, H, W) in most methods,
            in the space that the config says. A checkpoint saves them.
        state: tensors of any shape and dtype, by name, that the method keeps from one iteration to
            the next, such as networks. A checkpoint saves them. A step that changes one puts a new
            tensor in its place, and into a new mapping, at its end: a failed step leaves no trace.
        labels: int64 (rows,), of the rows.
        real_images: uint8 (N, channels, H, W), the training images, on the run's device if they
            take little of it.
        optimiser: over `tensors`. A checkpoint saves its state.
        net: the network to match on; `fresh_net` draws its weights anew.
        sampler: of training images, by class.
        augment: the run's DSA; the identity for methods without.
        memory: bytes a step may use for activations.
        activations: bytes of one image's, see `ddfast.memory`.
        iteration: number of the current step.
        processed: images passed through a network so far, for the rate that is displayed.
        stop: set to end the run at the next image update.
        finished: set by a method that has no use for the iterations that are left.
        make: in place of the config's recipe, makes images of (leaves, labels), one for each row.
        say: shows the user a line.
    """

    config: Config
    dataset: Dataset
    tensors: dict[str, Tensor]
    labels: Tensor
    real_images: Tensor
    optimiser: torch.optim.Optimizer
    net: nets.Network
    sampler: ClassSampler
    augment: DSA
    memory: int
    activations: int
    state: dict[str, Tensor] = field(default_factory=dict)
    iteration: int = 0
    processed: int = 0
    stop: bool = field(default=False, repr=False)
    finished: bool = field(default=False, repr=False)
    make: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = field(default=None, repr=False)
    say: Callable[[str], None] = field(default=lambda line: None, repr=False)

    @property
    def images(self) -> Tensor:
        """The tensor of that name, which most methods learn."""
        return self.tensors["images"]

    @property
    def decoder(self) -> Mapping[str, Any] | None:
        """The recipe by which the images are decoded; None if they are as they are."""
        return self.config.decoder(self.dataset.size)

    @property
    def rows(self) -> str:
        """Name of the tensor that has rows of each class."""
        return self.config.rows

    @property
    def rows_per_class(self) -> int:
        """How many rows of it a class has."""
        return len(self.labels) // self.dataset.num_classes

    @property
    def decoded_per_class(self) -> int:
        """Images of each class that networks see."""
        return self.rows_per_class * repeats(self.decoder, self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.tensors[self.rows].device

    @property
    def dtype(self) -> torch.dtype:
        """That of the images, the network and all that is between them."""
        return self.tensors[self.rows].dtype

    def at_once(self, cost: float) -> int:
        """Images that a pass of this cost (see `ddfast.memory`) may take together."""
        return images_at_once(self.activations, self.memory, cost)

    def generator(self, purpose: str, *step: int) -> torch.Generator:
        """Random numbers for one purpose of this iteration; the same after a resume.

        Args:
            purpose: as for :func:`ddfast.random.generator`.
            step: further integers, such as a class, where the purpose needs several.
        """
        return generator(self.config.seed, purpose, self.iteration, *step)

    def fresh_net(self) -> nets.Network:
        """The network with new weights, in training mode."""
        nets.initialise(self.net, self.generator("network"))
        return self.net.train()

    def real(self, indices: Tensor) -> Tensor:
        """Training images as networks see them, on the run's device.

        Args:
            indices: int64 (n,), their positions in the data set.

        Returns:
            (n, channels, H, W), in the run's dtype.
        """
        images = self.real_images[indices.to(self.real_images.device)].to(self.device)
        return self.dataset.normalised(images, self.dtype)

    def normalised(self, images: Tensor) -> Tensor:
        """Images of the config's space as networks take them.

        Args:
            images: floating (n, channels, H, W).

        Returns:
            The same shape and dtype; the very images where that is their space already.
        """
        if self.config.space == "normalised":
            return images
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
            for values in (self.dataset.mean, self.dataset.std)
        )
        return (images - mean) / std

    def of_classes(self, first: int, end: int) -> slice:
        """Where the rows of classes first to end - 1 lie."""
        return slice(first * self.rows_per_class, end * self.rows_per_class)

    def decoded(self, first: int, end: int, tensors: Mapping[str, Tensor] | None = None) -> Decoded:
        """The images of classes first to end - 1, with a graph to leaves of their own.

        A slice of the tensors themselves would have a graph that writes and adds zeros for all
        other classes.

        Args:
            first, end: classes.
            tensors: in place of `self.tensors`, in their shapes and dtypes.
        """
        here = self.of_classes(first, end)
        leaves = {
            name: (tensor.detach()[here] if name == self.rows else tensor.detach()).requires_grad_()
            for name, tensor in (tensors or self.tensors).items()
            if name not in self.config.beside
        }
        labels, counts = self.labels[here], [self.rows_per_class] * (end - first)
        if self.make is not None:
            return Decoded((first, end), leaves, self.make(leaves, labels), labels, counts)
        others = {name: leaf for name, leaf in leaves.items() if name != "images"}
        images, sources = decode(self.decoder, leaves["images"], counts, others)
        counts = [len(sources) // (end - first)] * (end - first)
        return Decoded((first, end), leaves, images, labels[sources], counts, sources)

    def training_set(self) -> tuple[Tensor, Tensor]:
        """All images as networks see them, outside any graph, and their labels.

        Returns:
            Images (N, channels, H, W) in the run's dtype, and int64 (N,).
        """
        if self.make is not None:
            with torch.no_grad():
                return self.make(self.tensors, self.labels), self.labels
        made = self.decoded(0, self.dataset.num_classes)
        return made.images.detach(), made.labels

    def no_gradients(self) -> dict[str, Tensor]:
        """Zeros in the shapes of the tensors that are learned, for `chain` to fill."""
        return {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}

    def chain(
        self, gradients: dict[str, Tensor], made: Decoded, outputs: Tensor, by_outputs: Tensor
    ) -> None:
        """Bring a gradient back to what the images are made of, and add it there.

        Args:
            gradients: of all tensors, in their shapes and dtypes.
            made: the images, see :meth:`decoded`.
            outputs: floating, of any shape, computed from `made.images`.
            by_outputs: gradient of the loss with respect to them, in their shape and dtype.
        """
        found = torch.autograd.grad(outputs, list(made.leaves.values()), by_outputs)
        for name, part in zip(made.leaves, found, strict=True):
            if name == self.rows:
                gradients[name][self.of_classes(*made.classes)] += part
            else:
                gradients[name] += part

    def update(
        self,
        gradients: Tensor | Mapping[str, Tensor],
        losses: Tensor,
        moment: str = "",
        step: Callable[[], object] | None = None,
    ) -> None:
        """One optimiser step on what is learned, unless something is not finite.

        Args:
            gradients: of the summed losses with respect to `images`, or to each tensor by name, in
                their shapes and dtypes.
            losses: (num_classes,), floating.
            moment: where in the iteration, for the message.
            step: makes the step from the tensors' `grad`; None for the optimiser's.

        Raises:
            Diverged: naming the iteration and the classes.
            Interrupted: the run was asked to stop.
        """
        if isinstance(gradients, Tensor):
            gradients = {"images": gradients}
        self._check(losses[:, None], "the loss", moment)
        for name, gradient in gradients.items():
            self._check_tensor(name, gradient, "the gradient", moment)
            self.tensors[name].grad = gradient
        (step or self.optimiser.step)()
        for name in gradients:
            self.tensors[name].grad = None
            what = "an image" if name == "images" else f"a value of {name}"
            self._check_tensor(name, self.tensors[name].detach(), what, moment)
        if self.stop:
            raise Interrupted

    def _check_tensor(self, name: str, values: Tensor, what: str, moment: str) -> None:
        """By class where there are rows of each."""
        if name == self.rows:
            values = values.unflatten(0, (-1, self.rows_per_class))
            self._check(values, what, moment)
        elif not torch.isfinite(values).all():
            advice = ""
            if name not in self.config.beside:
                advice = f"; a smaller lr_decoder (now {self.config.lr_decoder:g}) may help"
            raise Diverged(
                f"{what} ({name}) is not finite at iteration {self.iteration}{moment}{advice}"
            )

    def _check(self, values: Tensor, what: str, moment: str) -> None:
        finite = torch.isfinite(values)
        if finite.all():
            return
        bad = (~finite.flatten(1).all(1)).nonzero()[:, 0].tolist()
        names = ", ".join(f"{c} ({self.dataset.class_names[c]})" for c in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise Diverged(
            f"{what} of class {names}{more} is not finite at iteration {self.iteration}{moment}; "
            f"a smaller lr_img (now {self.config.lr_img:g}) may help"
        )


def learned(run: Run) -> dict[str, Tensor]:
    """What a step changes in place: the tensors and what the optimiser knows of them."""
    state = {name: tensor.detach() for name, tensor in run.tensors.items()}
    for index, values in run.optimiser.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                state[f"{OPTIMISER}{index}.{name}"] = value
    return state


def restore(run: Run, state: Mapping[str, Tensor]) -> None:
    """Put back what `learned` gave, into the tensors themselves."""
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(OPTIMISER):
            _, index, key = name.split(".", 2)
            values.setdefault(int(index), {})[key] = tensor
    with torch.no_grad():
        for name, tensor in run.tensors.items():
            tensor.copy_(state[name])
            tensor.grad = None
    groups = run.optimiser.state_dict()["param_groups"]
    run.optimiser.load_state_dict({"state": values, "param_groups": groups})


def check_student(run: Run, batch: int, steps: int, **options: Any) -> None:
    """Refuse a student that takes more memory than the run may.

    Args:
        batch: images of a step of the student.
        steps: of it at most.
        options: of `ddfast.unroll.estimate_memory`.

    Raises:
        ValueError: naming what it needs, and what would fit.
    """
    problem = fitting(
        run.memory,
        run.net,
        (run.dataset.channels, *run.dataset.size),
        batch,
        steps,
        images=run.decoded_per_class * run.dataset.num_classes,
        **options,
    )
    if problem:
        raise ValueError(f"memory: {problem}")


def refuse_batchnorm(
    run: Run, method: str, why: str = "with which the images of a class depend on each other"
) -> None:
    """Raise ValueError where the network has batch normalisation."""
    if nets.has_batchnorm(run.net):
        raise ValueError(
            f"model: {run.config.model} has batch normalisation, {why}; {method} is offered for "
            "instance and group normalisation"
        )
