"""Methods of your own beside those of ddfast: what one has to have, and files that bring one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from ddfast.methods.config import Config
from ddfast.methods.run import Run


@dataclass(frozen=True)
class Method:
    """A method and what there is to know about it.

    Attributes:
        name: as on the command line.
        title: of the paper, with authors, venue and year.
        matches: the statistic that is matched.
        protocol: by which the paper evaluates, see `ddfast.evaluate.protocol`.
        status: how far it has been verified.
        config: the class of its settings.
        check, prepare, step: see `ddfast.methods`.
    """

    name: str
    title: str
    matches: str
    protocol: str
    status: str
    config: type[Config]
    check: Callable[[Run], None]
    prepare: Callable[[Run], Iterator[str]]
    step: Callable[[Run], Tensor]


def nothing(run: Run) -> Iterator[str]:
    """The preparation of a method that needs none."""
    return iter(())


def anything(run: Run) -> None:
    """The check of a method that can refuse nothing beforehand."""


def described(
    name: str,
    config: type[Config],
    step: Callable[[Run], Tensor],
    check: Callable[[Run], None] | None,
    prepare: Callable[[Run], Iterator[str]] | None,
    title: str,
    matches: str,
    protocol: str,
) -> Method:
    """A method from outside ddfast, or the error that names what it lacks.

    Raises:
        TypeError, ValueError: see `ddfast.methods.register`.
    """
    from ddfast.evaluate import PROTOCOLS  # which stands on the methods

    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, expected a string")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"name: got {name!r}, expected letters, digits and _, in lower case")
    _check_config(config)
    for what, function in (("step", step), ("check", check), ("prepare", prepare)):
        if function is not None or what == "step":
            _check_function(what, function)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: got {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    return Method(
        name,
        title or name,
        matches or "what its author says",
        protocol,
        f"registered by {getattr(step, '__module__', None) or type(step).__module__}",
        config,
        check or anything,
        prepare or nothing,
        step,
    )


def _check_config(config: type[Config]) -> None:
    if not isinstance(config, type) or not issubclass(config, Config):
        raise TypeError(f"config: got {config!r}, expected a subclass of ddfast.methods.Config")
    own = f"{config.__module__}.{config.__qualname__}"
    if "__dataclass_fields__" not in vars(config):
        raise TypeError(
            f"config: {own} is no dataclass of its own, so that its fields would be lost; put "
            "@dataclass(frozen=True, kw_only=True) before it"
        )
    for field in dataclasses.fields(config):
        if "identity" not in field.metadata:
            raise TypeError(
                f"config: field {field.name} of {own} has no help, range and group; make it with "
                f"ddfast.methods.setting, as in {field.name}: float = setting('what it is', 1.0)"
            )
    try:
        get_type_hints(config)
    except NameError as error:
        raise TypeError(f"config: a type of {own} cannot be found: {error}") from None


def _check_function(what: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"{what}: got {function!r}, expected a function of the run")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise TypeError(
            f"{what}: {function!r} cannot be called with the run as its one argument"
        ) from None


def plug_in(plugin: str | os.PathLike[str]) -> None:
    """Run a Python file, or import a module, that registers methods (see `register`).

    The code runs with all rights of this process: only name files that you trust.

    Args:
        plugin: path of a file that ends in `.py`, or the name of an installed module.

    Raises:
        ValueError: it is empty.
        FileNotFoundError: there is no such file.
        ImportError: there is no such module.
    """
    if not str(plugin):
        raise ValueError("plugin: expected a file that ends in .py, or a module, got nothing")
    if not str(plugin).endswith(".py"):
        importlib.import_module(str(plugin))
        return
    path = Path(plugin).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"plugin: there is no file {plugin}")
    # Not the stem: a file may be called as a module that others import.
    name = f"plugin {path}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their types up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
