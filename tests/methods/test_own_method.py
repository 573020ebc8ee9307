"""docs/your-own-method.md as it stands: it runs, resumes, is evaluated; and what is refused."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from ddfast import methods
from ddfast.artefact import Artefact
from ddfast.cli import main
from ddfast.data import generated
from ddfast.distill import distill
from ddfast.evaluate import evaluate
from ddfast.methods import dm
from ddfast.methods.config import Config as Shared
from ddfast.testing import assert_same_bits

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your-own-method.md").read_text()
FILE, _, BY_HAND = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.S | re.M)
SMALL = {"ipc": 2, "model": "ConvNetD2W4", "batch_real": 5, "lr_img": 0.7, "weight": 0.5}


@pytest.fixture
def own(monkeypatch) -> types.ModuleType:
    """The page's file, run as a module."""
    module = types.ModuleType("moments")
    monkeypatch.setitem(sys.modules, "moments", module)
    exec(FILE, module.__dict__)
    return module


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "moments.py"
    path.write_text(FILE)
    return str(path)


def test_the_file_has_40_lines() -> None:
    lines = [line for line in FILE.splitlines() if line.strip()]
    assert len(lines) <= 40


def test_it_is_a_method_like_any_other(own) -> None:
    method = methods.find("Moments")
    assert method is methods.methods()["moments"]
    assert (method.config, method.step, method.protocol) == (own.Config, own.step, "dm")
    assert list(methods.methods())[-1] == "moments"
    assert methods.figures("moments") == []


def test_equals_the_literal_loop(own, make_dataset, make_run) -> None:
    """Autograd through the definition, class by class, in float64."""
    dataset = make_dataset([7, 3, 9])
    run = make_run("moments", dataset, **SMALL)
    start = run.images.detach().clone()
    losses = own.step(run)
    again = make_run("moments", dataset, **SMALL)
    net, real = again.fresh_net(), dm.real_batch(again)
    images = start.clone().requires_grad_()
    expected = []
    for c, chosen in enumerate(real.indices.split(real.counts)):
        draw, s = real.draw[:, c : c + 1], images[2 * c : 2 * c + 2]
        s, x = (net.embed(again.augment(y, draw)) for y in (s, again.real(chosen)))
        first = (s.mean(0) - x.mean(0)).square().sum()
        second = (s.square().mean(0) - x.square().mean(0)).square().sum()
        expected.append(first + 0.5**2 * second)
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(sum(expected), images)
    torch.testing.assert_close(run.images, start - 0.7 * gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"parametrisation": "bases", "shared": 3}])
def test_the_step_by_hand_is_the_same(own, make_dataset, make_run, settings) -> None:
    exec(BY_HAND, own.__dict__)
    dataset, found = make_dataset([7, 3, 9]), []
    for step in (own.step, own.step_by_hand):
        run = make_run("moments", dataset, **SMALL, **settings)
        for _ in range(3):
            losses = step(run)
            run.iteration += 1
        found.append((losses, *(tensor.detach() for tensor in run.tensors.values())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_resumes_to_the_same_bits_and_can_be_evaluated(own, tmp_path, monkeypatch) -> None:
    dataset = generated(classes=3, size=8, train_per_class=6, test_per_class=2)
    config = own.Config(**SMALL, iterations=6)
    whole = distill("moments", dataset, config, tmp_path / "whole", progress=False)

    def interrupted(run):
        if run.iteration == 4:
            raise KeyboardInterrupt
        return own.step(run)

    known = methods.find("moments")
    broken = dataclasses.replace(known, step=interrupted)
    with monkeypatch.context() as patched:
        patched.setattr(methods, "find", lambda name: broken)
        with pytest.raises(KeyboardInterrupt):
            distill("moments", dataset, config, tmp_path / "run", progress=False)
    steps, sweep = [], own.sweep
    own.sweep = lambda *arguments: (steps.append(1), sweep(*arguments))[1]
    again = distill("moments", dataset, config, tmp_path / "run", progress=False)
    assert len(steps) == 2  # of six
    assert_same_bits(again.images, whole.images)
    report = evaluate(again, dataset, "ConvNetD1W4", num_eval=1, epochs=1, progress=False)
    assert {row.name for row in report.rows} >= {"distilled", "full data"}


DATA = '{"classes": 3, "size": 8, "train_per_class": 6, "test_per_class": 4}'
TASK = ["--dataset", "generated", "--data_options", DATA, "--ipc", "2", "--model", "ConvNetD1W4"]


def test_the_command_line_takes_the_file(file, tmp_path, capsys) -> None:
    out = str(tmp_path / "run")
    flags = [*TASK, "--iterations", "2", "--weight", "0.25", "--out", out, "--quiet"]
    assert main(["distill", "moments", "--plugin", file, *flags]) == 0
    artefact = Artefact.load(tmp_path / "run" / "distilled.safetensors")
    assert (artefact.method, artefact.config["weight"]) == ("moments", 0.25)
    with pytest.raises(SystemExit):
        main([f"--plugin={file}", "distill", "moments", "--help"])
    assert "of the mean squares beside the means (default: 1.0)" in capsys.readouterr().out
    assert main(["methods", "--plugin", file]) == 0
    assert "matches two moments of features" in capsys.readouterr().out


def test_evaluation_without_the_file_says_what_it_takes(file, tmp_path, capsys) -> None:
    flags = [*TASK, "--iterations", "1", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(["distill", "moments", "--plugin", file, *flags]) == 0
    methods._registered.clear()
    capsys.readouterr()
    how = ["--num_eval", "1", "--epochs", "1", "--no_baselines", "--quiet"]
    assert main(["evaluate", str(tmp_path / "run"), *how]) == 0
    assert "method 'moments' is not known here (--plugin" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), *how, "--plugin", file]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("nowhere.py", "plugin: there is no file nowhere.py"),
        ("no_such_module", "No module named 'no_such_module'"),
        ("", "plugin: expected a file that ends in .py, or a module"),
    ],
)
def test_a_plugin_that_is_not_there(capsys, plugin, message) -> None:
    assert main(["methods", f"--plugin={plugin}"]) == 2
    assert message in capsys.readouterr().err


