"""What RFAD and FRePo share: kernel ridge regression on features of random networks.

The synthetic images are the support set, with labels Y_s; the loss is that of their prediction of
real images by `ddfast.losses.krr_loss`, and the features' kernels are `empirical_nngp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddfast.data import Dataset
from ddfast.data.whitening import Recipe, problem
from ddfast.methods.run import Decoded, Run

LABELS = "label_weights"
"""Name of the learned labels among a run's tensors."""


def published_whitening(dataset: Dataset, mode: Recipe) -> Recipe:
    """As the official code has it: of colour images. Grey ones stay as they are.

    So do those that are too large for it, and the generated ones, which no paper has.
    """
    image = (dataset.channels, *dataset.size)
    plain = dataset.channels == 1 or dataset.name == "generated"
    return "none" if plain or problem(image, mode) else mode


def centred(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """one-hot - 1/C: (n,) int64 -> (n, C)."""
    return torch.nn.functional.one_hot(labels, classes).to(dtype) - 1 / classes


def labels_of(run: Run, made: Decoded, beside: Mapping[str, Tensor], scale: float = 1.0) -> Tensor:
    """Y_s of the decoded images: what was learned, else centred labels times a scale."""
    if LABELS in beside:
        return beside[LABELS] if made.sources is None else beside[LABELS][made.sources]
    return scale * centred(made.labels, run.dataset.num_classes, run.dtype)


def gradients(
    run: Run, made: Decoded, beside: Mapping[str, Tensor], x: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """Gradients of a loss by all that is learned.

    Args:
        beside: leaves by name, of which the loss may depend.
        x: the leaf of the decoded images.
        loss: 0-d.
    """
    by_x, *others = torch.autograd.grad(loss, [x, *beside.values()], materialize_grads=True)
    found = run.no_gradients()
    run.chain(found, made, made.images, by_x)
    return found | dict(zip(beside, others, strict=True))


def repeated(run: Run, loss: Tensor) -> Tensor:
    """The loss, once for each class, for a class has none of its own: (num_classes,)."""
    return loss.detach().to(run.dtype).reshape(1).expand(run.dataset.num_classes).clone()


def with_labels(
    distilled: Callable[..., dict[str, Any]],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What an artefact keeps: `distilled` of all but the learned labels, and these."""
    made = distilled({name: t for name, t in tensors.items() if name != LABELS}, state)
    if LABELS in tensors:
        made["soft_labels"] = tensors[LABELS].detach().float()
    return made


def precision(name: str) -> str | None:
    """The setting as `empirical_nngp` has it."""
    return None if name == "float32" else name


def solve_dtype(name: str, run: Run) -> torch.dtype:
    """The setting, and float64 for a run in float64."""
    wanted: torch.dtype = getattr(torch, name)
    return torch.promote_types(wanted, run.dtype)
