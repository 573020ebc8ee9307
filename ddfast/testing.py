"""Helpers for the gates that every operator passes; used by ddfast's tests and free for others.

Run as a script, `python -m ddfast.testing OPERATOR CAPABILITY`, it compiles the operator's Triton
kernels ahead of time for a GPU that need not be there and prints one JSON line per kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast import backend

Tensors = Tensor | Sequence[Any]

#: Bytes of shared memory that one block may use, by compute capability.
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def flatten(tensors: Tensors) -> list[Tensor]:
    """All of `tensors`, a tensor or a nested sequence of them, in order."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return [leaf for part in tensors for leaf in flatten(part)]


def error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute error against a float64 result; NaN and inf must agree in place and kind.

    Args:
        result: of any dtype and device.
        exact: of the same shape.

    Returns:
        0 for empty tensors; NaN or inf where values that are not finite differ.

    Raises:
        AssertionError: shapes that differ.
    """
    a, b = result.detach().to("cpu", torch.float64), exact.detach().to("cpu", torch.float64)
    if a.shape != b.shape:
        raise AssertionError(f"shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().masked_fill(same, 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def assert_within_budget(
    ours: Tensors, eager: Tensors, exact: Tensors, factor: float = 2.0, tiny: float = 4.0
) -> None:
    """Assert that our error is at most `factor` times eager's of the same dtype, plus rounding.

    Args:
        ours, eager: results of the same computation in the same dtype.
        exact: the result of the reference in float64 on the same input values.
        tiny: units in the last place of our dtype, at the largest magnitude, always allowed.

    Raises:
        AssertionError: a tensor is over its budget, not finite where it should be, or mis-shaped.
    """
    for i, (a, b, c) in enumerate(zip(flatten(ours), flatten(eager), flatten(exact), strict=True)):
        largest = float(c.detach().abs().nan_to_num(0, 0, 0).max()) if c.numel() else 0.0
        allowed = factor * error(b, c) + tiny * torch.finfo(a.dtype).eps * largest
        found = error(a, c)
        if not found <= allowed:
            raise AssertionError(
                f"result {i}: error {found:.3g} over its budget {allowed:.3g} "
                f"({a.dtype}, eager's error {error(b, c):.3g})"
            )


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    """Assert that `a` and `b` have equal dtypes, shapes and bits, NaN payloads and signs included.

    Raises:
        AssertionError: naming the first tensor that differs.
    """
    for i, (x, y) in enumerate(zip(flatten(a), flatten(b), strict=True)):
        if x.dtype != y.dtype or x.shape != y.shape:
            raise AssertionError(f"result {i}: {x.dtype} {x.shape} and {y.dtype} {y.shape}")
        p, q = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (x, y))
        if not torch.equal(p, q):
            raise AssertionError(f"result {i}: {int((p != q).sum())} bytes differ")


def assert_same_bits_for_any_threads(
    f: Callable[[], Tensors], threads: Sequence[int] = (1, 2, 3, 7)
) -> None:
    """Assert that `f()` gives the same bits for each number of `threads`, and when called again."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in (*threads, threads[0]):
            torch.set_num_threads(count)
            results.append(f())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def check_derivatives(f: Callable[..., Tensors], inputs: Sequence[Tensor], order: int = 2) -> None:
    """gradcheck, and for order 2 gradgradcheck, which draws its cotangents: from a forked state.

    Args:
        f: takes the inputs and returns one tensor or several.
        inputs: float64 tensors, of which those that require gradients are checked.
        order: 1 or 2.
    """
    with torch.random.fork_rng(devices=[]):
        assert torch.autograd.gradcheck(f, inputs)
        if order == 2:
            assert torch.autograd.gradgradcheck(f, inputs)


@contextlib.contextmanager
def unchanged(*tensors: Tensors) -> Iterator[None]:
    """Assert that the block writes to none of the `tensors`, by version counter and bits."""
    watched = flatten(tensors)
    before = [(t._version, t.detach().clone()) for t in watched]
    yield
    for i, (tensor, (version, copy)) in enumerate(zip(watched, before, strict=True)):
        if tensor._version != version:
            raise AssertionError(f"input {i} was written to (version counter)")
        try:
            assert_same_bits(tensor, copy)
        except AssertionError as error:
            raise AssertionError(f"input {i} was written to: {error}") from None


def levels() -> list[str]:
    """The instruction-set levels that can be tested here; none without compiled kernels."""
    return list(backend.compiled.levels()) if backend.compiled is not None else []


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """Run the block on one instruction-set level of the compiled kernels.

    Args:
        name: one of `levels()`.
    """
    before = backend.compiled.level()
    backend.compiled.set_level(name)
    try:
        yield
    finally:
        backend.compiled.set_level(before)


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: str, margin: int = 64) -> Tensor:
    """A contiguous random tensor with NaN right before and behind it, to catch stray reads.

    Args:
        shape, dtype, device: of the tensor.
        margin: elements of NaN on either side.
    """
    count = int(torch.Size(shape).numel())
    flat = torch.full((count + 2 * margin,), float("nan"), dtype=dtype, device=device)
    inner = flat[margin : margin + count].view(*shape)
    generator = torch.Generator().manual_seed(count)
    inner.copy_(torch.randn(tuple(shape), generator=generator, dtype=torch.float64))
    return inner


# --- Triton without a GPU ---------------------------------------------------------------------


def spilled_bytes(ptx: str, capability: int) -> int:
    """Bytes that a kernel spills to memory, stores and loads together, by Triton's own ptxas.

    Args:
        ptx: the kernel's text.
        capability: of the GPU, such as 90.
    """
    import triton

    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={architecture}", str(file), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def loaded_bytes(ptx: str) -> int:
    """Bytes that a thread loads from global memory, every instruction of `ptx` counted once."""
    loads = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b", ptx)
    return sum(int(many or 1) * int(bits) // 8 for many, bits in loads)


def compile_ahead_of_time(operator: str, capability: int) -> list[dict[str, Any]]:
    """Compile `ddfast.kernels.<operator>.ahead_of_time()` in a process of its own.

    Args:
        operator: name of the module.
        capability: of the GPU, one of `SHARED_MEMORY`.

    Returns:
        Per kernel: name, constants, shared and spilled (bytes), loaded (bytes of a thread that the
        text says, a loop's once).

    Raises:
        AssertionError: a kernel does not compile or uses more shared memory than the GPU has.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ddfast.testing", operator, str(capability)]
    with tempfile.TemporaryDirectory() as folder:  # away from a checkout that shadows packages
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode != 0:
        raise AssertionError(done.stderr[-4000:])
    kernels: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for kernel in kernels:
        if kernel["shared"] > SHARED_MEMORY[capability]:
            raise AssertionError(f"too much shared memory for sm_{capability}: {kernel}")
    return kernels


def _compile_here(operator: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Options of the compiler, num_warps above all, may follow.
    for kernel, types, constants, *options in importlib.import_module(
        f"ddfast.kernels.{operator}"
    ).ahead_of_time():
        arguments = {
            name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=arguments, constexprs=constants)
        built = triton.compile(source, GPUTarget("cuda", capability, 32), *options)
        row = {
            "name": kernel.__name__,
            "constants": {name: str(value) for name, value in constants.items()},
            "shared": built.metadata.shared,
            "spilled": spilled_bytes(built.asm["ptx"], capability),
            "loaded": loaded_bytes(built.asm["ptx"]),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    _compile_here(sys.argv[1], int(sys.argv[2]))
