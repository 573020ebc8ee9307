"""The clock, the memory and the graphs of a GPU; without one, the order of what the clock does."""

from __future__ import annotations

import types

import pytest
import torch

from ddfast.bench import Case, clock, graphed
from ddfast.bench.ceilings import measure_ceilings
from ddfast.bench.measure import measure
from ddfast.bench.peak import weigh


def test_the_cache_is_overwritten_before_the_events(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")

        def elapsed_time(self, other):
            return 2.5

    def empty(size, dtype, device):
        assert (size, dtype, device) == (2 * 50 << 20, torch.int8, "cuda")
        return types.SimpleNamespace(zero_=lambda: said.append("overwritten"))

    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waited"))
    monkeypatch.setattr(torch, "empty", empty)
    milliseconds = clock.timer("cuda", 1)
    assert milliseconds(lambda: said.append("called")) == 2.5
    assert said == ["waited", "overwritten", "event", "called", "event", "waited"]


@pytest.mark.gpu
def test_a_graph_does_the_same_work():
    x = torch.arange(1000.0, device="cuda", requires_grad=True)

    def work():
        return torch.autograd.grad((x * x).sum(), x)[0]

    replayed = graphed(work)
    assert torch.equal(replayed(), 2 * x)
    with torch.no_grad():
        x += 1
    assert torch.equal(replayed(), 2 * x)  # it reads the memory anew


@pytest.mark.gpu
def test_memory_beyond_what_was_held():
    kept = torch.ones(1 << 22, device="cuda")
    assert weigh(lambda: ((kept + 1) + 1).sum(), "cuda") >= 32 << 20
    assert weigh(lambda: None, "cuda") == 0


@pytest.mark.gpu
def test_a_case():
    ceilings = measure_ceilings("cuda", clock.timer("cuda", 1))
    x = torch.ones(1 << 20, device="cuda")
    providers = {"eager": lambda: x + 1, "ddfast": graphed(lambda: x + 1)}
    exact = x.double() + 1
    case = Case("adding", "", "forward", lambda: exact, providers, 8 << 20, device="cuda")
    for row in measure(case, ceilings):
        assert row["verified"] == "yes"
        assert row["median_ms"] > 0 and row["share_of_floor"] > 0
