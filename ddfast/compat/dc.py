"""The functions of the official DC, DSA and DM scripts, under their names and signatures.

Replace `from utils import ...` by `from ddfast.compat.dc import ...`; `docs/porting.md` shows how.

The functions of `ddfast.compat` are the only ones of ddfast that use torch's global generator,
where the official ones do, so that a script follows from `torch.manual_seed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddfast import losses
from ddfast.compat import training
from ddfast.compat.data import get_dataset
from ddfast.compat.diff_augment import ParamDiffAug, diff_augment
from ddfast.compat.training import TensorDataset, augment, get_daparam, get_network, get_time
from ddfast.methods.dc import loops

__all__ = [
    "DiffAugment",
    "ParamDiffAug",
    "TensorDataset",
    "augment",
    "epoch",
    "evaluate_synset",
    "get_daparam",
    "get_dataset",
    "get_eval_pool",
    "get_loops",
    "get_network",
    "get_time",
    "match_loss",
]

#: `eval_mode`: the networks that it stands for.
EVALUATED = {
    "M": ("MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"),
    "B": ("ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}

#: Names of the official `--dis_metric` and of ours.
DISTANCES = {"ours": "row_cosine", "mse": "mse", "cos": "cosine"}


def match_loss(gw_syn: Sequence[Tensor], gw_real: Sequence[Tensor], args: Any) -> Tensor:
    """Distance between the network gradients of synthetic and real images.

    Args:
        gw_syn, gw_real: gradients in parameter shape, floating point.
        args: anything with `dis_metric`, "ours", "mse" or "cos"; its `device` is not needed.

    Returns:
        Scalar on the gradients' device, differentiable twice; float32 unless the gradients are
        float64.

    Raises:
        ValueError: unknown `dis_metric` (the official script exits), or shapes that differ.
        TypeError: not floating-point tensors.
    """
    if args.dis_metric not in DISTANCES:
        raise ValueError(
            f"args.dis_metric: got {args.dis_metric!r}, expected one of {', '.join(DISTANCES)}"
        )
    return losses.gradient_distance(
        list(gw_syn), list(gw_real), DISTANCES[args.dis_metric], eps=1e-6
    )


def DiffAugment(
    x: Tensor,
    strategy: str = "",
    seed: int = -1,
    param: ParamDiffAug | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The official augmentation: same signature, parameters and random numbers.

    With a seed, all images get the same operation and parameters (siamese), equal to those of the
    official code: draw k comes from a generator seeded with seed + k. Ours is a private generator,
    so the global state, which the official code reseeds each time, is not touched. A batch of one
    image works.

    With seed -1, the operation is drawn once and the parameters for each image, as the official
    code does: from torch's global generators (the CPU's, and that of x's device). A `generator`
    replaces them.

    Args:
        x: (N, channels, height, width), floating point.
        strategy: operations joined by underscores; "", "none" or "None" returns x itself.
        seed: an integer >= 0, or -1.
        param: a `ParamDiffAug`; None: its defaults. As in the official code, its `Siamese` and
            `latestseed` are set.
        generator: only with seed -1.

    Returns:
        A contiguous tensor of x's shape and dtype; differentiable in x to every order.

    Raises:
        TypeError, ValueError: as `ddfast.augment.apply`; unknown operation or mode; negative seed.
    """
    return diff_augment(x, strategy, seed, param, generator, align_corners=False)


def get_loops(ipc: int) -> tuple[int, int]:
    """Image updates per network, and epochs of network training between two of them.

    For the ipc that the official script knows (1, 10, 20, 30, 40, 50) its values; where it exits,
    `(ipc, max(1, 500 // ipc))`, as `ddfast distill dc` does.

    Raises:
        ValueError: an ipc below 1.
    """
    if ipc < 1:
        raise ValueError(f"ipc: got {ipc}, expected at least 1")
    return loops(ipc)


def get_eval_pool(eval_mode: str, model: str, model_eval: str) -> list[str]:
    """The networks to evaluate on.

    Args:
        eval_mode: a key of `EVALUATED`; "S", the model with instance in place of batch
            normalisation (what follows BN in its name is lost, as in the official script); "SS",
            the model; anything else, `model_eval`.
        model: that was matched on.
        model_eval: see `eval_mode`.
    """
    if eval_mode in EVALUATED:
        return list(EVALUATED[eval_mode])
    if eval_mode == "S":
        return [model.split("BN")[0]]
    return [model if eval_mode == "SS" else model_eval]


def epoch(
    mode: str,
    dataloader: Iterable[Sequence[Tensor]],
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    args: Any,
    aug: bool,
) -> tuple[float, float]:
    """One pass over a loader: mean loss, and accuracy from 0 to 1, while it went on.

    Args:
        mode: "train" to make optimiser steps; anything else to test, without graphs.
        dataloader: of images, (n, channels, H, W), and labels, (n,), of any dtype.
        net: is trained or tested in place.
        optimizer: of its parameters; of no effect in a test.
        criterion: mean cross-entropy of a batch.
        args: with `device`; where `aug`, with `dsa`, and then `dsa_strategy` and `dsa_param`, else
            `dc_aug_param`.
        aug: whether to augment.
    """
    return training.epoch(
        mode,
        dataloader,
        net,
        optimizer,
        criterion,
        args,
        training.augmented(args, aug, DiffAugment),
    )


def evaluate_synset(
    it_eval: int,
    net: nn.Module,
    images_train: Tensor,
    labels_train: Tensor,
    testloader: Iterable[Sequence[Tensor]],
    args: Any,
) -> tuple[nn.Module, float, float]:
    """Train a network on a synthetic set and test it, by the official schedule; prints a line.

    `args.epoch_eval_train + 1` epochs of SGD (momentum 0.9, weight decay 5e-4) in batches of
    `args.batch_train`; after the epoch with index `args.epoch_eval_train // 2 + 1` a new optimiser
    with a tenth of `args.lr_net`. Draws what the official function draws from the global generator.
    Several networks at once, beside random selections, are what `ddfast.evaluate.evaluate` trains.

    Args:
        it_eval: a number for the line.
        net: is trained in place.
        images_train: (N, channels, H, W), floating point.
        labels_train: (N,), int64.
        testloader: of images, (n, channels, H, W), and labels, (n,), of any dtype.
        args: with `device`, `lr_net`, `epoch_eval_train`, `batch_train`, and see `epoch`.

    Returns:
        The network, and the accuracies (0 to 1) of the last epoch and of the test.
    """
    function = training.augmented(args, True, DiffAugment)
    history = training.train_and_test(
        it_eval, net, images_train, labels_train, testloader, args, function
    )
    return net, history.train_accuracies[-1], history.test_accuracy
