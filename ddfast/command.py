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


EXAMPLES = "examples:"

#: What stands for the value of a flag in the help, by its name; else its type says it.
VALUES = {"out": "FOLDER", "data_path": "FOLDER", "dataset": "NAME", "model": "NAME"}
VALUES |= {"memory": "SIZE", "device": "DEVICE", "threads": "N", "ipc": "N"}


class Formatter(DefaultHelpFormatter):
    """The help as it was written: defaults and types are in it where they matter."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """All names of a flag, then once what its value is."""
        if not action.option_strings:
            return str(super()._format_action_invocation(action))
        value = "" if action.nargs == 0 else f" {self._format_args(action, str(action.metavar))}"
        return ", ".join(action.option_strings) + value

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Examples stay on lines of their own."""
        if text.startswith(EXAMPLES):
            return text
        return str(super()._fill_text(text, width, indent))


class Parser(ArgumentParser):
    """Flags, or a YAML file with --config; errors are one line.

    Args:
        prog: the command, such as "ddfast show".
        description: what it does.
        usage: what follows it, the flags that are needed in any case; empty for all flags.
        examples: whole command lines, for the end of the help.
    """

    def __init__(
        self, prog: str, description: str, usage: str = "", examples: Sequence[str] = ()
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            usage=f"{prog} {usage}" if usage else None,
            epilog="\n  ".join([EXAMPLES, *examples]) if examples else None,
            formatter_class=Formatter,
            allow_abbrev=False,
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
            help="YAML file with any of these, by name; flags after it win",
        )
        for action in self._actions:
            if "--print_config" in action.option_strings:
                action.help = "print all settings as YAML for --config, and do nothing else"
                action.metavar = ""
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

    def flag(
        self,
        group: Any,
        names: Sequence[str],
        hint: Any,
        default: Any,
        help: str,
        metavar: str | None = None,
    ) -> None:
        """One flag, which may be left out; `default` None is not mentioned."""
        shown = str(default).lower() if isinstance(default, bool) else default
        group.add_argument(
            *(f"--{name}" for name in names),
            type=hint,
            default=default,
            metavar=metavar or VALUES.get(names[0]) or _metavar(hint),
            help=help + ("" if default in (None, {}) else f" (default: {shown})"),
        )


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    return {int: "N", float: "NUMBER", str: "TEXT", bool: "{true,false}"}.get(hint, "MAPPING")


def left_out(settings: Any) -> str:
    """What a class of settings uses where a flag is left out, to follow a colon."""
    text = " ".join((settings.published.__doc__ or "").split())
    name = not text[1:2].islower() or text.startswith(("Glorot", "BigGAN"))
    return text if name else text[:1].lower() + text[1:]


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
