"""What the fully connected kernels take: layouts, dtypes, edges, extremes, memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast.kernel_matrix import kernel_matrix
from ddfast.testing import assert_same_bits, at_level, levels, unchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["nngp", "ntk"]


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def value_and_gradients(x: Tensor, y: Tensor | None, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, y) if t is not None]
    value = kernel_matrix(*leaves, **options)
    weights = torch.cos(torch.arange(value.numel(), dtype=torch.float64)).view(value.shape)
    gradients = torch.autograd.grad(value, leaves, weights.to(value.dtype))
    return [value.detach(), *gradients]


def exact(x: Tensor, y: Tensor | None, **options) -> list[Tensor]:
    with ddfast.use_backend("reference"):
        wide = None if y is None else y.double()
        return value_and_gradients(x.double(), wide, **options)


def agree(x: Tensor, y: Tensor | None, rtol: float, **options) -> None:
    """Each result relative to its largest entry, against the reference in float64."""
    wanted = exact(x, y, **options)
    for ours, b in zip(value_and_gradients(x, y, **options), wanted, strict=True):
        limit = max(rtol, 4 * torch.finfo(ours.dtype).eps) * float(b.abs().max())
        torch.testing.assert_close(ours.double(), b, rtol=0, atol=limit)


VIEWS = {
    "transposed": lambda t: t.mT,
    "rows expanded": lambda t: t[:1].expand(12, 10),
    "columns expanded": lambda t: t[:, :1].expand(12, 10),
    "all expanded": lambda t: t[:1, :1].expand(12, 10),
    "sliced": lambda t: t[1:9:3, 2:],
    "columns skipped": lambda t: t[:, ::2],
    "one column": lambda t: t[:, 3:4],
    "flipped": lambda t: t.flip(1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(view, dtype):
    base = draw(12, 10, dtype=dtype)
    x = VIEWS[view](base)
    y = (x + 0.5).contiguous()
    for kind in KINDS:
        with unchanged(base):
            ours = value_and_gradients(x, y, kind=kind)
            turned = value_and_gradients(y, x, kind=kind)
            alone = value_and_gradients(x, None, kind=kind)
        assert_same_bits(ours, value_and_gradients(x.contiguous(), y, kind=kind))
        assert_same_bits(turned, value_and_gradients(y, x.contiguous(), kind=kind))
        assert_same_bits(alone, value_and_gradients(x.contiguous(), None, kind=kind))


def test_strided_rows_are_read_in_place(monkeypatch):
    """Only columns that do not lie side by side cost a copy."""
    seen = []
    original = ddfast.backend.compiled.dense_kernel
    monkeypatch.setattr(
        ddfast.backend.compiled, "dense_kernel", lambda *a: (seen.append(a[0][0]), original(*a))[1]
    )
    base = draw(12, 10)
    for view, copied in (("sliced", False), ("rows expanded", False), ("transposed", True)):
        x = VIEWS[view](base)
        kernel_matrix(x)
        assert (seen[-1] != x.data_ptr()) == copied, view


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(types):
    x, y = draw(7, 40, dtype=types[0]), draw(9, 40, seed=1, dtype=types[1], mean=0.3)
    both = torch.promote_types(*types)
    wide = torch.float64 if both == torch.float64 else torch.float32
    assert [t.dtype for t in value_and_gradients(x, y)] == [wide, *types]
    agree(x, y, 1e-13 if wide == torch.float64 else 2e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_empty_sets(backend):
    x, none = draw(3, 4), draw(0, 4)
    with ddfast.use_backend(backend):
        for kind in KINDS:
            assert [t.shape for t in value_and_gradients(none, None, kind=kind)] == [(0, 0), (0, 4)]
            for a, b in ((none, x), (x, none), (none, none)):
                value, *by = value_and_gradients(a, b, kind=kind)
                assert value.shape == (len(a), len(b))
                for gradient, of in zip(by, (a, b), strict=True):
                    assert_same_bits(gradient, torch.zeros_like(of))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_are_the_same_matrix(level, dtype):
    """Any tiling gives the same bits; gradients add up to the whole one's."""
    x, y = draw(300, 70, dtype=dtype), draw(270, 70, seed=1, dtype=dtype)
    with at_level(level):
        for kind in KINDS:
            whole = kernel_matrix(x, y, kind)
            for rows, columns in ((7, 270), (128, 100), (300, 1)):
                tiles = [
                    torch.cat([kernel_matrix(a, b, kind) for b in y.split(columns)], 1)
                    for a in x[:14].split(rows)
                ]
                assert_same_bits(torch.cat(tiles), whole[:14])
    parts = [value_and_gradients(x, part)[2] for part in y.split(90)]
    assert [p.shape[0] for p in parts] == [90, 90, 90]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("bias_var", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opposite_equal_and_zero_rows(backend, bias_var, dtype):
    x = draw(6, 9, dtype=dtype)
    x[1], x[2], x[3], x[4] = -x[0], x[0], 0, 3 * x[0]
    y = torch.cat([x[:4], draw(2, 9, seed=1, dtype=dtype)])
    for kind, other in itertools.product(KINDS, (y, None)):
        with ddfast.use_backend(backend):
            found = value_and_gradients(x, other, kind=kind, bias_var=bias_var)
        assert all(t.isfinite().all() for t in found)
        value, wanted = found[0], exact(x, other, kind=kind, bias_var=bias_var)[0]
        # An angle next to 0 or pi is known to the root of the rounding.
        limit = {torch.float64: 1e-7, torch.float32: 2e-3}[dtype] * float(wanted.max())
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=limit)
        assert_same_bits(value[0, 2], value[0, 0])
        if other is None:
            assert_same_bits(value, value.mT.contiguous())
        if bias_var == 0:
            assert value[3].abs().max() == 0 and value[:, 3].abs().max() == 0
            with ddfast.use_backend(backend):
                assert abs(float(kernel_matrix(x, None, kind, depth=1, bias_var=0)[0, 1])) < limit


