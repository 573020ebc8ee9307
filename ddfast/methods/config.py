"""The settings that every method shares, and how those left out get their published values."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ddfast.augment import DSA
from ddfast.data import Dataset, canonical_name, names
from ddfast.synthetic.parametrisation import recipe, starting_set

C = TypeVar("C", bound="Config")
S = TypeVar("S", bound="Settings")

DIGITS_MODEL = "ConvNetD2W32"
"""For scikit-learn's 8x8 digits, which no paper has. Chosen on a split of their training images:
about as accurate as width 64, and a whole comparison takes a minute or two on two cores."""


def setting(
    help: str,
    default: Any = None,
    *,
    aliases: tuple[str, ...] = (),
    group: str = "method",
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    identity: bool = True,
) -> Any:
    """A field of a config: its line of help, other names of its flag, and the range it must lie in.

    Args:
        help: one line.
        default: None stands for the published value for the data set and ipc.
        aliases: other names of its flag.
        group: the heading of the help under which it is listed.
        least, above, below: bounds, `least` included, the two others not.
        identity: whether two runs that differ in it are different runs.
    """
    metadata = {
        "help": help,
        "aliases": aliases,
        "group": group,
        "least": least,
        "above": above,
        "below": below,
        "identity": identity,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields made with `setting`, checked when made.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range; the message names it.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = _checked(field.name, value, hints[field.name], field.metadata)
                object.__setattr__(self, field.name, value)
            elif field.default is MISSING or field.default is not None:
                raise TypeError(f"{field.name}: got None, expected {_expected(hints[field.name])}")


@dataclass(frozen=True, kw_only=True)
class Task(Settings):
    """What every run has: its data and its seed."""

    dataset: str = setting("name of the data set, such as digits or CIFAR10", group="task")
    data_path: str = setting("folder that holds its files", group="task", identity=False)
    data_options: dict[str, Any] = setting(
        'options of its reader, such as {"classes": 5}', {}, group="task"
    )
    seed: int = setting("every random number of the run follows from it", 0, group="task")


@dataclass(frozen=True, kw_only=True)
class Config(Task):
    """Settings of a distillation run.

    A method's config adds its own fields and says in `published` what it uses where a field is left
    out (None). The names are those of the official scripts' flags. `resolve` fills them all in.

    Attributes:
        space: of the synthetic images, see `ddfast.artefact.Artefact`.
        beside: names of what is learned beside the images: labels, learning rates.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range; the message names it.
    """

    space: ClassVar[str] = "normalised"
    beside: ClassVar[tuple[str, ...]] = ()

    ipc: int = setting("synthetic images per class", MISSING, group="task", least=1)
    model: str = setting(
        "network (published: ConvNet, one block more for each doubling beyond 32 px)"
    )
    iterations: int = setting("outer iterations of the run", aliases=("Iteration",), least=1)
    batch_real: int = setting("real images per class and step", 256, least=1)
    init: Literal["real", "noise", "mix"] = setting(
        "what images start from: real, noise, or with multi_formation mix (real ones in cells)",
        aliases=("pix_init",),
    )
    parametrisation: Literal["pixels", "multi_formation", "hallucinators", "bases"] = setting(
        "how images are stored (IDC: multi_formation, HaBa: hallucinators, LinBa: bases)",
        aliases=("parametrization",),
    )
    factor: int = setting("with multi_formation: a stored image decodes to factor^2 (2)", least=1)
    shared: int = setting("how many hallucinators (5) or bases (16) the images share", least=1)
    base_scale: int = setting("with bases: they are so many times smaller than images (2)", least=1)
    lr_decoder: float = setting("learning rate of hallucinators or bases (lr_img)", above=0)
    lr_img: float = setting("learning rate of the synthetic images", above=0)
    momentum: float = setting("momentum of the synthetic images", 0.5, least=0, below=1)

    def published(self, dataset: Dataset) -> Mapping[str, Any]:
        """The value of every field that may be left out, for `dataset` and `self.ipc`."""
        return {
            "model": DIGITS_MODEL if dataset.name == "digits" else convnet_of(dataset.size),
            "parametrisation": "pixels",
        }

    def starting_set(
        self, dataset: Dataset, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the run starts from: the tensors that it learns, by name, and the labels.

        Args:
            dataset: what is distilled.
            generator: a CPU generator.

        Returns:
            Floating tensors of any shape, of which the one called `self.rows` has as many rows for
            each class, class 0 first; and the labels of these rows, int64 (rows,).
        """
        return starting_set(
            dataset,
            self.ipc,
            self.parametrisation,
            self.init,
            generator,
            factor=self.factor or 1,
            shared=self.shared or 0,
            base_scale=self.base_scale or 1,
            space=self.space,
        )

    def decoder(self, size: tuple[int, int]) -> Mapping[str, Any] | None:
        """How the images are decoded for training (`ddfast.synthetic.decode`); None if as they are.

        To be asked of a resolved config.

        Args:
            size: (H, W) of the data set's images.
        """
        return recipe(self.parametrisation, self.factor or 1, size, self.space)

    def distilled(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What an artefact keeps of a run: images, decoder_tensors, soft_labels and lr.

        Args:
            tensors, state: as in `Run`.
        """
        learned = {name: tensor.detach().float() for name, tensor in tensors.items()}
        return {"images": learned.pop("images"), "decoder_tensors": learned}

    def augmentation(self) -> DSA:
        """Of the images that are matched; the identity for methods without."""
        return DSA(getattr(self, "dsa_strategy", "none"))

    @property
    def rows(self) -> str:
        """Name of the tensor that has rows of each class, see `starting_set`."""
        return "coefficients" if self.parametrisation == "bases" else "images"

    def optimiser(self, tensors: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """SGD with lr_img, and with lr_decoder for what the images share.

        Args:
            tensors: as in `Run`.
        """
        return torch.optim.SGD(self.parameter_groups(tensors), self.lr_img, self.momentum)

    def parameter_groups(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """What images are made of, with its learning rates, for a torch optimiser.

        Args:
            tensors: as in `Run`.
        """
        rows = self.rows
        groups: list[dict[str, Any]] = [{"params": [tensors[rows]], "lr": self.lr_img}]
        apart = rows, *self.beside
        shared = [tensor for name, tensor in tensors.items() if name not in apart]
        if shared:
            groups.append({"params": shared, "lr": self.lr_decoder})
        return groups


def filled(config: S, dataset: Dataset) -> S:
    """Settings with every field that was left out as their method `published` has it.

    Args:
        config: with a field `dataset`.

    Raises:
        ValueError: they name another data set.
    """
    fields: Any = config
    known = dataset.name in names()  # others carry names of their own, such as a folder's
    if fields.dataset is not None and known and canonical_name(fields.dataset) != dataset.name:
        raise ValueError(
            f"dataset: the config says {fields.dataset!r}, the data set given is {dataset.name!r}"
        )
    published = {"dataset": dataset.name, **fields.published(dataset)}
    missing = {name: value for name, value in published.items() if getattr(config, name) is None}
    if known:
        missing["dataset"] = dataset.name
    return dataclasses.replace(fields, **missing)


def resolve(config: C, dataset: Dataset) -> C:
    """The config with every field that was left out set to its published value.

    Args:
        config: of a method.
        dataset: what it is to distil; published values depend on it.

    Raises:
        ValueError: the config names another data set; a field without which no run can begin was
            left out, and the method has no published value for it.
    """
    config = filled(config, dataset)
    for name in ("model", "iterations", "init", "lr_img"):
        if getattr(config, name) is None:
            raise ValueError(
                f"{name}: left out, and `published` of {type(config).__module__}.Config has no "
                "value for it"
            )
    storage = {"multi_formation": {"factor": 2}, "hallucinators": {"shared": 5}}
    storage["bases"] = {"shared": 16, "base_scale": 2}
    needed: dict[str, Any] = storage.get(config.parametrisation, {})
    if "shared" in needed:
        needed |= {"lr_decoder": config.lr_img}
    missing = {name: value for name, value in needed.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


ZCA_HELP = "whitening of all images, fitted on the training images, by whose recipe"


def dsa_strategy(dataset: Dataset) -> str:
    """The published strategy; without flip for digits, which mirrored are something else."""
    if dataset.name in ("MNIST", "SVHN", "digits"):
        return "color_crop_cutout_scale_rotate"
    return "color_crop_cutout_flip_scale_rotate"


def as_json(config: Settings) -> dict[str, Any]:
    """The fields of a config as plain values that survive a round trip through JSON.

    Those that say only where things are, such as `data_path`, are left out.
    """
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata["identity"]
    }


def convnet_of(size: tuple[int, int]) -> str:
    """ConvNet with as many blocks as leave planes of 4 to 7 pixels: 3 at 28 and 32, 4 at 64."""
    depth = max(1, min(size).bit_length() - 3) if min(size) != 28 else 3
    return "ConvNet" if depth == 3 else f"ConvNetD{depth}"


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    name = getattr(get_origin(hint) or hint, "__name__", str(hint))
    return {"int": "an integer", "float": "a number", "str": "a string", "dict": "a mapping"}.get(
        name, name
    )


def _checked(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> Any:
    """The value in the field's type, or the error that says what is wrong with it."""
    kind = get_origin(hint) or hint
    if kind is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name}: got {value!r}, expected {_expected(hint)}")
        return value
    if kind is dict:
        try:
            return json.loads(json.dumps(dict(value)))
        except (TypeError, ValueError):
            raise TypeError(f"{name}: got {value!r}, expected a mapping of plain values") from None
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, expected true or false")
        return value
    accepted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name}: got {value!r}, expected {_expected(hint)}")
    if kind is float:
        value = float(value)
    if kind in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}: got {value}, expected a finite number")
        for bound, holds, words in (
            ("least", lambda limit: value >= limit, "at least"),
            ("above", lambda limit: value > limit, "more than"),
            ("below", lambda limit: value < limit, "less than"),
        ):
            if bounds[bound] is not None and not holds(bounds[bound]):
                raise ValueError(f"{name}: got {value}, expected {words} {bounds[bound]}")
    return value
