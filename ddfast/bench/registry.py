"""Which benchmark measures what: every operator of `ddfast.ops`, every method of `ddfast.methods`.

A benchmark is a module of `ddfast.benchmarks` with two functions that yield cases:
`cases(options)`, the published table, and `sized(size, options)`, the work at the shapes of a named
size. The one of the methods yields those in `options.methods` only, as cases of the operator
"method:dm" and so on.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ddfast.bench.case import MODES, Case
from ddfast.bench.clock import graphed
from ddfast.bench.sizes import Size

METHOD = "method:"
GRAPH = "CUDA graph of ddfast"

# In the order in which they run: module, and the operators of ddfast.ops whose forward, backward or
# tangent it runs ("class_mean" stands for class_mean and class_mean_bwd).
_BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gradient_distance": ("bench_gradient_distance", ("gradient_distance",)),
    "class_mean": ("bench_class_mean", ("class_mean", "class_mean_distance")),
    "augment": ("bench_augment", ("augment", "augment_adjoint")),
    "norm_relu_pool": (
        "bench_norm_relu_pool",
        ("norm_relu_pool", "norm_relu_pool_means", "norm_relu_pool_tangent"),
    ),
    "first_block": ("bench_first_block", ("first_block",)),
    "class_weight_grad": (
        "bench_class_weight_grad",
        ("class_weight_grad", "class_conv", "class_input_grad"),
    ),
    "multi_formation": (
        "bench_multi_formation",
        ("multi_formation", "multi_formation_adjoint"),
    ),
    "gradient_matching": ("bench_gradient_matching", ()),
    "mmd": ("bench_mmd", ("mmd", "mmd_bandwidth")),
    "characteristic_function": ("bench_characteristic_function", ("characteristic_function",)),
    "distribution_matching": ("bench_distribution_matching", ()),
    "trajectory": ("bench_trajectory", ("trajectory", "trajectory_distance")),
    "unroll": ("bench_unroll", ()),
    "experts": ("bench_experts", ()),
    "kernel_matrix": ("bench_kernel_matrix", ("dense_kernel", "conv_kernel")),
    "krr": ("bench_krr", ("krr",)),
    "features": ("bench_features", ()),
}

BENCHMARKS = {name: module for name, (module, _) in _BENCHMARKS.items()}
"""Benchmark -> its module of `ddfast.benchmarks`."""

COVERS = {name: operators for name, (_, operators) in _BENCHMARKS.items()}
"""Benchmark -> the operators of `ddfast.ops` that it covers."""

METHODS_MODULE = "bench_methods"


@dataclass
class Options:
    """What a benchmark's `cases` and `sized` get.

    Attributes:
        device: "cpu" or "cuda".
        threads: on the CPU.
        memory: bytes that a case may take, already the small share that `quick` leaves.
        quick: few rounds will be made, so the cases should be small.
        no_compile: leave torch.compile out.
        modes: those asked for; other cases are not measured, so need not be built.
        methods: the names of the methods asked for.
    """

    device: str = "cpu"
    threads: int = 1
    memory: int = 1 << 30
    quick: bool = False
    no_compile: bool = False
    modes: tuple[str, ...] = MODES
    methods: tuple[str, ...] = ()


def names() -> list[str]:
    """Every benchmark: the operators, then "method:dm" and so on."""
    from ddfast.methods import methods

    return [*BENCHMARKS, *(METHOD + name for name in methods())]


def chosen(words: Sequence[str]) -> list[str]:
    """The benchmarks of that name, of an operator they cover, or "operators", "methods"; all if [].

    Raises:
        ValueError: there is none of that name.
    """
    every = names()
    if not words:
        return every
    groups = {
        "operators": list(BENCHMARKS),
        "methods": [name for name in every if name.startswith(METHOD)],
    }
    for name, operators in COVERS.items():
        for operator in operators:
            groups.setdefault(operator, []).append(name)
    groups |= {name: [name] for name in every}
    found: dict[str, None] = {}
    for word in words:
        if word not in groups:
            near = difflib.get_close_matches(word, groups, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"no benchmark {word!r}{hint}; `ddfast bench --list` names all")
        found |= dict.fromkeys(groups[word])
    return [name for name in every if name in found]


def cases_of(name: str, size: Size | None, options: Any) -> Iterator[Case]:
    """A benchmark's cases at a size, or its published ones where size is None."""
    file = METHODS_MODULE if name.startswith(METHOD) else BENCHMARKS[name]
    module = importlib.import_module(f"ddfast.benchmarks.{file}")
    if name.startswith(METHOD):
        options.methods = (name.removeprefix(METHOD),)
    for case in module.cases(options) if size is None else module.sized(size, options):
        add_graph(case)
        yield case


def add_graph(case: Case) -> None:
    """A further provider for an operator on CUDA: its work without launches from Python.

    Work that waits for the GPU cannot be recorded; its row says so.
    """
    operator = not case.operator.startswith(METHOD) and case.mode in ("forward", "backward")
    if case.device == "cuda" and operator and "ddfast" in case.providers:
        case.providers[GRAPH] = graphed(case.providers["ddfast"])
