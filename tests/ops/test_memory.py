"""The pool of kept output buffers."""

from __future__ import annotations

import gc

import pytest
import torch

from ddfast import backend
from ddfast.ops import memory

pytestmark = pytest.mark.skipif(backend.compiled is None, reason="no compiled module, no pool")
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    backend.compiled.release_buffers()
    yield
    backend.compiled.release_buffers()


def test_a_freed_buffer_is_used_again_and_a_live_one_never():
    first = memory.empty(MEGABYTE, torch.float32)
    address = first.data_ptr()
    second = memory.empty(MEGABYTE, torch.float32)
    assert second.data_ptr() != address
    view = first[10:20]
    del first
    third = memory.empty(MEGABYTE, torch.float32)
    assert third.data_ptr() != address, "a view still lives on the buffer"
    del view
    assert memory.empty(MEGABYTE, torch.float32).data_ptr() == address


def test_size_dtype_and_alignment():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = memory.empty(3 * MEGABYTE + 1, dtype)
        assert tensor.shape == (3 * MEGABYTE + 1,) and tensor.dtype == dtype
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(1)
        assert tensor.sum(dtype=torch.float64) == 3 * MEGABYTE + 1


def test_small_tensors_and_empty_ones_do_not_come_from_the_pool():
    for count in (0, 1, 1000):
        assert memory.empty(count, torch.float32).shape == (count,)
    assert backend.compiled.held_bytes() == 0


def test_much_larger_buffers_are_not_taken():
    large = memory.empty(32 * MEGABYTE, torch.float32)
    address = large.data_ptr()
    del large
    assert memory.empty(MEGABYTE, torch.float32).data_ptr() != address


def test_what_is_kept_is_bounded_and_can_be_given_back():
    # 5 x 256 MiB, untouched pages: nothing is really used.
    tensors = [memory.empty(64 * MEGABYTE, torch.float32) for _ in range(5)]
    tensors.clear()
    assert 0 < backend.compiled.held_bytes() <= 1 << 30
    backend.compiled.release_buffers()
    assert backend.compiled.held_bytes() == 0


def test_a_gradient_outlives_its_graph():
    from ddfast import losses

    syn = [torch.ones(600, 600, requires_grad=True)]
    real = [torch.randn(600, 600, generator=torch.Generator().manual_seed(0))]
    losses.gradient_distance(syn, real, "mse").backward()
    kept = syn[0].grad
    expected = 2 * (1 - real[0])
    for _ in range(3):  # more outputs of the same size
        losses.gradient_distance_and_gradient([real[0]], [syn[0].detach()], "mse")
    assert torch.equal(kept, expected)
