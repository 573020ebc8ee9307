"""The methods: one file each, with its settings (`Config`) and what it does per iteration (`step`).

A method is a module with `TITLE`, `MATCHES`, `PROTOCOL`, `Config`, `check(run)`, which refuses what
cannot work before the first step, and `step(run)`, which changes the synthetic set and returns the
loss of each class. One that needs trained networks has `prepare(run)`, a generator that does a part
of that work, puts it into `run.state` and yields a line about it; it begins with what is missing
there. `STATUS` says how far it has been verified, if that is not to a literal loop. Everything else
(data, checkpoints, logging, evaluation) is shared; see `ddfast.distill`.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ddfast.methods import (
    cafe,
    datm,
    dc,
    dcc,
    dd,
    dm,
    dsa,
    dsac,
    frepo,
    ftd,
    idc,
    idc_i,
    idm,
    it_gan,
    kip,
    linba,
    ls,
    m3d,
    mtt,
    ncfm,
    rat_bptt,
    rfad,
    tesla,
)
from ddfast.methods.beginning import start
from ddfast.methods.config import Config, as_json, resolve, setting
from ddfast.methods.registration import Method, described, nothing, plug_in
from ddfast.methods.run import Diverged, Interrupted, Run

_registered: dict[str, Method] = {}
"""Methods from outside, see `register`."""


def methods() -> dict[str, Method]:
    """Every method by its name: those of ddfast, then those that were registered."""
    return _own() | _registered


def register(
    name: str,
    config: type[Config],
    step: Callable[[Run], Tensor],
    *,
    check: Callable[[Run], None] | None = None,
    prepare: Callable[[Run], Iterator[str]] | None = None,
    title: str = "",
    matches: str = "",
    protocol: str = "dm",
) -> Method:
    """Add a method of your own; from then on all of ddfast knows it by its name.

    `docs/your-own-method.md` shows one from beginning to end. Where the same file or notebook cell
    is run again, the method takes the place of the one that it registered before.

    Args:
        name: lower case, for `ddfast distill NAME` and `ddfast.distill.distill`.
        config: its settings, a frozen dataclass derived from `Config` (or from the `Config` of
            another method), with fields made by `setting`.
        step: does one iteration, changes the synthetic set by `Run.update`, and returns the loss of
            each class, (num_classes,).
        check: refuses what cannot work, with a ValueError, before the first step.
        prepare: does work before the first step, see the module's docstring.
        title: of the paper.
        matches: the statistic that is matched, in a few words.
        protocol: by which to evaluate, one of `ddfast.evaluate.PROTOCOLS`.

    Raises:
        TypeError: a config that is not such a dataclass, functions that cannot be called with a
            run.
        ValueError: a name that is taken or not fit for a command line, an unknown protocol.
    """
    method = described(name, config, step, check, prepare, title, matches, protocol)
    known = methods().get(name)
    again = name in _registered and known is not None and known.status == method.status
    if known is not None and not again:
        raise ValueError(f"name: {name!r} is taken: {known.title}, {known.status}")
    _registered[name] = method
    return method


def _own() -> dict[str, Method]:
    verified = "verified step by step against a literal loop"
    modules: dict[str, Any] = {
        "dm": dm,
        "cafe": cafe,
        "it_gan": it_gan,
        "idm": idm,
        "m3d": m3d,
        "ncfm": ncfm,
        "dc": dc,
        "dsa": dsa,
        "dcc": dcc,
        "dsac": dsac,
        "idc_i": idc_i,
        "idc": idc,
        "mtt": mtt,
        "tesla": tesla,
        "ftd": ftd,
        "datm": datm,
        "dd": dd,
        "linba": linba,
        "rat_bptt": rat_bptt,
        "kip": kip,
        "ls": ls,
        "rfad": rfad,
        "frepo": frepo,
    }
    return {
        name: Method(
            name,
            module.TITLE,
            module.MATCHES,
            module.PROTOCOL,
            getattr(module, "STATUS", verified),
            module.Config,
            module.check,
            getattr(module, "prepare", nothing),
            module.step,
        )
        for name, module in modules.items()
    }


def find(name: str) -> Method:
    """The method of that name, in any case.

    Raises:
        ValueError: there is none; the message lists them.
    """
    known = methods()
    if isinstance(name, str) and name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"method: got {name!r}{hint}, expected one of {', '.join(known)}")


def figures(name: str) -> list[dict[str, str]]:
    """Test accuracies measured with a method; `benchmarks/accuracy.py` of the source makes them.

    Args:
        name: of the method.

    Returns:
        One row for each data set and ipc: dataset, ipc, model, iterations, protocol; random,
        distilled and full, "mean ± standard deviation" in percent; seconds of distillation on so
        many threads.
    """
    file = Path(__file__).with_name("figures.csv")
    with file.open(newline="", encoding="utf-8") as text:
        return [row for row in csv.DictReader(text) if row["method"] == name]


__all__ = [
    "Config",
    "Diverged",
    "Interrupted",
    "Method",
    "Run",
    "as_json",
    "figures",
    "find",
    "methods",
    "plug_in",
    "register",
    "resolve",
    "setting",
    "start",
]
