"""`ddfast bench` on a benchmark of two tiny cases, by a clock that is made up."""

from __future__ import annotations

import itertools
import json
import sys
import types

import pytest
import torch

from ddfast.bench import Case, allocator, command, registry, results, script
from ddfast.bench.ceilings import Ceilings
from ddfast.cli import main

CEILINGS = Ceilings({1 << 20: 10.0}, {"float32": 100.0})


def tiny(mode, value=3.0, size=""):
    wanted = torch.tensor(3.0)
    providers = {"eager": lambda: wanted * 1, "ddfast": lambda: wanted * 0 + value}
    return Case("tiny", "3", mode, lambda: wanted, providers, bytes=8, flops=10**9, size=size)


@pytest.fixture
def tiny_module(monkeypatch):
    """A module whose functions a test may replace, as the only benchmark but the methods'."""
    module = types.SimpleNamespace(
        cases=lambda options: iter([tiny("published")]),
        sized=lambda size, options: iter([tiny(m, size=size.name) for m in ("forward", "double")]),
    )
    monkeypatch.setitem(sys.modules, "ddfast.benchmarks.bench_tiny", module)
    monkeypatch.setattr(registry, "BENCHMARKS", {"tiny": "bench_tiny"})
    monkeypatch.setattr(registry, "COVERS", {"tiny": ()})
    for user in (command, script):
        monkeypatch.setattr(user, "measure_ceilings", lambda device, timer: CEILINGS)
    return module


def one_millisecond(f):
    f()
    return 1.0


def bench(*words, clock=None):
    return command.run(
        ["tiny", "--device", "cpu", "--quiet", *map(str, words)],
        milliseconds=one_millisecond,
        clock=clock or (lambda: 0.0),
    )


def test_everything_at_once(tiny_module, tmp_path, capsys):
    csv, file, folder = tmp_path / "results.csv", tmp_path / "results.json", tmp_path / "plots"
    assert bench("--sizes", "cifar10,imagenet-1k", "--out", csv, "--json", file) == 0
    rows = results.read(csv)
    assert [(r["size"], r["mode"], r["provider"]) for r in rows] == [
        (size, mode, provider)
        for size in ("cifar10", "imagenet-1k")
        for mode in ("forward", "double")
        for provider in ("eager", "ddfast")
    ]
    assert {(r["median_ms"], r["rounds"], r["threads"], r["verified"]) for r in rows} == {
        ("1.0", "15", "1", "yes")
    }
    kept = json.loads(file.read_text())
    assert len(kept["rows"]) == 8 and kept["rows"][0]["times_ms"] == [1.0] * 15
    assert {"torch", "commit", "level", "ceilings"} <= set(kept["machine"])
    said = capsys.readouterr().out
    assert "tiny: 3, forward; cifar10\n  eager " in said and "GB/s" in said
    assert bench("--compare", csv, "--plot", folder) == 0
    said = capsys.readouterr().out
    assert "2 baseline, 2 same" in said
    assert {path.name for path in folder.iterdir()} == {"speed.png", "roofline.png"}


def test_modes_and_published(tiny_module, tmp_path):
    out = tmp_path / "results.csv"
    bench("--modes", "double", "--out", out)
    bench("--published", "--out", out)
    assert [r["mode"] for r in results.read(out)[::2]] == ["double", "published"]


def test_interrupted(tiny_module, tmp_path, capsys):
    def sized(size, options):
        yield tiny("forward")
        raise KeyboardInterrupt

    tiny_module.sized = sized
    out = tmp_path / "results.csv"
    with pytest.raises(KeyboardInterrupt):
        bench("--out", out)
    assert [r["mode"] for r in results.read(out)] == ["forward", "forward"]
    assert f"interrupted; 2 rows are in {out}" in capsys.readouterr().err


def test_a_wrong_result_of_ours_is_an_error(tiny_module, tmp_path, capsys):
    tiny_module.sized = lambda size, options: iter([tiny("forward", 4.0), tiny("double")])
    out = tmp_path / "results.csv"
    assert bench("--out", out) == 1
    assert "tiny: 3, forward, ddfast: WRONG (allowed 0.0001)" in capsys.readouterr().err
    assert [r["mode"] for r in results.read(out)] == ["forward"] * 2 + ["double"] * 2


