"""The state in which a run begins."""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast import nets
from ddfast.data import ClassSampler, Dataset, whitened
from ddfast.memory import activation_bytes
from ddfast.methods.config import Config
from ddfast.methods.run import Run
from ddfast.random import generator


def start(
    config: Config,
    dataset: Dataset,
    memory: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Run:
    """A run at iteration 0.

    Args:
        config: resolved, see :func:`resolve`.
        dataset: what is distilled.
        memory: bytes that a step may use for activations.
        device: where to compute.
        dtype: of images, network and activations; tensors that start in float64 stay in it.

    Raises:
        ValueError: unknown model, too large an ipc, an empty class; whitening of images that are
            not stored as pixels of normalised images.
    """
    zca = getattr(config, "zca", "none")
    if zca != "none" and (config.parametrisation, config.space) != ("pixels", "normalised"):
        raise ValueError(
            f"zca: got {zca!r} with parametrisation {config.parametrisation}; whitened images are "
            "stored as pixels"
        )
    dataset = whitened(dataset, zca)
    net = nets.build(
        config.model,
        dataset.channels,
        dataset.num_classes,
        dataset.size,
        generator(config.seed, "network"),
    )
    net = net.to(device, dtype)
    tensors, labels = config.starting_set(dataset, generator(config.seed, "images"))
    tensors = {  # float64 stays what it is
        name: t.to(device, torch.promote_types(t.dtype, dtype)).requires_grad_()
        for name, t in tensors.items()
    }
    return Run(
        config=config,
        dataset=dataset,
        tensors=tensors,
        labels=labels.to(device),
        real_images=_near(dataset.train_images, torch.device(device)),
        optimiser=config.optimiser(tensors),
        net=net,
        sampler=ClassSampler(dataset.train_labels, dataset.num_classes),
        augment=config.augmentation(),
        memory=memory,
        activations=activation_bytes(net, (dataset.channels, *dataset.size)),
    )


def _near(images: Tensor, device: torch.device) -> Tensor:
    """The images on the GPU if they fill less than a quarter of what is free, else as they are."""
    if device.type != "cuda" or images.numel() > torch.cuda.mem_get_info(device)[0] // 4:
        return images
    return images.to(device)
