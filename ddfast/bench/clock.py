"""How long one call takes, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float]
"""From a function to the milliseconds of one call of it."""

CACHE = 64 << 20
"""Bytes of a GPU's second-level cache where the driver does not say."""


def timer(device: str, threads: int) -> Timer:
    """The clock of a device.

    CPU: the calling thread's own time with one thread, of which other processes steal less, else
    the wall clock; a function's attribute `clock` replaces it. CUDA: events around the call, after
    a buffer of twice the second-level cache was written. The call then finds a cold cache, and is
    launched while the GPU still writes, so that short kernels are not timed with their launches.
    """
    return _cuda_timer() if device == "cuda" else _cpu_timer(threads)


def _cpu_timer(threads: int) -> Timer:
    usual = time.thread_time if threads == 1 else time.perf_counter

    def milliseconds(f: Callable[[], object]) -> float:
        clock = getattr(f, "clock", usual)
        start = clock()
        f()
        return (clock() - start) * 1e3

    return milliseconds


def _cuda_timer() -> Timer:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    size = 2 * (getattr(properties, "L2_cache_size", 0) or CACHE)
    flushed = torch.empty(size, dtype=torch.int8, device="cuda")

    def milliseconds(f: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        flushed.zero_()
        begin.record()
        f()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    return milliseconds


def synchronize(device: str) -> None:
    """Wait for what was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def graphed(f: Callable[[], object]) -> Callable[[], object]:
    """A provider on CUDA without launches from Python: f recorded at the first call, then replayed.

    f must do the same work on the same memory in every call and never wait for the GPU.
    """
    recorded: list[tuple[torch.cuda.CUDAGraph, object]] = []

    def record() -> None:
        # Libraries and the autograd engine set themselves up beside the stream that records.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                f()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = f()
        recorded.append((graph, result))

    def replay() -> object:
        if not recorded:
            record()
        graph, result = recorded[0]
        graph.replay()
        return result

    return replay
