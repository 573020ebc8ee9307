"""The command line: what it does, what it says, and with which exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.cli import COMMANDS, main

DATA = '{"classes": 3, "size": 8, "train_per_class": 6, "test_per_class": 4}'
SMALL = [
    *("--dataset", "generated", "--data_options", DATA, "--ipc", "2"),
    *("--model", "ConvNetD1W4", "--batch_real", "4", "--threads", "1"),
]


def distilled(out: Path, *more: str, method: str = "dm", iterations: int = 4) -> int:
    command = ["distill", method, *SMALL, "--iterations", str(iterations), "--out", str(out)]
    return main([*command, *more])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("ddfast: error: ")
    return lines[0]


def test_distill_writes_a_run_and_says_how_to_go_on(tmp_path, capsys) -> None:
    assert distilled(tmp_path / "run") == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'run' / 'grid.png'} shows the images" in said.out
    assert f"ddfast evaluate {tmp_path / 'run'}" in said.out
    assert "dm: dataset generated" in said.err  # the settings, published ones included
    assert "lr_img 1.0" in said.err
    artefact = Artefact.load(tmp_path / "run" / "distilled.safetensors")
    assert artefact.images.shape == (6, 3, 8, 8)
    assert (artefact.config["iterations"], artefact.config["batch_real"]) == (4, 4)


@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_other_methods(tmp_path, method) -> None:
    flags = ["--outer_loop", "2", "--inner_loop", "1", "--dis_metric", "mse", "--quiet"]
    assert distilled(tmp_path, *flags, method=method, iterations=2) == 0
    assert Artefact.load(tmp_path / "distilled.safetensors").config["dis_metric"] == "mse"


def test_aliases_of_flags(tmp_path) -> None:
    flags = ["--Iteration", "3", "--pix_init", "noise", "--quiet"]
    assert main(["distill", "dm", *SMALL, "--out", str(tmp_path), *flags]) == 0
    config = Artefact.load(tmp_path / "distilled.safetensors").config
    assert (config["iterations"], config["init"]) == (3, "noise")


def test_a_config_file_gives_settings_and_flags_win(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "dataset: generated\ndata_options: {classes: 3, size: 8, train_per_class: 6, "
        "test_per_class: 4}\nipc: 1\nmodel: ConvNetD1W4\niterations: 2\nlr_img: 3\nthreads: 1\n"
        f"out: {tmp_path / 'run'}\nquiet: true\n"
    )
    assert main(["distill", "dm", "--config", str(file), "--lr_img", "0.5"]) == 0
    config = Artefact.load(tmp_path / "run" / "distilled.safetensors").config
    assert (config["ipc"], config["lr_img"], config["iterations"]) == (1, 0.5, 2)
    assert config["data_options"]["classes"] == 3


def test_a_printed_config_can_be_read_again(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        distilled(tmp_path / "run", "--quiet", "--print_config")
    assert end.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["distill", "dm", "--config", str(file)]) == 0
    assert (tmp_path / "run" / "distilled.safetensors").exists()


def test_again_says_finished_and_another_config_is_refused(tmp_path, capsys) -> None:
    assert distilled(tmp_path) == 0
    capsys.readouterr()
    assert distilled(tmp_path) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err
    assert distilled(tmp_path, "--seed", "4") == 2
    assert "seed is 0 there and 4 here" in one_error(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil"], "no command 'distil' (did you mean distill?)"),
        (["distill", "dmm"], "method: got 'dmm' (did you mean dm?), expected one of dm, cafe"),
        (["distill", "--ipc", "3"], "expected a method after distill, got --ipc"),
        (
            ["distill", "dm"],
            "required and missing: --dataset, --ipc, --out; `ddfast distill dm --help`",
        ),
        (["distill", "dm", *SMALL, "--out", "x", "--iter", "3"], "ecognized arguments: --iter"),
        (
            ["distill", "dm", *SMALL, "--out", "x", "--itreations", "3"],
            "(did you mean --iterations?); `ddfast distill dm --help` lists the flags",
        ),
        (["distill", "dm", *SMALL, "--out", "x", "--seed", "a"], "--seed: got a, expected int"),
        (["distill", "dm", *SMALL, "--out", "x", "--init", "a"], "--init: got a, expected"),
        (["distill", "dm", *SMALL, "--out", "x", "--ipc", "0"], "ipc: got 0, expected at least 1"),
        (["distill", "dm", *SMALL, "--out", "x", "--threads", "0"], "threads: got 0"),
        (["distill", "dm", *SMALL, "--out", "x", "--model", "Conv"], "unknown network 'Conv'"),
        (["distill", "dm", *SMALL, "--out", "x", "--memory", "lots"], "memory: got 'lots'"),
        (["distill", "dm", *SMALL, "--out", "x", "--dataset", "dig"], "did you mean digits?"),
        (["distill", "dm", "--dataset", "MNIST", "--ipc", "1", "--out", "x"], "data_path"),
        (["distill", "dm", "--config", "nowhere.yaml"], "--config: "),
        (["distill", "dm", *SMALL, "--out", "/proc/ddfast/x"], "out: cannot write into /proc"),
        (["show", "nowhere"], "no artefact at nowhere"),
        (["show", "."], "does not hold a run of ddfast"),
        (["show"], "run"),
        (["methods", "--all"], "ecognized arguments: --all"),
        (["evaluate", "nowhere"], "no artefact at nowhere"),
        (["evaluate", "nowhere", "--num_eval", "x"], "--num_eval: got x, expected int"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in one_error(capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_diverging_run_exits_with_1(tmp_path, capsys) -> None:
    assert distilled(tmp_path, "--lr_img", "1e30", "--quiet", iterations=50) == 1
    assert "is not finite at iteration" in one_error(capsys)


def test_a_traceback_on_demand_and_for_errors_of_ours(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DDFAST_TRACEBACK", "1")
    assert main(["show", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("DDFAST_TRACEBACK")
    monkeypatch.setitem(COMMANDS, "show", lambda _: [][1])
    assert main(["show"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_show_draws_finished_and_unfinished_runs(tmp_path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    update = methods.Run.update

    def interrupted(self: methods.Run, *arguments: object) -> None:
        if self.iteration == 3:
            raise KeyboardInterrupt
        update(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(methods.Run, "update", interrupted)
        assert distilled(run, "--quiet") == 130
    (run / "grid.png").unlink()
    assert main(["show", str(run)]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 iterations" in said
    assert f"{run / 'grid.png'} shows the images" in said
    before = (run / "grid.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    assert distilled(run, "--quiet") == 0
    finished = (run / "grid.png").read_bytes()
    assert finished != before
    assert main(["show", str(run / "distilled.safetensors"), "--out", str(tmp_path / "a.png")]) == 0
    assert main(["show", str(run), "--out", str(tmp_path / "b.png")]) == 0
    assert finished == (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


EVALUATION = ["--epochs", "3", "--num_eval", "2", "--selections", "2", "--quiet"]


def test_evaluate_prints_and_writes_the_table(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert distilled(run, "--quiet") == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), *EVALUATION]) == 0
    said = capsys.readouterr().out
    for name in ("dm", "random selection", "full data"):
        assert f"| {name} | ConvNetD1W4 | dm, " in said
    assert (run / "report.md").read_text() in said
    report = json.loads((run / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["distilled", "random selection", "full data"]
    assert [len(row["accuracies"]) for row in report["rows"]] == [1, 2, 1]
    assert report["dataset"] == "generated"


def test_flags_of_evaluate(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert distilled(run, "--quiet") == 0
    file = str(run / "distilled.safetensors")
    out = tmp_path / "report"
    flags = ["--model", "MLP,ConvNetD1W4", "--protocol", "dc", "--no_baselines", "--out", str(out)]
    flags += ["--lr_net", "0.5", "--batch_train", "2", "--seed", "7", "--epoch_eval_train", "4"]
    assert main(["evaluate", file, "--num_eval", "1", "--quiet", *flags]) == 0
    report = json.loads((out / "report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["MLP", "ConvNetD1W4"]
    assert report["seed"] == 7
    protocol = report["rows"][0]["protocol"]
    assert (protocol["name"], protocol["lr"], protocol["batch"]) == ("dc", 0.5, 2)
    assert protocol["epochs"] == 4
    assert not (run / "report.json").exists()
    other = DATA.replace('"size": 8', '"size": 8, "seed": 1')
    assert main(["evaluate", file, *EVALUATION, "--data_options", other]) == 0


def test_evaluate_of_an_unfinished_run_is_refused(tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(methods.Run, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert distilled(tmp_path, "--quiet") == 130
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "has not ended; the command that began it goes on" in one_error(capsys)


def test_distill_and_evaluate_in_one(tmp_path, monkeypatch, capsys) -> None:
    from ddfast import evaluate

    whole = evaluate.evaluate
    monkeypatch.setattr(
        evaluate, "evaluate", lambda *a, **k: whole(*a, **k | {"epochs": 2}), raising=True
    )
    assert distilled(tmp_path, "--quiet", "--evaluate") == 0
    assert "| random selection | ConvNetD1W4 |" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists()


def test_methods_lists_every_method(capsys) -> None:
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    width = max(map(len, methods.methods())) + 1
    for method in methods.methods().values():
        assert f"{method.name:{width}}{method.title}\n" in said
        assert method.matches in said
        assert method.status in said


def test_help_of_everything(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([]) == 2
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main(["distill", "--help"]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in ["dm"])
    for name, method in methods.methods().items():
        with pytest.raises(SystemExit) as end:
            main(["distill", name, "--help"])
        assert end.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(method.config):
            assert f"--{field.name} " in said or f"--{field.name}," in said
            assert field.metadata["help"] in said
        assert "default: null" not in said
        assert "NoneType" not in said


def test_version(capsys) -> None:
    import ddfast

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ddfast {ddfast.__version__}\n"


def started(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "ddfast", *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_resume_and_exits_with_130(tmp_path, number) -> None:
    out, count = tmp_path / "run", 4000
    words = ["distill", "dm", *SMALL, "--iterations", str(count), "--out", str(out)]
    process = started(*words)
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"of {count} iterations; the same command again goes on from there" in err
    assert "Traceback" not in err
    iteration = int(err.split("saved after ")[1].split()[0])
    assert 0 < iteration < count
    assert len(log.read_text().splitlines()) == iteration
    assert [p.name for p in (out / "checkpoint").iterdir()] == [
        f"iteration-{iteration:09d}.safetensors"
    ]


def test_python_m_ddfast_starts_quickly_and_imports_little() -> None:
    code = "import sys; from ddfast.cli import main; main(['--help']); print(sorted(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout.splitlines()[-1].replace("'", '"')))
    for module in ("sklearn", "matplotlib", "PIL", "datasets", "triton", "ddfast.distill"):
        assert module not in loaded
    assert "torch" in loaded


def test_threads_are_those_asked_for(tmp_path) -> None:
    assert distilled(tmp_path, "--quiet", "--threads", "2") == 0
    assert torch.get_num_threads() == 2
