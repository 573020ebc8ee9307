"""The functions of the official MTT scripts that are not those of DC, under their names.

Replace `from utils import get_network, get_eval_pool, evaluate_synset, get_time, DiffAugment,
ParamDiffAug` and `from reparam_module import ReparamModule` by imports from here; TESLA, FTD and
DATM have copies of most of these functions. `docs/porting.md` shows how, and what is better still:
to replace the loop of the student by `ddfast.unroll.unroll`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddfast import nets
from ddfast.compat import dc, training
from ddfast.compat.diff_augment import ParamDiffAug, diff_augment
from ddfast.compat.training import TensorDataset, augment, get_daparam, get_time

__all__ = [
    "DiffAugment",
    "ParamDiffAug",
    "ReparamModule",
    "TensorDataset",
    "augment",
    "epoch",
    "evaluate_synset",
    "get_daparam",
    "get_eval_pool",
    "get_network",
    "get_time",
]

#: `eval_mode`: the networks that it stands for, where they are not those of DC.
EVALUATED = {
    "M": ("ConvNet", "AlexNet", "VGG11", "ResNet18_AP", "ResNet18"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL"),
}


def DiffAugment(
    x: Tensor,
    strategy: str = "",
    seed: int = -1,
    param: ParamDiffAug | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`ddfast.compat.dc.DiffAugment` with the pixel centres of MTT's code.

    That one samples with `align_corners=True`, DC's code on any newer torch without, which makes a
    difference for rotations of images that are not square. The parameters drawn are the same.

    Args:
        x, strategy, seed, param, generator: as in `ddfast.compat.dc.DiffAugment`.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError: as there.
    """
    return diff_augment(x, strategy, seed, param, generator, align_corners=True)


class ReparamModule(nn.Module):
    """A network whose parameters are given with each call, as one flat tensor.

    Its only parameter is `flat_param`, (P,), a copy of the network's in the order of
    `parameters()`; buffers stay with the network. A call with `flat_param` is differentiable with
    respect to it to every order that the network's layers have.

    Args:
        module: has no parameters of its own afterwards.

    Raises:
        ValueError: parameters of several dtypes (the official code asserts).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        first = dict(module.named_parameters())
        dtypes = {p.dtype for p in first.values()}
        if len(dtypes) != 1:
            found = ", ".join(sorted(map(str, dtypes))) or "no parameters"
            raise ValueError(f"module: has {found}, expected parameters of one dtype")
        self.flat_param = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in first.values()]))
        self.param_numel = self.flat_param.numel()
        self._shapes = [p.shape for p in first.values()]
        number = {parameter: place for place, parameter in enumerate(first.values())}
        # Layers may share a parameter; then several names have the same number.
        self._places = [
            (name.rpartition(".")[0], name.rpartition(".")[2], number[parameter])
            for name, parameter in module.named_parameters(remove_duplicate=False)
        ]
        self.module = module
        views = self._views(self.flat_param.detach())
        for owner, own, place in self._places:
            layer = module.get_submodule(owner)
            delattr(layer, own)
            setattr(layer, own, views[place])  # no parameter any more

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def forward(
        self,
        *inputs: Any,
        flat_param: Tensor | None = None,
        buffers: Sequence[Tensor] | None = None,
        **named: Any,
    ) -> Any:
        """The network's output.

        Args:
            inputs, named: of the network.
            flat_param: (P,) or (1, P), of the network's dtype; None for the module's own.
            buffers: in place of the network's, in the order of `named_buffers()`, of the same
                shapes and dtypes.

        Raises:
            ValueError: a flat_param of another size.
        """
        flat = self.flat_param if flat_param is None else flat_param.reshape(-1)
        if len(flat) != self.param_numel:
            raise ValueError(
                f"flat_param: got shape {tuple(flat.shape)}, expected ({self.param_numel},)"
            )
        views = self._views(flat)
        layers = [(self.module.get_submodule(owner), own) for owner, own, _ in self._places]
        before = [getattr(layer, own) for layer, own in layers]
        for (layer, own), (_, _, place) in zip(layers, self._places, strict=True):
            setattr(layer, own, views[place])
        try:
            if buffers is None:
                return self.module(*inputs, **named)
            names = (name for name, _ in self.module.named_buffers())
            given = dict(zip(names, buffers, strict=True))
            return functional_call(self.module, given, inputs, named)
        finally:
            for (layer, own), tensor in zip(layers, before, strict=True):
                setattr(layer, own, tensor)


def get_network(
    model: str,
    channel: int,
    num_classes: int,
    im_size: tuple[int, int] = (32, 32),
    dist: bool = True,
) -> nets.Network:
    """A network by its official name, on the GPU if there is one.

    Args:
        model, channel, num_classes, im_size: as in `ddfast.compat.dc.get_network`.
        dist: of no effect, for several GPUs are not used here.
    """
    return training.get_network(model, channel, num_classes, im_size)


def get_eval_pool(eval_mode: str, model: str, model_eval: str) -> list[str]:
    """The networks to evaluate on.

    Args:
        eval_mode: a key of `EVALUATED` or of `ddfast.compat.dc.EVALUATED` ("B" excepted); "S", the
            model with instance in place of batch normalisation; "C", the model and ConvNet;
            anything else, `model_eval`.
        model: that was matched on.
        model_eval: see `eval_mode`.
    """
    if eval_mode == "C":
        return [model, "ConvNet"]
    if eval_mode in EVALUATED:
        return list(EVALUATED[eval_mode])
    if eval_mode in ("B", "SS"):  # unknown to MTT's script
        return [model_eval]
    return dc.get_eval_pool(eval_mode, model, model_eval)


def epoch(
    mode: str,
    dataloader: Iterable[Sequence[Tensor]],
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    args: Any,
    aug: bool,
    texture: bool = False,
) -> tuple[float, float]:
    """One pass over a loader, with MTT's `DiffAugment`: mean loss, and accuracy from 0 to 1.

    Args:
        mode, dataloader, net, optimizer, criterion, args, aug: as in `ddfast.compat.dc.epoch`.
        texture: False.

    Raises:
        ValueError: `texture`, which is not offered.
    """
    _refuse_texture(texture)
    augment = training.augmented(args, aug, DiffAugment)
    return training.epoch(mode, dataloader, net, optimizer, criterion, args, augment)


def evaluate_synset(
    it_eval: int,
    net: nn.Module,
    images_train: Tensor,
    labels_train: Tensor,
    testloader: Iterable[Sequence[Tensor]],
    args: Any,
    return_loss: bool = False,
    texture: bool = False,
) -> tuple[Any, ...]:
    """Train a network on a synthetic set and test it, with MTT's `DiffAugment`; prints a line.

    Args:
        it_eval, net, images_train: as in `ddfast.compat.dc.evaluate_synset`.
        labels_train, testloader, args: as in `ddfast.compat.dc.evaluate_synset`.
        return_loss: whether to return losses, too.
        texture: False.

    Returns:
        The network, the training accuracy (0 to 1) of each epoch and the test accuracy; with
        `return_loss` also the training loss of each epoch and the test loss.

    Raises:
        ValueError: `texture`, which is not offered.
    """
    _refuse_texture(texture)
    found = training.train_and_test(
        *(it_eval, net, images_train, labels_train, testloader, args),
        training.augmented(args, True, DiffAugment),
    )
    results = net, found.train_accuracies, found.test_accuracy
    return (*results, found.train_losses, found.test_loss) if return_loss else results


def _refuse_texture(texture: bool) -> None:
    if texture:
        raise ValueError("texture: got True, and MTT's textures are not offered")
