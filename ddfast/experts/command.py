"""`ddfast experts`: its flags, and what it says."""

from __future__ import annotations

from pathlib import Path

from ddfast.command import Parser, left_out, set_threads
from ddfast.experts.file import EXPERTS
from ddfast.experts.importer import import_buffers
from ddfast.experts.train import train
from ddfast.experts.training import Config
from ddfast.methods.config import filled

REQUIRED = ("dataset", "out")


def run(words: list[str], description: str) -> None:
    """Train experts, or import some, as the flags say.

    Raises:
        ValueError: flags that are missing, unknown or wrong.
    """
    parser = _parser(description)
    options, config = parser.parsed(words, Config, REQUIRED)
    set_threads(options.threads)

    from ddfast import data

    dataset = data.load(config.dataset, config.data_path, **config.data_options)
    if options.imported:
        files = [name for name in options.imported.split(",") if name]
        model = filled(config, dataset).model
        experts = import_buffers(files, data.whitened(dataset, config.zca), model, options.out)
    else:
        experts = train(
            dataset, config, options.out, device=options.device, progress=not options.quiet
        )
    print(
        f"{Path(options.out) / EXPERTS}: {experts.num_experts} experts of {experts.epochs} epochs "
        f"and {experts.parameters} parameters on {dataset.name}"
    )
    print(f"distil with: ddfast distill mtt --experts {options.out} --dataset {config.dataset} ...")


def _parser(description: str) -> Parser:
    """Every field of the settings as a flag, and the flags of a run."""
    parser = Parser(
        "ddfast experts",
        f"{description} Where a flag is left out: {left_out(Config)}",
        "--dataset NAME --out FOLDER [flags]",
        [
            "ddfast experts --dataset digits --out experts/digits",
            "ddfast distill mtt --experts experts/digits --dataset digits --ipc 1 --out runs/mtt",
            "ddfast experts --dataset CIFAR10 --data_path data --out experts/cifar10 "
            "--imported replay_buffer_0.pt,replay_buffer_1.pt",
        ],
    )
    parser.fields(Config, REQUIRED, "training")
    run = parser.add_argument_group("run")
    parser.flag(run, ["out"], str, None, "folder of the run (required)")
    parser.flag(
        run,
        ["imported"],
        str,
        None,
        "read experts of MTT's code in place of training: files replay_buffer_N.pt, joined by "
        "commas",
        "FILES",
    )
    parser.flag(run, ["device"], str, None, "cpu or cuda (default: a GPU if there is one)")
    parser.flag(run, ["threads"], int, None, "threads on the CPU (default: one a core)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
