"""What a method's `step` works on: the run's data, synthetic set, optimiser and network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddfast import nets
from ddfast.augment import DSA
from ddfast.data import ClassSampler, Dataset, normalise
from ddfast.memory import activation_bytes, images_at_once
from ddfast.methods.config import Config
from ddfast.random import generator


class Diverged(RuntimeError):
    """A loss or an image is no longer finite; the message says when, and of which class."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and stops between two image updates."""


@dataclass
class Run:
    """The state of a run, handed to the method's `step` once per iteration.

    Attributes:
        config: resolved; a method finds its own fields in it.
        tensors: what is learned, by name; `images` is (num_classes * ipc, channels, H, W), class 0
            first, in the space that the config says. A checkpoint saves them.
        labels: int64, of the synthetic images.
        real_images: uint8, the training images, on the run's device if they take little of it.
        optimiser: over `tensors`. A checkpoint saves its state.
        net: the network to match on; `fresh_net` draws its weights anew.
        augment: the run's DSA; the identity for methods without.
        memory: bytes a step may use for activations.
        activations: bytes of one image's, see `ddfast.memory`.
        iteration: number of the current step.
        processed: images passed through a network so far, for the rate that is displayed.
        stop: set to end the run at the next image update.
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
    iteration: int = 0
    processed: int = 0
    stop: bool = field(default=False, repr=False)

    @property
    def images(self) -> Tensor:
        return self.tensors["images"]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def at_once(self, cost: float) -> int:
        """Images that a pass of this cost (see `ddfast.memory`) may take together."""
        return images_at_once(self.activations, self.memory, cost)

    def generator(self, purpose: str, *step: int) -> torch.Generator:
        """Random numbers for one purpose of this iteration; the same after a resume."""
        return generator(self.config.seed, purpose, self.iteration, *step)

    def fresh_net(self) -> nets.Network:
        """The network with new weights, in training mode."""
        nets.initialise(self.net, self.generator("network"))
        return self.net.train()

    def real(self, indices: Tensor) -> Tensor:
        """Normalised training images at these positions, on the run's device."""
        images = self.real_images[indices.to(self.real_images.device)].to(self.device)
        return normalise(images, self.dataset.mean, self.dataset.std, self.images.dtype)

    def of_classes(self, first: int, end: int) -> slice:
        """Where the synthetic images of classes first to end - 1 lie."""
        return slice(first * self.config.ipc, end * self.config.ipc)

    def update(
        self,
        gradient: Tensor,
        losses: Tensor,
        moment: str = "",
        step: Callable[[], object] | None = None,
    ) -> None:
        """One optimiser step on the images, unless something is not finite.

        Args:
            gradient: of the summed losses with respect to `images`.
            losses: (num_classes,).
            moment: where in the iteration, for the message.
            step: makes the step from `images.grad`; None for the optimiser's.

        Raises:
            Diverged: naming the iteration and the classes; the images are then as before.
            Interrupted: the run was asked to stop.
        """
        self._check(losses[:, None], "the loss", moment)
        self._check(gradient.unflatten(0, (-1, self.config.ipc)), "the gradient", moment)
        self.images.grad = gradient
        (step or self.optimiser.step)()
        self.images.grad = None
        images = self.images.detach()
        self._check(images.unflatten(0, (-1, self.config.ipc)), "an image", moment)
        if self.stop:
            raise Interrupted

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


def start(
    config: Config,
    dataset: Dataset,
    memory: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Run:
    """A run at iteration 0, from a resolved config.

    Raises:
        ValueError: unknown model, too large an ipc, an empty class.
    """
    net = nets.build(
        config.model,
        dataset.channels,
        dataset.num_classes,
        dataset.size,
        generator(config.seed, "network"),
    )
    net = net.to(device, dtype)
    images, labels = config.starting_images(dataset, generator(config.seed, "images"))
    images = images.to(device, dtype).requires_grad_()
    return Run(
        config=config,
        dataset=dataset,
        tensors={"images": images},
        labels=labels.to(device),
        real_images=_near(dataset.train_images, torch.device(device)),
        optimiser=torch.optim.SGD([images], config.lr_img, config.momentum),
        net=net,
        sampler=ClassSampler(dataset.train_labels, dataset.num_classes),
        augment=DSA(getattr(config, "dsa_strategy", "none")),
        memory=memory,
        activations=activation_bytes(net, (dataset.channels, *dataset.size)),
    )


def _near(images: Tensor, device: torch.device) -> Tensor:
    """The images on the GPU if they fill less than a quarter of what is free, else as they are."""
    if device.type != "cuda" or images.numel() > torch.cuda.mem_get_info(device)[0] // 4:
        return images
    return images.to(device)
