"""The cases at a named size: built, and every provider right, at the smallest one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddfast import methods
from ddfast.bench import Size, registry
from ddfast.bench.case import MODES, relative_error
from ddfast.benchmarks import bench_methods
from ddfast.testing import flatten

TINY = Size("tiny", classes=2, channels=3, side=8, batch_real=3, ipc=2, width=4, depth=2)

ORDERS = ("forward", "backward", "double")
WITHOUT_DOUBLE = ("forward", "backward")

# What each operator is measured in.
OPERATORS = {
    "gradient_distance": ORDERS,
    "class_mean": WITHOUT_DOUBLE,
    "class_mean_distance": ORDERS,
    "augment": ORDERS,
    "norm_relu_pool": ORDERS,
    "norm_relu_pool_means": ORDERS,
    "first_block": WITHOUT_DOUBLE,
    "class_conv": ORDERS,
    "class_input_grad": ORDERS,
    "class_weight_grad": ORDERS,
    "multi_formation": ORDERS,
    "mmd": WITHOUT_DOUBLE,
    "characteristic_function": WITHOUT_DOUBLE,
    "trajectory": ("forward",),
    "trajectory_distance": ORDERS,
    "dense_kernel": WITHOUT_DOUBLE,
    "conv_kernel": WITHOUT_DOUBLE,
    "krr": WITHOUT_DOUBLE,
    "gradient_matching": ("backward", "double", "iteration"),
    "distribution_matching": ("forward", "iteration"),
    "unroll": ("backward",),
    "experts": ("iteration",),
    "features": ("backward",),
}


@pytest.fixture(autouse=True)
def one_thread():
    """The work is far too small for more; the official augmentation seeds the global generator."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield


def options(**settings: Any) -> registry.Options:
    return registry.Options(**{"quick": True, "no_compile": True, "memory": 64 << 20} | settings)


def values(result: Any) -> list[torch.Tensor]:
    """Tensors of what a provider returns."""
    if isinstance(result, dict):  # by name, each one tensor or more
        return [t for part in result.values() for t in values(part)]
    return [t for t in flatten(result) if t.dtype.is_floating_point]


@pytest.mark.parametrize("name", registry.names())
def test_every_provider_is_right(name):
    cases = list(registry.cases_of(name, TINY, options()))
    assert cases
    assert len({(c.operator, c.name, c.mode) for c in cases}) == len(cases)
    for case in cases:
        exact = case.exact()
        assert any(float(t.abs().max()) > 0 for t in values(exact)), "nothing to be right about"
        for provider, f in case.providers.items():
            found = (case.error or relative_error)(f(), exact)
            assert found <= case.tolerance, f"{case.name}, {case.mode}: {provider} is off {found}"
        assert next(iter(case.providers)) == (
            "eager" if name in registry.BENCHMARKS else "reference"
        )
        assert any(p.startswith("ddfast") for p in case.providers)
        assert case.mode in MODES and case.size.startswith("tiny")
        assert case.bytes > 0 and case.flops >= 0 and case.rounds <= 7


def test_every_operator_in_every_mode():
    found: dict[str, dict[str, None]] = {}
    for name in registry.BENCHMARKS:
        for case in registry.cases_of(name, TINY, options()):
            found.setdefault(case.operator, {})[case.mode] = None
    assert {operator: tuple(modes) for operator, modes in found.items()} == OPERATORS


@pytest.mark.parametrize("mode", MODES)
def test_only_the_modes_asked_for(mode):
    for name in registry.BENCHMARKS:
        for case in registry.cases_of(name, TINY, options(modes=(mode,))):
            assert case.mode == mode


def test_compiled_unless_told_not_to():
    whole, without = (
        {
            (case.operator, case.mode, case.name)
            for name in registry.BENCHMARKS
            for case in registry.cases_of(name, TINY, options(quick=False, no_compile=no_compile))
            if "torch.compile" in case.providers
        }
        for no_compile in (False, True)
    )
    assert not without
    by_class = {"class_conv", "class_input_grad", "class_weight_grad", "conv_kernel"}
    iterations = {"unroll", "experts", "features", "class_mean"}
    assert {operator for operator, *_ in whole} == set(OPERATORS) - by_class - iterations
    whole_iterations = {operator for operator, mode, _ in whole if mode == "iteration"}
    assert whole_iterations == {"distribution_matching"}


def test_every_method_has_a_case():
    for name in methods.methods():
        (case,) = bench_methods.sized(TINY, options(methods=(name,)))
        assert (case.operator, case.mode) == (f"method:{name}", "iteration")


def test_published_cases_of_methods_are_those_of_cifar10():
    (case,) = bench_methods.cases(options(methods=("dm",)))
    assert case.size.startswith("cifar10")


@pytest.mark.parametrize("name", ["dm", "frepo"])
def test_an_iteration_gives_the_same_bits_again(name):
    (case,) = bench_methods.sized(TINY, options(methods=(name,)))
    first, second = (case.providers["ddfast"]() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["dm", "mtt", "kip"])
def test_a_wrong_iteration_is_noticed(name):
    (case,) = bench_methods.sized(TINY, options(methods=(name,)))
    exact = case.exact()
    before = case.error.__self__.before
    for key in ("images", *(k for k in exact if k.endswith("momentum_buffer"))):
        change = exact[key] - before.get(key, torch.zeros_like(exact[key]))
        wrong = exact | {key: exact[key] + 0.02 * change}
        assert case.error(wrong, exact) == pytest.approx(0.02, rel=0.01)
    assert case.error(exact, exact) == 0
    assert case.error({k: t for k, t in exact.items() if k != "images"}, exact) == 1
    still = exact | {k: before[k] for k in exact if k in before}
    assert case.error(still, still) == 1, "an iteration that moves nothing shows nothing"


def test_what_the_reference_itself_is_off_by_is_allowed_twice(monkeypatch):
    (case,) = bench_methods.sized(TINY, options(methods=("linba",)))
    iteration, exact = case.error.__self__, case.exact()
    assert 0 < iteration.sensitivity(exact) < bench_methods.TOLERANCE / 10
    change = exact["images"] - iteration.before["images"]
    wrong = exact | {"images": exact["images"] + 0.05 * change}
    assert case.error(wrong, exact) == pytest.approx(0.05, rel=0.01)
    for own, expected in ((0.01, 0.025), (0.05, 0.005), (1.0, 0.0025)):
        monkeypatch.setattr(iteration, "sensitivity", lambda exact, own=own: own)
        assert case.error(wrong, exact) == pytest.approx(expected, rel=0.01)


def test_shares_are_named_and_fit():
    imagenet = Size("imagenet-1k", 1000, 3, 64, 256, 10, 128, 4)
    (made, *_) = registry.cases_of("class_mean", imagenet, options(modes=("forward",)))
    words = made.size.removeprefix("imagenet-1k: ").split()
    assert words[1:] == ["of", "1000", "classes"]
    assert f"C={words[0]}," in made.name
    assert made.bytes <= 64 << 20
    assert math.isfinite(made.flops)
