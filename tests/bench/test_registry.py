"""Every operator and every method has its benchmark."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddfast.ops
from ddfast import methods
from ddfast.bench import Case, Size, registry


def registered() -> set[str]:
    """Every operator of ddfast.ops without its backwards, which belong to it."""
    for module in pkgutil.iter_modules(ddfast.ops.__path__):
        importlib.import_module(f"ddfast.ops.{module.name}")
    found = torch._C._dispatch_get_all_op_names()
    return {base(name) for name in found if name.startswith("ddfast::")}


def base(name):
    """Of an operator or one of its backwards."""
    return re.sub("(_bwd)+$", "", name.removeprefix("ddfast::"))


def test_every_operator_is_covered_and_no_other():
    covered = [operator for operators in registry.COVERS.values() for operator in operators]
    assert set(covered) == registered()
    assert len(covered) == len(set(covered))


class Recorded(TorchDispatchMode):
    """Notes which of ddfast's operators run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.namespace == "ddfast":
            self.names.add(base(f._schema.name))
        return f(*args, **(kwargs or {}))


def test_every_operator_is_run_by_the_benchmarks_that_say_so():
    size = Size("tiny", classes=2, channels=3, side=8, batch_real=3, ipc=2, width=4, depth=2)
    options = registry.Options(quick=True, no_compile=True, memory=64 << 20)
    found = {}
    for name in registry.BENCHMARKS:
        found[name] = recorded = Recorded()
        for case in registry.cases_of(name, size, options):
            for provider, f in case.providers.items():
                if provider.startswith("ddfast"):
                    with recorded:
                        f()
    for name, operators in registry.COVERS.items():
        missing = set(operators) - found[name].names
        assert not missing, f"{name} does not run {', '.join(sorted(missing))}"


def test_every_method_has_a_name():
    names = [n.removeprefix("method:") for n in registry.names() if n.startswith("method:")]
    assert names == list(methods.methods())


def test_every_benchmark_is_a_module_with_published_cases():
    for file in registry.BENCHMARKS.values():
        module = importlib.import_module(f"ddfast.benchmarks.{file}")
        assert callable(module.cases)


def test_chosen():
    every = registry.names()
    assert registry.chosen([]) == every
    assert registry.chosen(["operators"]) == list(registry.BENCHMARKS)
    assert registry.chosen(["methods"]) == every[len(registry.BENCHMARKS) :]
    # In the order of the list, each once; an operator is found in the benchmark that covers it.
    assert registry.chosen(["krr", "method:dm", "mmd", "mmd_bandwidth"]) == [
        "mmd",
        "krr",
        "method:dm",
    ]
    assert registry.chosen(["conv_kernel"]) == ["kernel_matrix"]
    with pytest.raises(ValueError, match=r"no benchmark 'mdm' \(did you mean mmd\?\)"):
        registry.chosen(["mdm"])


def test_one_method_at_a_time(monkeypatch):
    asked = []

    def sized(size, options):
        asked.append(options.methods)
        return iter(())

    monkeypatch.setitem(
        sys.modules, "ddfast.benchmarks.bench_methods", types.SimpleNamespace(sized=sized)
    )
    list(registry.cases_of("method:dm", object(), registry.Options()))
    assert asked == [("dm",)]


def test_operators_on_cuda_have_a_graph_as_a_provider() -> None:
    def provided(operator: str, mode: str, device: str) -> list[str]:
        work = {"eager": list, "ddfast": list}
        case = Case(operator, "a case", mode, list, dict(work), 1, device=device)
        registry.add_graph(case)
        return list(case.providers)

    plain = ["eager", "ddfast"]
    for mode in ("forward", "backward"):
        assert provided("mmd", mode, "cuda") == [*plain, registry.GRAPH]
        assert provided("mmd", mode, "cpu") == plain
    assert provided("mmd", "double", "cuda") == plain
    assert provided("method:dm", "iteration", "cuda") == plain