def test_a_case_that_cannot_be_built_is_an_error(tiny_module, capsys):
    def sized(size, options):
        yield tiny("forward")
        raise RuntimeError("no such shape")

    tiny_module.sized = sized
    assert bench("--sizes", "cifar10,cifar100") == 1
    captured = capsys.readouterr()
    assert captured.err.count("failed: RuntimeError: no such shape") == 2
    assert captured.out.count("tiny: 3, forward") == 2  # the next size is measured all the same


def test_a_budget_leaves_cases_out_but_the_first_of_each(tiny_module, tmp_path, capsys):
    out = tmp_path / "results.csv"
    seconds = itertools.count(step=10.0)  # every look at the clock is ten seconds later
    assert bench("--budget", "15", "--sizes", "all", "--out", out, clock=lambda: next(seconds)) == 0
    assert [(r["size"], r["mode"]) for r in results.read(out)[::2]] == [
        (size, "forward") for size in ("cifar10", "cifar100", "tiny-imagenet", "imagenet-1k")
    ]
    assert "left out, no time was left: more cases of tiny at cifar10" in capsys.readouterr().out


@pytest.mark.parametrize(("milliseconds", "rounds"), [(100.0, "15"), (1000.0, "10"), (1e5, "3")])
def test_slow_cases_get_fewer_rounds(tiny_module, tmp_path, milliseconds, rounds):
    out = tmp_path / "results.csv"
    words = ["tiny", "--device", "cpu", "--quiet", "--modes", "forward", "--out", str(out)]
    command.run(words, milliseconds=lambda f: milliseconds)
    assert results.read(out)[1]["rounds"] == rounds  # both providers and the copy in 30 s


def test_quick_is_small(tiny_module, monkeypatch):
    seen = []

    def sized(size, options):
        seen.append(options)
        yield tiny("forward")

    tiny_module.sized = sized
    bench("--quick", "--memory", "1GiB")
    bench("--memory", "1GiB", "--modes", "forward")
    quick, usual = seen
    assert (quick.quick, quick.no_compile, quick.memory) == (True, True, 64 << 20)
    assert (usual.quick, usual.no_compile, usual.memory) == (False, False, 1 << 30)
    assert usual.modes == ("forward",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "mnist"], "sizes: got 'mnist', expected some of cifar10, "),
        (["--modes", "forwards"], "modes: got 'forwards', expected some of forward, "),
        (["--threads", "0"], "threads: got 0, expected at least 1"),
        (["--budget", "-1"], "budget: got -1.0, expected seconds above 0"),
        (["--memory", "much"], "memory: got 'much', expected an amount such as 8GiB"),
        (["--qiuck"], r"unrecognized arguments: --qiuck \(did you mean --quick"),
        (["tinny"], r"no benchmark 'tinny' \(did you mean tiny\?\)"),
    ],
)
def test_bad_flags_are_named(tiny_module, words, message):
    with pytest.raises(ValueError, match=message):
        bench(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_named():
    with pytest.raises(ValueError, match="device: got cuda, but PyTorch sees no NVIDIA GPU"):
        command.run(["--device", "cuda"])


def test_the_command_line(tiny_module, capsys):
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    assert "tiny\n" in said and "method:dm\n" in said and "imagenet-1k" in said
    assert main(["bench", "nothing-of-the-sort"]) == 2
    assert "`ddfast bench --list` names all" in capsys.readouterr().err
    assert main(["bench", "tiny", "--quick", "--quiet"]) == 0


def test_the_allocator_is_tuned_by_starting_again(monkeypatch):
    called = []
    monkeypatch.setattr(allocator.os, "execve", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "ddfast", "bench", "--tuned_allocator", "mmd"])
    assert allocator.label() == ""
    allocator.start_again()
    ((program, words, environment),) = called
    assert (program, words) == (sys.executable, [sys.executable, "ddfast", "bench", "mmd"])
    monkeypatch.setattr(allocator.os, "environ", environment)
    assert allocator.label() == "; allocator tuned"


def test_a_benchmark_file_has_a_command_line_of_its_own(tiny_module, monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["bench_tiny.py", "--only", "double", "--out", str(out)])
    script.run(lambda options: iter([tiny("forward"), tiny("double")]), "Tiny.")
    assert {r["mode"] for r in results.read(out)} == {"double"}
    assert "tiny: 3, double" in capsys.readouterr().out
