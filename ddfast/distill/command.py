"""`ddfast distill`: its flags, and what it says."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path

from ddfast import data, methods
from ddfast.command import Parser, left_out, set_threads
from ddfast.distill.loop import distill
from ddfast.methods import Method

REQUIRED = ("dataset", "ipc", "out")

#: What some methods need, and where the examples have it.
PLACES = {"experts": "experts/digits", "generator": "generators/digits/generator.safetensors"}


def run(words: list[str], description: str, evaluate: Callable[[list[str]], None]) -> None:
    """Distil as the flags say.

    Args:
        words: the method and its flags.
        description: of the command.
        evaluate: the command `ddfast evaluate`, for --evaluate.

    Raises:
        ValueError: flags that are missing, unknown or wrong.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_overview(description))
        return
    if words[0].startswith("-"):
        raise ValueError(f"expected a method after distill, got {words[0]}")
    method = methods.find(words[0])
    options, config = _parser(method).parsed(words[1:], method.config, REQUIRED)
    set_threads(options.threads)
    dataset = data.load(config.dataset, config.data_path, **config.data_options)
    artefact = distill(
        method.name,
        dataset,
        config,
        options.out,
        device=options.device,
        memory=options.memory,
        checkpoint_every=options.checkpoint_every,
        progress=not options.quiet,
    )
    print(f"{options.out}: {artefact!r}")
    print(f"{Path(options.out) / 'grid.png'} shows the images")
    if options.evaluate:
        evaluate([options.out, *(["--quiet"] if options.quiet else [])])
    else:
        print(f"evaluate them with: ddfast evaluate {options.out}")


def _overview(description: str) -> str:
    lines = [f"  {each.name:10}{each.matches}" for each in methods.methods().values()]
    return "\n".join(
        [
            "usage: ddfast distill METHOD --dataset NAME --ipc N --out FOLDER [flags]",
            "",
            description,
            "",
            "methods, and what each of them matches or optimises:",
            *lines,
            "",
            "mtt, tesla, ftd and datm need experts (`ddfast experts`), it_gan a generator",
            "(`ddfast generator`).",
            "",
            textwrap.fill(f"data sets: {', '.join(data.names())}", 88),
            "digits and generated need no files, the others a --data_path.",
            "",
            "examples:",
            "  ddfast distill dm --dataset digits --ipc 10 --out runs/dm-digits",
            "  ddfast distill kip --dataset digits --ipc 1 --out runs/kip-digits --evaluate",
            "  ddfast distill mtt --experts experts/digits --dataset digits --ipc 1 --out runs/mtt",
            "",
            "The same command again goes on with a run that was interrupted.",
            "`ddfast distill METHOD --help` lists the settings of a method, `ddfast methods` the",
            "papers and what was measured.",
        ]
    )


def _parser(method: Method) -> Parser:
    """Every field of the method's config as a flag, and the flags of a run."""
    fields = {field.name for field in dataclasses.fields(method.config)}
    more = "".join(f"--{name} {PLACES[name]} " for name in sorted(fields & set(PLACES)))
    command = f"ddfast distill {method.name} {more}--dataset digits --ipc 1"
    parser = Parser(
        f"ddfast distill {method.name}",
        f"{method.title}. Matches {method.matches}. Published settings, where a flag is left out: "
        f"{left_out(method.config)}",
        "--dataset NAME --ipc N --out FOLDER [flags]",
        [
            f"{command} --out runs/{method.name}-digits",
            f"ddfast evaluate runs/{method.name}-digits",
        ],
    )
    parser.fields(method.config, REQUIRED, "method")
    run = parser.add_argument_group("run (changes results by rounding at most)")
    parser.flag(run, ["out"], str, None, "folder of the run (required)")
    parser.flag(run, ["device"], str, None, "cpu or cuda (default: a GPU if there is one)")
    parser.flag(run, ["memory"], str, "1GiB", "what activations may take, such as 8GiB")
    parser.flag(run, ["threads"], int, None, "threads on the CPU (default: one a core)")
    parser.flag(
        run, ["checkpoint_every"], int, None, "iterations between checkpoints (default: some 20 s)"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.add_argument(
        "--evaluate", action="store_true", help="evaluate at the end, as `ddfast evaluate` does"
    )
    return parser
