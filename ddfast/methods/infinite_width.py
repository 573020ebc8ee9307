"""What KIP and LS share: regression with the kernel of an infinitely wide network, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddfast.data.whitening import Recipe
from ddfast.engine.kernel_regression import Kernel, rows_at_once
from ddfast.kernel_matrix import kernel_matrix, kernel_options
from ddfast.methods.config import ZCA_HELP, setting
from ddfast.methods.config import Config as Shared
from ddfast.methods.regression import centred, with_labels
from ddfast.methods.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Settings of methods with the kernel of an infinitely wide network."""

    model: str = setting("network for protocols that train one; the method needs none")
    kernel: str = setting(
        "such as ntk-fc3, ntk-conv3, nngp-conv3-gap, ntk-kip_convnet or ntk-myrtle5"
    )
    weight_var: float = setting("variance of the weights, times fan-in", 2.0, above=0)
    bias_var: float = setting("variance of the biases", 0.01, least=0)
    reg: float = setting("ridge, in units of the kernel's mean diagonal element", 1e-6, least=0)
    dtype: Literal["float64", "float32"] = setting("of the kernel; what is solved is float64's")
    zca: Recipe = setting(ZCA_HELP, "none")

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """With the labels, if they were learned."""
        return with_labels(super().distilled, tensors, state)


def kernel_of(config: Config) -> Kernel:
    """The kernel that the config names."""
    options = kernel_options(config.kernel)
    return partial(kernel_matrix, weight_var=config.weight_var, bias_var=config.bias_var, **options)


def dtype_of(run: Run) -> torch.dtype:
    """In which the kernel is computed: the setting, and float64 for a run in float64."""
    config = run.config
    assert isinstance(config, Config)
    wanted: torch.dtype = getattr(torch, config.dtype)
    return torch.promote_types(wanted, run.dtype)


def targets(
    run: Run, indices: Tensor, support: Tensor, augment: Callable[[Tensor, slice], Tensor] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Real images, and one-hot - 1/C, in blocks that fit the memory with their kernel.

    Args:
        indices: positions of the training images.
        support: (n, ...), in the kernel's dtype.
        augment: of images, by their place in `indices`; None for none.
    """
    classes = run.dataset.num_classes
    most = rows_at_once(support, classes, run.memory)
    for begin in range(0, len(indices), most):
        here = slice(begin, min(begin + most, len(indices)))
        rows = indices[here]
        # Rounded as the support set is: an image that it began with has the very same numbers. A
        # kernel's slope is infinite there, and of pairs a rounding apart it would be noise.
        images = run.real(rows).to(support.dtype)
        if augment is not None:
            images = augment(images, here)
        labels = run.dataset.train_labels[rows].to(run.device)
        yield images, centred(labels, classes, torch.float64)


def check(run: Run) -> None:
    """Refuse what cannot work before the first step.

    Raises:
        ValueError: no such kernel, or one for larger images; a memory that holds no image.
    """
    config = run.config
    assert isinstance(config, Config)
    image = torch.zeros(1, run.dataset.channels, *run.dataset.size, dtype=dtype_of(run))
    kernel_of(config)(image)
    n = run.decoded_per_class * run.dataset.num_classes
    rows_at_once(image.expand(n, -1, -1, -1), run.dataset.num_classes, run.memory)
