"""The scripts in examples run, each in a process of its own, and say what they found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(cwd: Path, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def output(cwd: Path, script: str, *words: str, **environment: str) -> str:
    done = run(cwd, script, *words, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"loss ([0-9.]+)", text)]


@pytest.mark.parametrize("loss", ["gradient", "mmd"])
def test_drop_in_losses(tmp_path, loss) -> None:
    found = losses(output(tmp_path, "drop_in_losses.py", "--loss", loss, "--iterations", "21"))
    assert len(found) == 3
    assert found[-1] < 0.9 * found[0]


def test_student_loss(tmp_path) -> None:
    found = losses(output(tmp_path, "student_loss.py", "--iterations", "21", "--steps", "10"))
    assert len(found) == 3
    assert found[-1] < found[0] - 0.1


def test_kernel_ridge(tmp_path) -> None:
    found = output(tmp_path, "kernel_ridge.py", "--iterations", "20")
    before, after = (float(each) for each in re.findall(r"([0-9.]+) % of the test images", found))
    assert after > before + 10


def test_distil_evaluate_show(tmp_path) -> None:
    words = ["--iterations", "3", "--epochs", "2", "--out", "run"]
    found = output(tmp_path, "distil_evaluate_show.py", *words)
    assert "digits.png shows the images" in found
    assert re.search(r"\| random selection \| ConvNetD2W32 \|", found)
    assert re.search(r"^[0-9.]+ % with 10 images$", found, flags=re.M)
    for name in ("digits.png", "report.md", "report.json", "distilled.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_own_data(tmp_path) -> None:
    words = ["--data", "data", "--model", "ConvNetD1W4", "--iterations", "3"]
    found = output(tmp_path, "own_data.py", *words, "--out", "run", "--memory", "8MiB")
    assert "800 train and 100 test images of 20 classes" in found
    assert (tmp_path / "data" / "images.npy").stat().st_size > 900 * 3 * 32 * 32
    again = run(tmp_path, "own_data.py", *words, "--out", "run", "--memory", "8MiB")
    assert "run is finished; nothing to do" in again.stderr
    more = output(tmp_path, "own_data.py", *words, "--out", "run", RANK="1", LOCAL_RANK="0")
    assert "run-1: Artefact" in more
    seeds = []
    for folder in ("run", "run-1"):
        with safe_open(tmp_path / folder / "distilled.safetensors", "pt") as file:
            seeds.append(re.search(r'"seed": (\d+)', file.metadata()["ddfast"])[1])
    assert seeds == ["0", "1"]


def test_several_runs_need_the_data_first(tmp_path) -> None:
    done = run(tmp_path, "own_data.py", "--data", "nowhere", RANK="0", LOCAL_RANK="0")
    assert done.returncode == 1
    assert "run the script alone to write it" in done.stderr


def test_the_own_method_is_that_of_the_page(tmp_path) -> None:
    page = (ROOT / "docs" / "your-own-method.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```$", page, flags=re.S | re.M)[0]
    file = EXAMPLES / "moments.py"
    assert file.read_text().split('"""\n\n', 1)[1] == code
    data = '{"classes": 3, "size": 8, "train_per_class": 6, "test_per_class": 4}'
    words = ["distill", "moments", "--plugin", file, "--dataset", "generated", "--ipc", "1"]
    words += ["--data_options", data, "--model", "ConvNetD1W4", "--iterations", "2", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "ddfast", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "distilled.safetensors").exists()


def test_every_script_is_listed_and_tested() -> None:
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    here = {path.name for path in EXAMPLES.glob("*.py")}
    assert listed == here
    tests = Path(__file__).read_text()
    for name in here:
        assert f'"{name}"' in tests
        assert (EXAMPLES / name).read_text().startswith('"""'), name