@pytest.mark.parametrize("scale", [1e-14, 1e-9, 1e9, 1e14])
def test_sizes_whose_products_leave_float32(scale):
    """The kernel without a bias is of degree one in each image."""
    x, y = draw(20, 30, dtype=torch.float32), draw(25, 30, seed=1, dtype=torch.float32)
    y[3] = x[4]
    for kind in KINDS:
        plain = value_and_gradients(x, y, kind=kind, bias_var=0.0)
        found = value_and_gradients(x * scale, y * scale, kind=kind, bias_var=0.0)
        for a, b, degree in zip(found, plain, (2, 1, 1), strict=True):
            assert a.isfinite().all()
            scaled = a.double() / scale**degree
            # The pair of equal rows is known to the root of the rounding only.
            rest = torch.ones_like(scaled, dtype=torch.bool)
            rest[4 if degree == 2 else [3, 4]] = False
            limit = 1e-5 * float(b.abs().max())
            torch.testing.assert_close(scaled[rest], b[rest].double(), rtol=0, atol=limit)


def test_halves_whose_norms_overflow():
    """Squared norms beyond 65504 are ordinary numbers in float32."""
    x, y = (draw(8, 2048, seed=s, dtype=torch.float16) * 8 for s in (0, 1))
    agree(x, y, 2e-6)


def test_what_is_not_finite_shows():
    x, y = draw(20, 6, dtype=torch.float32), draw(30, 6, seed=1, dtype=torch.float32)
    good = kernel_matrix(x, y)
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[3, 1] = bad
        for kind in KINDS:
            value = kernel_matrix(spoilt, y, kind)
            assert not value[3].isfinite().any()
            rest = [i for i in range(20) if i != 3]
            assert_same_bits(value[rest], kernel_matrix(x, y, kind)[rest])
            alone = kernel_matrix(spoilt, kind=kind)
            assert not alone[3].isfinite().any() and not alone[:, 3].isfinite().any()
            assert alone[rest][:, rest].isfinite().all()
    assert good.isfinite().all()


def test_offsets_beyond_32_bits():
    """Rows that lie three gigabytes apart in memory that nothing else touches."""
    stride, width = 1_500_000_000, 40
    flat = torch.empty(2 * stride + width, dtype=torch.bfloat16)
    rows = flat.as_strided((3, width), (stride, 1))
    values = draw(3, width, dtype=torch.bfloat16)
    rows.copy_(values)
    y = draw(4, width, seed=1)
    for a, b in ((rows, values), (rows.clone(), values)):
        assert_same_bits(value_and_gradients(a, y), value_and_gradients(b, y))
        assert_same_bits(value_and_gradients(y, a), value_and_gradients(y, b))


PEAK = """
import torch
from ddfast.kernel_matrix import kernel_matrix
from ddfast.memory import peak_resident

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(4000, 64, generator=generator) for _ in range(2))
kernel_matrix(x[:300], y[:300], depth=9)
out = torch.ones(4000, 4000)  # what the result itself takes

before = peak_resident()
del out
assert kernel_matrix(x, y, depth=9).sum().isfinite()
print((peak_resident() - before) / 2**20)
"""


def test_no_matrix_per_layer_is_stored():
    """Nine layers of 4000 x 4000: 61 MiB each, of which next to nothing may be there."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40, done.stdout
