"""What the help says: every flag once with one line about it, and examples that can be run."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise

import pytest

from ddfast import methods
from ddfast.cli import COMMANDS, main
from ddfast.command import Parser

PAGES = [
    [],
    *[[name] for name in COMMANDS if name != "bench"],
    *[["distill", name] for name in methods.methods()],
]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """The lines of a command's help, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")

    def lines(words: list[str]) -> list[str]:
        try:
            main([*words, "--help"])
        except SystemExit as end:
            assert end.code == 0
        return capsys.readouterr().out.splitlines()

    return lines


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_the_help_reads_well(help_of, words) -> None:
    lines = help_of(words)
    assert lines[0].startswith(" ".join(["usage: ddfast", *words]))
    assert len(lines[0]) < 80 and not lines[1]  # not a heap of flags
    for line in lines:
        assert not re.search(r"NoneType|Literal|<class|default: (?:null|None|True|False)", line), (
            line
        )
        # Two things are not broken: what a user copies, and a flag with all its choices.
        assert len(line) <= 100 or line.startswith(("  ddfast ", "  --")), line
    for flag, after in pairwise([*lines, ""]):
        if re.match(r"  --?\w", flag):
            said = re.search(r"\S {2,}\S", flag) or after.startswith(" " * 20)
            assert said, f"nothing about {flag}"


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_examples_are_commands_that_there_are(help_of, words, monkeypatch) -> None:
    """They come to the point where the flags are read and the work would begin."""
    examples = [line.strip() for line in help_of(words) if line.startswith("  ddfast ")]
    assert examples or words == ["methods"]

    class Reached(Exception):
        pass

    parse = Parser.parse_args

    def read(self: Parser, given: list[str]) -> None:
        parse(self, given)
        raise Reached

    monkeypatch.setattr(Parser, "parse_args", read)
    for example in examples:
        command, *rest = shlex.split(example.removeprefix("ddfast "))
        with pytest.raises(Reached):
            COMMANDS[command](rest)
