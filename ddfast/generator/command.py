"""`ddfast generator`: its flags, and what it says."""

from __future__ import annotations

from pathlib import Path

from ddfast.command import Parser, left_out, set_threads
from ddfast.generator.train import GENERATOR, SAMPLES, Config, train

REQUIRED = ("dataset", "out")


def run(words: list[str], description: str) -> None:
    """Train a generator as the flags say.

    Raises:
        ValueError: flags that are missing, unknown or wrong.
    """
    parser = _parser(description)
    options, config = parser.parsed(words, Config, REQUIRED)
    set_threads(options.threads)

    from ddfast import data

    dataset = data.load(config.dataset, config.data_path, **config.data_options)
    generator = train(
        dataset,
        config,
        options.out,
        device=options.device,
        checkpoint_every=options.checkpoint_every,
        progress=not options.quiet,
    )
    height, width = generator.size
    print(
        f"{Path(options.out) / GENERATOR}: {generator.classes} classes of {dataset.name}, "
        f"{generator.channels}x{height}x{width}, latents of {generator.latent_dim}"
    )
    print(f"{Path(options.out) / SAMPLES} shows some of its images")


def _parser(description: str) -> Parser:
    """Every field of the settings as a flag, and the flags of a run."""
    parser = Parser(
        "ddfast generator",
        f"{description} Where a flag is left out: {left_out(Config)}",
        "--dataset NAME --out FOLDER [flags]",
        [
            "ddfast generator --dataset digits --out generators/digits",
            f"ddfast distill it_gan --generator generators/digits/{GENERATOR} --dataset digits "
            "--ipc 10 --out runs/it_gan",
        ],
    )
    parser.fields(Config, REQUIRED, "training")
    run = parser.add_argument_group("run")
    parser.flag(run, ["out"], str, None, "folder of the run (required)")
    parser.flag(run, ["device"], str, None, "cpu or cuda (default: a GPU if there is one)")
    parser.flag(run, ["threads"], int, None, "threads on the CPU (default: one a core)")
    parser.flag(
        run, ["checkpoint_every"], int, None, "iterations between checkpoints (default: some 20 s)"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
