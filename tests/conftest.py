"""Shared fixtures. Without a GPU the Triton kernels run in its interpreter, in this process."""

from __future__ import annotations

import os
import random

import numpy
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from ddfast import methods  # noqa: E402
from ddfast.data import Dataset  # noqa: E402

# The same examples in every run: a failure must not depend on luck or on the clock.
hypothesis.settings.register_profile(
    "ddfast", derandomize=True, deadline=None, max_examples=30, database=None
)
hypothesis.settings.load_profile("ddfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = (
        "needs an NVIDIA GPU; the kernels are tested in Triton's interpreter and compiled ahead"
    )
    for item in items:
        # On a GPU machine every Triton test is a GPU test: it runs the compiled kernel there.
        if HAS_GPU and "triton_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
    # The tests of minutes come first, so that no process is left alone with one at the end.
    items.sort(key=lambda item: not item.path.name.startswith(("test_scale", "test_build")))


@pytest.fixture
def triton_device() -> str:
    """Where Triton kernels run: the GPU if there is one, else the CPU under the interpreter."""
    if HAS_GPU:
        return "cuda"
    triton = pytest.importorskip("triton", reason="triton is not installed")
    assert triton.knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET was set"
    return "cpu"


@pytest.fixture(autouse=True)
def global_random_state_is_untouched(request: pytest.FixtureRequest):
    """Operators and runs neither read nor write torch's, NumPy's or Python's global generator."""
    torch.manual_seed(20_061)
    before = torch.random.get_rng_state()
    numpy_before, python_before = numpy.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    yield
    if request.node.get_closest_marker("uses_global_random_state") is None:
        message = "the global generator was used; draw from a torch.Generator"
        assert torch.equal(before, torch.random.get_rng_state()), message
        assert numpy.array_equal(numpy_before, numpy.random.get_state()[1]), message  # noqa: NPY002
        assert random.getstate() == python_before, message


@pytest.fixture(autouse=True)
def threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registered_methods_are_forgotten():
    before = dict(methods._registered)
    yield
    methods._registered.clear()
    methods._registered.update(before)


@pytest.fixture
def small_dataset():
    """Seven, five and four images of three classes; pixel values tell the images apart."""
    labels = torch.tensor([2, 0, 1, 0, 0, 2, 1, 0, 1, 2, 0, 1, 2, 1, 0, 0])
    images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 2, 3, 4).contiguous()
    return Dataset(
        name="small",
        train_images=images,
        train_labels=labels,
        test_images=images[:2] + 100,
        test_labels=labels[:2],
        class_names=("ant", "bee", "cat"),
        mean=(0.25, 0.5),
        std=(0.5, 0.125),
    )
