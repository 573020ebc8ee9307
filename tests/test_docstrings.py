"""Public names say what they take, return and raise: shapes, dtypes, errors and sources, checked.

What a docstring leaves to another one ("arguments and errors as `mmd`") is looked up there.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

#: What computes something that a paper defines, and says which.
FROM_PAPERS = ("ddfast.losses", "ddfast.layers", "ddfast.kernel_matrix", "ddfast.unroll")
MODULES = (
    *FROM_PAPERS,
    "ddfast",
    "ddfast.artefact",
    "ddfast.augment",
    "ddfast.bench",
    "ddfast.compat.dc",
    "ddfast.compat.idc",
    "ddfast.compat.mtt",
    "ddfast.data",
    "ddfast.distill",
    "ddfast.engine",
    "ddfast.evaluate",
    "ddfast.experts",
    "ddfast.generator",
    "ddfast.memory",
    "ddfast.methods",
    "ddfast.nets",
    "ddfast.random",
    "ddfast.synthetic",
    "ddfast.synthetic.bases",
    "ddfast.synthetic.hallucinators",
    "ddfast.synthetic.multi_formation",
)
OF_OTHERS = ("torch", "numpy", "safetensors")
ANY_TENSORS = "ddfast.testing"  # its functions take tensors of any shape and dtype

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.MULTILINE)
#: One length of a shape: a name or number, a product or sum of them, a function of one.
LENGTH = r"(?:\.{3}|\d \w+|\*?[\w.\[\]]+(?: ?[*/+-]+ ?\w+)*|\w+\([^()]*\))"
SHAPE = re.compile(
    rf"\({LENGTH},(?: {LENGTH},?)*\)|\b0-d\b|[Ss]calar|\bshapes?\b|\bflat\b|\bvectors?\b"
)
DTYPE = re.compile(r"\b(?:float\d+|floating|int64|integers?|uint8|dtypes?)\b")
SOURCE = re.compile(r"\b(?:19|20)\d\d\b|\beq\. \d|§")
REFERENCE = re.compile(
    r"\b[Aa]s\b(?: \w+)?,? (?::\w+:)?`+~?([\w.]+)`|[Ss]ee (?::\w+:)?`+~?([\w.]+)`"
)


def public(module: str) -> dict[str, Any]:
    """What a module offers: its `__all__`, or what it defines without an underscore."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module
    ]
    return {name: getattr(loaded, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Documented:
    """A function, a method, or a class with what makes it."""

    name: str
    value: Any
    text: str

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.value)

    def section(self, title: str) -> str:
        parts = SECTION.split(self.text)
        return dict(zip(parts[1::2], parts[2::2], strict=True)).get(title, "")

    def entries(self, title: str) -> dict[str, str]:
        """The entries of a section, under each of the names that they begin with."""
        parts = ENTRY.split("\n" + self.section(title))
        each = zip(parts[1::2], parts[2::2], strict=True)
        return {name: text for names, text in each for name in names.split(", ")}

    def arguments(self) -> dict[str, str]:
        """Those of Args; of a class those of Attributes, and fields that have a help text."""
        if not self.is_class:
            return self.entries("Args")
        helped = {}
        if dataclasses.is_dataclass(self.value):
            fields = dataclasses.fields(self.value)
            helped = {f.name: f.metadata["help"] for f in fields if "help" in f.metadata}
        return self.entries("Args") | self.entries("Attributes") | helped

    def parameters(self) -> dict[str, str]:
        """Names, and annotations as they are written."""
        if self.is_class and issubclass(self.value, BaseException):
            return {}
        variable = {inspect.Parameter.VAR_KEYWORD}
        if self.is_class:  # which passes on what it is given
            variable.add(inspect.Parameter.VAR_POSITIONAL)
        return {
            p.name: str(p.annotation)
            for p in inspect.signature(self.value).parameters.values()
            if p.name != "self" and not p.name.startswith("_") and p.kind not in variable
        }

    def others(self, known: Mapping[str, Documented]) -> Iterator[Documented]:
        """What it refers to, and what that refers to."""
        seen, rest = {self.name}, [self]
        while rest:
            text, place = rest[0].text, rest.pop(0).name.rsplit(".", 1)[0]
            for names in REFERENCE.findall(text):
                reference = names[0] or names[1]
                other = known.get(f"{place}.{reference}") or known.get(reference)
                if other is not None and other.name not in seen:
                    seen.add(other.name)
                    rest.append(other)
                    yield other


def of_module(module: str) -> Iterator[Documented]:
    for name, value in public(module).items():
        if inspect.isclass(value):
            yield Documented(f"{module}.{name}", value, inspect.cleandoc(value.__doc__ or ""))
            fields = getattr(value, "__dataclass_fields__", {})
            for method, member in vars(value).items():
                if method in fields:  # its default
                    continue
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and (method[0] != "_" or method == "__call__"):
                    text = inspect.cleandoc(function.__doc__ or "")
                    yield Documented(f"{module}.{name}.{method}", function, text)
        elif inspect.isroutine(value) or hasattr(value, "__wrapped__"):
            yield Documented(f"{module}.{name}", value, inspect.getdoc(value) or "")


ALL = {d.name: d for module in (*MODULES, ANY_TENSORS) for d in of_module(module)}
# By every ending of the name, too; the first module that has a name counts.
KNOWN = {
    ".".join(parts[start:]): documented
    for name, documented in reversed(ALL.items())
    if (parts := name.split("."))
    for start in range(len(parts))
}


# --- what is wrong with a docstring -------------------------------------------------------------


def missing_arguments(d: Documented, known: Mapping[str, Documented] = KNOWN) -> list[str]:
    """Parameters that are not explained; entries that are no parameters."""
    own = d.arguments()
    elsewhere = {name for other in d.others(known) for name in other.arguments()}
    wrong = []
    for name, annotation in d.parameters().items():
        plain = "Tensor" not in annotation or d.name.startswith(ANY_TENSORS)
        mentioned = re.search(rf"\b{name}\b", SECTION.split(d.text)[0]) and plain
        if name not in own and name not in elsewhere and not mentioned:
            wrong.append(f"{name} is not explained")
    if not d.is_class:
        names = set(inspect.signature(d.value).parameters)
        wrong += [f"{name} is no argument" for name in own if name not in names]
    return wrong


def missing_shapes(d: Documented, known: Mapping[str, Documented] = KNOWN) -> list[str]:
    """Tensors whose shape or dtype is not stated: arguments, and what is returned."""
    explained = [d.arguments(), *(other.arguments() for other in d.others(known))]
    wrong = []
    for name, annotation in d.parameters().items():
        if "Tensor" not in annotation or "Callable" in annotation:
            continue
        text = next((each[name] for each in explained if name in each), "")
        if REFERENCE.search(text):
            continue
        if not SHAPE.search(text):
            wrong.append(f"{name}: no shape")
        if not DTYPE.search(text):
            wrong.append(f"{name}: no dtype")
    returned = "" if d.is_class else str(inspect.signature(d.value).return_annotation)
    if "Tensor" in returned:
        text = d.section("Returns") + d.section("Yields") + d.text.split("\n")[0]
        text += "".join(other.section("Returns") for other in d.others(known))
        if not SHAPE.search(text):
            wrong.append("returns: no shape")
    return wrong


def raised(function: Any, cls: type | None = None, seen: set[Any] | None = None) -> set[str]:
    """ValueError and TypeError that the code raises itself or in what checks its arguments."""
    function, seen = inspect.unwrap(function), set() if seen is None else seen
    written = function.__code__.co_filename != "<string>"  # not by dataclasses
    if function in seen or not written or function.__module__.split(".")[0] in OF_OTHERS:
        return set()
    seen.add(function)
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", "")
            found |= {name} & {"ValueError", "TypeError"}
        if not isinstance(node, ast.Call):
            continue
        called = None
        if isinstance(node.func, ast.Name):
            called = function.__globals__.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            base = node.func.value.id
            owner = cls if base == "self" else function.__globals__.get(base)
            called = getattr(owner, node.func.attr, None)
        if inspect.isfunction(called) and re.match("_|.*check", called.__name__):
            found |= raised(called, cls, seen)
    return found


def missing_errors(d: Documented, known: Mapping[str, Documented] = KNOWN) -> list[str]:
    """Errors of wrong arguments that are not named under Raises."""
    code = [d.value]
    if d.is_class:
        code = [vars(d.value).get(name) for name in ("__init__", "__post_init__")]
    can = set()
    for function in code:
        if inspect.isfunction(inspect.unwrap(function)):
            can |= raised(function, d.value if d.is_class else None)
    text = d.section("Raises") + "".join(other.section("Raises") for other in d.others(known))
    return [f"{name} is not named" for name in sorted(can) if name not in text]


def missing_source(d: Documented, known: Mapping[str, Documented] = KNOWN) -> list[str]:
    texts = [d.text, *(other.text for other in d.others(known))]
    return [] if any(SOURCE.search(text) for text in texts) else ["no paper, year or equation"]


def undocumented(module: str) -> list[str]:
    """Constants and properties that nothing is said about; the rest is among `ALL`."""
    wrong = []
    for name, value in public(module).items():
        if inspect.isclass(value):
            wrong += [
                f"{name}.{member}"
                for member, it in vars(value).items()
                if isinstance(it, property) and member[0] != "_" and not it.__doc__
            ]
        elif not callable(value) and not inspect.ismodule(value) and name != "__version__":
            # A string after its assignment, or a comment before it, in the file that makes it.
            said = rf'^{name} = .*(?:\n[ )}}\]].*)*\n"""|^#.*\n{name} = '
            loaded = importlib.import_module(module)
            if hasattr(loaded, "__path__"):
                files = list(Path(loaded.__path__[0]).glob("*.py"))
            else:  # it may be another module's
                its = [m for m in sys.modules.values() if vars(m).get(name) is value]
                files = [Path(m.__file__) for m in its if m.__file__]
            if not any(re.search(said, file.read_text(), re.MULTILINE) for file in files):
                wrong.append(name)
    return wrong


# --- the names of ddfast ------------------------------------------------------------------------


def test_the_names_are_found() -> None:
    assert len(ALL) > 200
    for name in ("losses.mmd", "data.Dataset.normalised", "methods.Run.update", "testing.levels"):
        assert f"ddfast.{name}" in ALL


@pytest.mark.parametrize("module", [*MODULES, ANY_TENSORS])
def test_every_public_name_has_a_docstring(module) -> None:
    assert importlib.import_module(module).__doc__
    assert [d.name for d in of_module(module) if not d.text] == []
    assert undocumented(module) == []


@pytest.mark.parametrize("check", [missing_arguments, missing_shapes, missing_errors])
def test_docstrings_are_complete(check) -> None:
    wrong = {}
    for name, d in ALL.items():
        if not (check is missing_shapes and name.startswith(ANY_TENSORS)):
            wrong[name] = check(d)
    assert {name: what for name, what in wrong.items() if what} == {}


def test_what_is_from_papers_says_which() -> None:
    known = [d for name, d in ALL.items() if name.rpartition(".")[0] in FROM_PAPERS]
    assert len(known) > 20
    assert [d.name for d in known if missing_source(d)] == []


# --- the checks themselves ----------------------------------------------------------------------


def _check_order(order: int) -> None:
    if order < 1:
        raise ValueError("order")


def complete(x: Tensor, order: int, kind: str = "a") -> Tensor:
    """The moment of a set (Pearson 1894, eq. 2).

    Args:
        x: (n, d), float32.
        order: from 1 on.
        kind: of moment.

    Returns:
        (d,), in x's dtype.

    Raises:
        TypeError: x is no tensor.
        ValueError: an order below 1.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError("x")
    _check_order(order)
    return (x**order).mean(0)


def wrong_in(text: str, known: Mapping[str, Documented] | None = None) -> list[str]:
    """All that is wrong with `complete` if that were its docstring."""
    d = Documented("here.complete", complete, inspect.cleandoc(text))
    checks = (missing_arguments, missing_shapes, missing_errors, missing_source)
    return [what for check in checks for what in check(d, known or {})]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("        order: from 1 on.\n", "", ["order is not explained"]),
        ("        kind: of moment.", "        sort: of moment.", ["kind is not explained",
                                                              "sort is no argument"]),
        ("        x: (n, d), float32.\n", "", ["x is not explained", "x: no shape", "x: no dtype"]),
        ("x: (n, d), float32.", "x: the set, float32.", ["x: no shape"]),
        ("x: (n, d), float32.", "x: (n, d), numbers.", ["x: no dtype"]),
        ("(d,), in x's dtype.", "the moments.", ["returns: no shape"]),
        ("        TypeError: x is no tensor.\n", "", ["TypeError is not named"]),
        ("        ValueError: an order below 1.\n", "", ["ValueError is not named"]),
        (" (Pearson 1894, eq. 2)", "", ["no paper, year or equation"]),
    ],
)  # fmt: skip
def test_the_checks_find_what_is_missing(old, new, found) -> None:
    text = complete.__doc__ or ""
    assert wrong_in(text) == []
    assert old in text and wrong_in(text.replace(old, new)) == found


def test_another_docstring_may_say_it() -> None:
    short = "The moment. Arguments and errors as `other`; kind and order too."
    other = Documented("here.other", len, inspect.cleandoc(complete.__doc__ or ""))
    assert wrong_in(short, {"here.other": other}) == []
    assert len(wrong_in(short)) > 4
