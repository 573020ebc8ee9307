"""The command `ddfast`: distill, evaluate, show, methods, generator, experts, bench.

Of ddfast itself nothing is imported before it is known which command it is.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from ddfast.command import Parser, first_line, plain, set_threads

TRACEBACK = "DDFAST_TRACEBACK"

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: something came to values that are not finite, or an error of ours; 2: something
    about the command, in one line on stderr; 130: interrupted, and saved.
    """
    words, plugins = _without_plugins(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if name == "--version":
        from ddfast import __version__

        print(f"ddfast {__version__}")
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command = _named(name)
            if plugins:
                from ddfast.methods import plug_in

                for plugin in plugins:
                    plug_in(plugin)
            return command(words[1:]) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from ddfast.evaluate import NotFinite
        from ddfast.methods import Diverged

        expected = isinstance(error, (*USER_ERRORS, Diverged, NotFinite))
        if os.environ.get(TRACEBACK) or not expected:
            traceback.print_exc()
        print(f"ddfast: error: {_in_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, USER_ERRORS) else 1


def _without_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--plugin FILE`, which any command takes, and those files."""
    rest, plugins, remaining = list[str](), list[str](), iter(words)
    for word in remaining:
        if word.startswith("--plugin="):
            plugins.append(word.removeprefix("--plugin="))
        elif word == "--plugin":
            plugins.append(next(remaining, ""))
        else:
            rest.append(word)
    return rest, plugins


def _named(name: str) -> Callable[[list[str]], int | None]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"no command {name!r}{hint}; there are {', '.join(COMMANDS)}")
    return COMMANDS[name]


def _overview() -> str:
    lines = [f"  {name:11}{first_line(function)}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ddfast COMMAND ...",
            "",
            "Fast, exact dataset distillation: a few synthetic images of each class, on which",
            "networks learn almost as much as on the whole data set.",
            "",
            *lines,
            "",
            "examples:",
            "  ddfast distill dm --dataset digits --ipc 10 --out runs/dm-digits",
            "  ddfast evaluate runs/dm-digits --model ConvNet,MLP",
            "",
            "`ddfast COMMAND --help` explains a command, `ddfast distill METHOD --help` a method.",
            "`--plugin FILE.py` with any command adds your methods (docs/your-own-method.md).",
            f"{TRACEBACK}=1 in the environment adds a traceback to an error.",
        ]
    )


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"ddfast: warning: {_in_one_line(message)}", file=sys.stderr)


# --- distill ------------------------------------------------------------------------------------


def _distill(words: list[str]) -> None:
    """Distil a data set, or go on with an interrupted run."""
    from ddfast.distill.command import run

    run(words, first_line(_distill), _evaluate)


# --- evaluate -----------------------------------------------------------------------------------


def _evaluate(words: list[str]) -> None:
    """Train networks on a distilled set, random selections and all data, and test them."""
    options = _evaluate_parser().parse_args(words)
    set_threads(options.threads)

    from ddfast import data
    from ddfast.artefact import Artefact
    from ddfast.distill import ARTEFACT
    from ddfast.evaluate import evaluate
    from ddfast.methods import methods

    place = Path(options.run)
    run = place / ARTEFACT if place.is_dir() else place
    if place.is_dir() and (place / "config.json").exists() and not run.exists():
        raise ValueError(f"the run in {place} has not ended; the command that began it goes on")
    artefact = Artefact.load(run)
    name = options.dataset or artefact.config.get("dataset", artefact.dataset)
    data_options = options.data_options
    if data_options is None and options.dataset is None:
        data_options = artefact.config.get("data_options")
    dataset = data.load(name, options.data_path or _data_path(place), **plain(data_options))
    known = methods()
    protocol = options.protocol
    if protocol is None and artefact.method in known:
        protocol = known[artefact.method].protocol
    elif protocol is None:
        protocol = "dm"
        warnings.warn(
            f"method {artefact.method!r} is not known here (--plugin FILE.py brings it), so the "
            "protocol is dm",
            stacklevel=1,
        )
    own = artefact.config.get("kernel" if protocol == "krr" else "model", "ConvNet")
    out = options.out or (str(place) if place.is_dir() else None)
    report = evaluate(
        artefact,
        dataset,
        (options.model or own).split(","),
        protocol,
        options.num_eval,
        options.seed,
        options.selections,
        not options.no_baselines,
        not options.quiet,
        epochs=options.epochs,
        batch=options.batch_train,
        lr=options.lr_net,
        dsa_strategy=options.dsa_strategy,
        reg=options.reg,
        device=options.device,
        out=out,
    )
    print(report.to_markdown(), end="")
    if out:
        print(f"\nwritten to {Path(out) / 'report.md'} and report.json")


def _evaluate_parser() -> Parser:
    from ddfast.evaluate import PROTOCOLS

    parser = Parser(
        "ddfast evaluate",
        first_line(_evaluate),
        "RUN [flags]",
        [
            "ddfast evaluate runs/dm-digits",
            "ddfast evaluate runs/dm-digits --model ConvNet,MLP,ResNet18 --protocol dm",
            "ddfast evaluate runs/kip-digits --protocol krr --model ntk-fc3,ntk-conv3",
        ],
    )
    parser.add_argument("run", type=str, metavar="RUN", help="folder of a run, or a distilled file")
    what = parser.add_argument_group("what is trained")
    parser.flag(
        what,
        ["model"],
        str,
        None,
        "networks, or with krr kernels such as ntk-fc3, joined by commas (default: the one that "
        "the set was distilled with)",
        "NAMES",
    )
    parser.flag(what, ["num_eval"], int, 5, "networks of each kind to train on each set")
    parser.flag(what, ["selections"], int, 5, "random selections of training images to compare")
    what.add_argument(
        "--no_baselines", action="store_true", help="leave out random selections and all data"
    )
    parser.flag(what, ["seed"], int, 0, "every random number of the evaluation follows from it")
    how = parser.add_argument_group("how (left out: as the protocol has it)")
    parser.flag(
        how,
        ["protocol"],
        str,
        None,
        f"one of {', '.join(PROTOCOLS)} (default: that of the method)",
        "NAME",
    )
    parser.flag(
        how,
        ["epochs", "epoch_eval_train"],
        int,
        None,
        "epochs; protocols with the schedule of DC make one more pass, as published",
    )
    parser.flag(how, ["batch_train"], int, None, "images a step")
    parser.flag(how, ["lr_net"], float, None, "learning rate of the networks")
    parser.flag(
        how, ["dsa_strategy"], str, None, "augmentations to draw from, joined by _, or none"
    )
    parser.flag(how, ["reg"], float, None, "ridge of a kernel regression (protocol krr)")
    data = parser.add_argument_group("data (left out: as the run had it)")
    parser.flag(data, ["dataset"], str, None, "data set whose test images are classified")
    parser.flag(data, ["data_path"], str, None, "folder that holds its files")
    parser.flag(
        data,
        ["data_options"],
        dict[str, Any],
        None,
        'options of its reader, such as {"classes": 5}',
    )
    run = parser.add_argument_group("run")
    parser.flag(run, ["out"], str, None, "where report.md and .json go (default: the run)")
    parser.flag(run, ["device"], str, None, "cpu or cuda (default: a GPU if there is one)")
    parser.flag(run, ["threads"], int, None, "threads on the CPU (default: one a core)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _data_path(place: Path) -> str | None:
    """Where a run found its data."""
    try:
        return json.loads((place / "config.json").read_text(encoding="utf-8"))["data_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- show ---------------------------------------------------------------------------------------


def _show(words: list[str]) -> None:
    """Write the picture of a run, finished or not, or of a distilled file."""
    parser = Parser(
        "ddfast show",
        first_line(_show),
        "RUN [--out FILE]",
        ["ddfast show runs/dm-digits", "ddfast show runs/dm-digits --out dm.png"],
    )
    parser.add_argument("run", type=str, metavar="RUN", help="folder of a run, or a distilled file")
    parser.flag(
        parser, ["out"], str, None, "the picture (default: grid.png beside the images)", "FILE"
    )
    options = parser.parse_args(words)

    from ddfast.artefact import Artefact
    from ddfast.distill import ARTEFACT, unfinished

    place = Path(options.run)
    file = place / ARTEFACT if place.is_dir() else place
    if file.exists() or not place.is_dir():
        artefact = Artefact.load(file)
        said = f"{file}: {artefact!r}, ipc {artefact.config.get('ipc')}"
    else:
        artefact, iteration = unfinished(place)
        said = f"{place}: {artefact!r}, {iteration} of {artefact.config['iterations']} iterations"
    out = Path(options.out) if options.out else file.parent / "grid.png"
    artefact.picture(out)
    print(said)
    print(f"{out} shows the images")


# --- methods ------------------------------------------------------------------------------------


def _methods(words: list[str]) -> None:
    """List the methods: paper, what it matches, status, measured accuracies."""
    Parser("ddfast methods", first_line(_methods)).parse_args(words)

    from ddfast.methods import figures, methods

    width = max(map(len, methods())) + 1
    for method in methods().values():
        print(f"{method.name:{width}}{method.title}")
        print(f"{'':{width}}matches {method.matches}")
        print(f"{'':{width}}{method.status}")
        for row in figures(method.name):
            print(
                f"{'':{width}}{row['dataset']}, ipc {row['ipc']}: {row['distilled']} % "
                f"(protocol {row['protocol']}; random selection {row['random']}, "
                f"full data {row['full']}; "
                f"{row['iterations']} iterations, {row['seconds']} s on one core)"
            )


# --- generator ----------------------------------------------------------------------------------


def _generator(words: list[str]) -> None:
    """Train a class-conditional generator of images for it_gan, or go on with it."""
    from ddfast.generator.command import run

    run(words, first_line(_generator))


# --- experts ------------------------------------------------------------------------------------


def _experts(words: list[str]) -> None:
    """Train the experts that mtt, tesla, ftd and datm match, or go on with them."""
    from ddfast.experts.command import run

    run(words, first_line(_experts))


# --- bench --------------------------------------------------------------------------------------


def _bench(words: list[str]) -> int:
    """Measure operators and methods against plain PyTorch, verified before they are timed."""
    from ddfast.bench.command import run

    return run(words, first_line(_bench))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "distill": _distill,
    "evaluate": _evaluate,
    "show": _show,
    "methods": _methods,
    "generator": _generator,
    "experts": _experts,
    "bench": _bench,
}