def test_a_plugin_that_fails_is_forgotten(tmp_path, capsys) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('of mine')\n")
    assert main(["methods", "--plugin", str(path)]) == 2
    assert "of mine" in capsys.readouterr().err
    assert f"plugin {path.resolve()}" not in sys.modules


# --- what register refuses ----------------------------------------------------------------------


def step(run):
    return torch.zeros(1)


class NoDataclass(dm.Config):
    extra: float = methods.setting("lost without the decorator", 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(dm.Config):
    extra: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nameless(dm.Config):
    extra: Nowhere = methods.setting("of a type that is not there", 1.0)  # noqa: F821, RUF009


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "dm"}, ValueError, "name: 'dm' is taken: Dataset Condensation with Distribution"),
        ({"name": "My-method"}, ValueError, "name: got 'My-method', expected letters"),
        ({"name": 3}, TypeError, "name: got 3"),
        ({"config": dict}, TypeError, "config: got <class 'dict'>, expected a subclass"),
        ({"config": None}, TypeError, "config: got None"),
        ({"config": NoDataclass}, TypeError, r"config: .*NoDataclass is no dataclass of its own"),
        ({"config": Bare}, TypeError, r"config: field extra of .*Bare has no help"),
        ({"config": Nameless}, TypeError, r"a type of .*Nameless cannot be found: .*Nowhere"),
        ({"step": None}, TypeError, "step: got None, expected a function of the run"),
        ({"step": lambda: 0}, TypeError, "step: .* cannot be called with the run"),
        ({"check": 1}, TypeError, "check: got 1"),
        ({"prepare": lambda run, more: 0}, TypeError, "prepare: .* cannot be called"),
        ({"protocol": "mine"}, ValueError, "protocol: got 'mine', expected one of dc, "),
    ],
)
def test_bad_registrations_are_refused(change, error, message) -> None:
    before = methods.methods()
    with pytest.raises(error, match=message):
        methods.register(**{"name": "mine", "config": dm.Config, "step": step} | change)
    assert methods.methods() == before


def test_only_the_same_place_may_register_a_name_again(own) -> None:
    exec(FILE, own.__dict__)  # a notebook cell that is run again
    assert methods.find("moments").step is own.step
    with pytest.raises(ValueError, match="'moments' is taken: moments, registered by moments"):
        methods.register("moments", dm.Config, step)


def test_settings_without_a_published_value_are_asked_for(make_dataset) -> None:
    methods.register("mine", Shared, step)
    config = Shared(ipc=1, iterations=2, init="real")
    with pytest.raises(ValueError, match="lr_img: left out, and `published` of"):
        methods.resolve(config, make_dataset([3, 3]))
    methods.resolve(dataclasses.replace(config, lr_img=1.0), make_dataset([3, 3]))
