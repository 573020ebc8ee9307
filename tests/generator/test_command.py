"""`ddfast generator`: flags, what it says, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddfast.cli import main
from ddfast.generator import load

DATA = '{"classes": 3, "size": 8, "train_per_class": 6, "test_per_class": 2}'
SMALL = [
    *("--dataset", "generated", "--data_options", DATA, "--batch", "4", "--iterations", "3"),
    *("--latent_dim", "3", "--width", "2", "--width_discriminator", "2", "--threads", "1"),
]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("ddfast: error: ")
    return lines[0]


def test_it_trains_and_says_where_the_generator_is(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["generator", *SMALL, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"{out / 'generator.safetensors'}: 3 classes of generated, 3x8x8, latents of 3" in (
        said.out
    )
    assert f"{out / 'samples.png'} shows some of its images" in said.out
    assert "generator: dataset generated" in said.err  # the settings, those left out included
    assert "dsa_strategy color_crop_cutout_flip_scale_rotate" in said.err
    assert load(out / "generator.safetensors").recipe["config"]["iterations"] == 3
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    # The same command again.
    assert main(["generator", *SMALL, "--out", str(out)]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_names_of_the_field_and_a_config_file(tmp_path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"dataset: generated\ndata_options: {DATA}\nbatch: 4\niterations: 5\nthreads: 1\n"
        f"width: 4\nout: {tmp_path / 'run'}\nquiet: true\n"
    )
    flags = ["--iterations", "2", "--G_ch", "2", "--D_ch", "2", "--dim_z", "3", "--G_lr", "0.001"]
    assert main(["generator", "--config", str(file), *flags]) == 0
    config = load(tmp_path / "run" / "generator.safetensors").recipe["config"]
    assert (config["iterations"], config["width"], config["latent_dim"]) == (2, 2, 3)
    assert (config["lr_generator"], config["batch"]) == (0.001, 4)
    assert config["data_options"] == json.loads(DATA)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "required and missing: --dataset, --out"),
        ([*SMALL, "--out", "run", "--widht", "3"], "did you mean --width"),
        ([*SMALL, "--out", "run", "--batch", "one"], "--batch: got one, expected int"),
        ([*SMALL, "--out", "run", "--batch", "1"], "batch: got 1, expected at least 2"),
        ([*SMALL, "--out", "run", "--threads", "0"], "threads: got 0"),
        (["--dataset", "digitz", "--out", "run"], "unknown data set 'digitz'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generator", *flags]) == 2
    assert message in one_error(capsys)
    assert not Path("run").exists()


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generator", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--width", "--G_ch", "--steps_discriminator", "--dsa_strategy", "--device"):
        assert flag in said
    assert main(["--help"]) == 0
    assert "generator  Train a class-conditional generator" in capsys.readouterr().out
