"""What the commands of the command line share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

S = TypeVar("S")


class Formatter(DefaultHelpFormatter):
    """The help as it was written: defaults and types are in it where they matter."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""


class Parser(ArgumentParser):
    """Flags, or a YAML file with --config; errors are one line."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=Formatter, allow_abbrev=False
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "(\w+)":', r"--\1:", message)
        message = re.sub(
            r"Expected a (?:<class ')?(.+?)(?:'>)?\. Got value: (.*)",
            r"got \2, expected \1",
            message,
        )
        unknown = re.search(r"(?i)unrecognized arguments: (--\w+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{message}; `{self.prog} --help` lists the flags")

    def fields(self, settings: type[Any], required: Sequence[str], title: str) -> None:
        """A flag for every field of a class of settings, and --config for a file of them.

        Args:
            settings: a subclass of `ddfast.methods.config.Settings`.
            required: names that cannot be left out, for their help.
            title: heading of the fields that do not belong to the task.
        """
        self.add_argument(
            "--config",
            action=ActionConfigFile,
            metavar="FILE",
            help="YAML with any of these, by name",
        )
        hints = get_type_hints(settings)
        groups = {
            "task": self.add_argument_group("task"),
            "method": self.add_argument_group(title),
        }
        for field in dataclasses.fields(settings):
            default = None if field.default is dataclasses.MISSING else field.default
            self.flag(
                groups[field.metadata["group"]],
                [field.name, *field.metadata["aliases"]],
                hints[field.name],
                default,
                field.metadata["help"] + (" (required)" if field.name in required else ""),
            )

    def parsed(
        self, words: list[str], settings: type[S], required: Sequence[str]
    ) -> tuple[Namespace, S]:
        """The flags of `fields` and others: all of them, and those of the settings as such.

        Raises:
            ValueError: flags that are missing, unknown or wrong.
        """
        options = self.parse_args(words)
        missing = [name for name in required if options[name] is None]
        if missing:
            self.error(f"required and missing: --{', --'.join(missing)}")
        fields: Any = settings
        found = {field.name: options[field.name] for field in dataclasses.fields(fields)}
        return options, settings(**found | {"data_options": plain(found["data_options"])})

    def flag(self, group: Any, names: Sequence[str], hint: Any, default: Any, help: str) -> None:
        """One flag, which may be left out; `default` None is not mentioned."""
        group.add_argument(
            *(f"--{name}" for name in names),
            type=hint,
            default=default,
            metavar=_metavar(hint),
            help=help + ("" if default in (None, {}) else f" (default: {default})"),
        )


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "BOOL"}.get(hint, "MAPPING")


def first_line(function: Callable[..., Any]) -> str:
    """What a command does, as its function says."""
    return (function.__doc__ or "").strip().split("\n")[0]


def plain(value: Any) -> dict[str, Any]:
    """A mapping as the parser gives it, or None, as a dictionary."""
    return value.as_dict() if isinstance(value, Namespace) else dict(value or {})


def set_threads(threads: int | None) -> None:
    """Threads on the CPU; None leaves them as they are."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1")
    import torch

    torch.set_num_threads(threads)
