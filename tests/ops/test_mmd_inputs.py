"""What `mmd` takes: layouts, dtypes, edges, memory, and the errors for everything else."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast import losses
from ddfast.ops import mmd as ops
from ddfast.testing import assert_same_bits, unchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

KERNELS = ["gaussian", "laplace", "m3d_laplace", "linear", "polynomial", "energy"]


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def sets(dtype=torch.float64, classes=2, n=4, m=5, d=3) -> tuple[Tensor, Tensor]:
    return draw(classes, n, d, dtype=dtype), draw(classes, m, d, seed=1, dtype=dtype, mean=0.4)


def value_and_gradients(x: Tensor, y: Tensor, *arguments) -> list[Tensor]:
    """MMD^2 and the gradients of a weighted sum of it."""
    x, y = (t.detach().requires_grad_() for t in (x, y))
    value = losses.mmd(x, y, *arguments)
    weights = torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), (x, y))]


def agree(x: Tensor, y: Tensor, kernel: str, rtol: float) -> None:
    """Value and gradients, each relative to its largest entry, against the reference in float64."""
    with ddfast.use_backend("reference"):
        exact = value_and_gradients(x.double(), y.double(), kernel)
    for ours, wanted in zip(value_and_gradients(x, y, kernel), exact, strict=True):
        info = torch.finfo(ours.dtype)
        limit = max(rtol, 4 * info.eps) * float(wanted.abs().max()) + info.tiny * info.eps
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=limit)


VIEWS = {
    "transposed": lambda t: t.transpose(0, 2),
    "classes inside": lambda t: t.transpose(0, 1),
    "rows expanded": lambda t: t[:, :1].expand(8, 9, 10),
    "classes expanded": lambda t: t[:1].expand(8, 9, 10),
    "all expanded": lambda t: t[:1, :1, :1].expand(8, 9, 10),
    "sliced": lambda t: t[::2, 1:7:3, 2:],
    "columns skipped": lambda t: t[:, :, ::2],
    "one column": lambda t: t[:, :, 3:4],
    "flipped": lambda t: t.flip(2),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(view, dtype):
    base = draw(8, 9, 10, dtype=dtype)
    x = VIEWS[view](base)
    y = (x + 0.5).contiguous()
    for kernel in KERNELS:
        with unchanged(base):
            ours = value_and_gradients(x, y, kernel)
            turned = value_and_gradients(y, x, kernel)
        assert_same_bits(ours, value_and_gradients(x.contiguous(), y, kernel))
        assert_same_bits(turned, value_and_gradients(y, x.contiguous(), kernel))


def test_strided_rows_are_read_in_place(monkeypatch):
    """Only columns that do not lie side by side cost a copy."""
    seen = []
    original = ddfast.backend.compiled.mmd
    monkeypatch.setattr(
        ddfast.backend.compiled, "mmd", lambda *a: (seen.append(a[1][0]), original(*a))[1]
    )
    base = draw(8, 9, 10)
    for view, copied in (("classes inside", False), ("rows expanded", False), ("transposed", True)):
        x = VIEWS[view](base)
        losses.mmd(x, x)
        assert (seen[-1] != x.data_ptr()) == copied, view


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(types):
    x, y = draw(2, 7, 40, dtype=types[0]), draw(2, 9, 40, seed=1, dtype=types[1], mean=0.3)
    ours = value_and_gradients(x, y)
    both = torch.promote_types(*types)
    wide = torch.float64 if both == torch.float64 else torch.float32
    assert [t.dtype for t in ours] == [wide, *types]
    for kernel in KERNELS[:2]:
        agree(x, y, kernel, 1e-5)


def test_leading_dimensions():
    x, y = draw(2, 3, 4, 5), draw(2, 3, 6, 5, seed=1)
    value, by_x, _ = value_and_gradients(x, y)
    assert value.shape == (2, 3) and by_x.shape == x.shape
    for a, b in itertools.product(range(2), range(3)):
        alone = losses.mmd(x[a, b], y[a, b])
        assert alone.shape == () and torch.equal(alone, value[a, b])


def test_offsets_beyond_32_bits():
    """Rows, then classes, that lie three gigabytes apart in memory that nothing else touches."""
    stride, width = 1_500_000_000, 40
    flat = torch.empty(2 * stride + width, dtype=torch.bfloat16)
    rows = flat.as_strided((1, 3, width), (0, stride, 1))
    values = draw(1, 3, width, dtype=torch.bfloat16)
    rows.copy_(values)
    y = draw(1, 4, width, seed=1)
    assert_same_bits(value_and_gradients(rows, y), value_and_gradients(values, y))
    classes, y = rows.transpose(0, 1), y.expand(3, 4, width)
    assert_same_bits(losses.mmd(classes, y), losses.mmd(values.transpose(0, 1), y))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_sets_and_duplicate_rows(backend, kernel, dtype):
    x, _ = sets(dtype, 2, 300, 1, 20)
    eps = torch.finfo(dtype).eps
    with ddfast.use_backend(backend):
        value, *gradients = value_and_gradients(x, x, kernel)
        # What cancels are sums of 300 rows; a polynomial's are in the hundreds.
        size = 1e4 if kernel == "polynomial" else 10.0
        assert value.abs().max() < eps * size
        # Every pair of x, x' meets one of x, y that pulls the other way.
        assert all(g.abs().max() < eps * size for g in gradients)
        # A bandwidth from the rows would depend on their number.
        bandwidth = [30.0, 5.0] if kernel in ("gaussian", "laplace") else None
        same = value_and_gradients(torch.cat([x, x], 1), x + 1, kernel, bandwidth)
        once = value_and_gradients(x, x + 1, kernel, bandwidth)
    torch.testing.assert_close(same[0], once[0], rtol=1e3 * eps, atol=100 * eps)
    torch.testing.assert_close(
        same[1], torch.cat([once[1], once[1]], 1) / 2, rtol=1e3 * eps, atol=1e2 * eps
    )


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "m3d_laplace", "energy"])
@pytest.mark.parametrize("bandwidth", [None, "median"])
def test_all_rows_equal(backend, kernel, bandwidth):
    """A heuristic bandwidth of zero: no discrepancy and no gradient, rather than 0 / 0."""
    if bandwidth and kernel not in ("gaussian", "laplace"):
        bandwidth = None
    x = (draw(2, 1, 33, mean=7.3, dtype=torch.float32)).expand(2, 40, 33)
    with ddfast.use_backend(backend):
        for unbiased in (False, True):
            found = value_and_gradients(x, x[:, :9], kernel, bandwidth, unbiased)
            assert_same_bits(found, [torch.zeros_like(t) for t in found])
        for how in ("mean", "median"):
            assert_same_bits(ops.mmd_bandwidth(x, x, how), torch.zeros(2))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
@pytest.mark.parametrize("bandwidth", [None, "median"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_all_but_equal(backend, kernel, bandwidth, dtype):
    """A heuristic bandwidth next to zero, whose inverse is infinite: as one of zero, not NaN."""
    x, y = sets(dtype)
    smallest = torch.finfo(dtype).tiny ** 0.5

    def scaled(factor: float) -> list[Tensor]:
        rows = (t * (smallest * factor) for t in (x, y))
        return value_and_gradients(*rows, kernel, bandwidth)

    with ddfast.use_backend(backend):
        for scale in (1e-3, 0.03, 1.0, 300.0):
            assert not any(t.any() for t in scaled(scale)), scale  # nor is any of them NaN
        # Far enough from zero, values do not depend on the scale.
        found = scaled(1e5)
        usual = value_and_gradients(x, y, kernel, bandwidth)
    torch.testing.assert_close(found[0], usual[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1] * (smallest * 1e5), usual[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_a_median_of_zero_among_rows_that_differ(backend, kernel):
    """Most pairs are equal: no discrepancy and no gradient, as documented."""
    x, other = draw(1, 1, 5).expand(1, 6, 5), draw(1, 1, 5, seed=1)
    with ddfast.use_backend(backend):
        found = value_and_gradients(x, torch.cat([x[:, :5], other], 1), kernel, "median")
        assert not any(t.any() for t in found)
        mean = value_and_gradients(x, torch.cat([x[:, :5], other], 1), kernel)
    assert mean[0] > 0 and all(t.isfinite().all() for t in mean)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_single_rows(backend, kernel):
    x, y = sets(classes=2, n=1, m=1)
    with ddfast.use_backend(backend):
        found = value_and_gradients(x, y, kernel)
        assert all(t.isfinite().all() for t in found)
        assert (found[0] > 0).all()
        torch.testing.assert_close(found[1], -found[2]) if kernel != "polynomial" else None
        with pytest.raises(ValueError, match="x: got 1 rows, expected at least 2 because unbiased"):
            losses.mmd(x, y.expand(2, 3, 3), kernel, unbiased=True)
        with pytest.raises(ValueError, match="y: got 1 rows, expected at least 2 because unbiased"):
            losses.mmd(x.expand(2, 3, 3), y, kernel, unbiased=True)


def test_no_classes_and_no_columns():
    for kernel in KERNELS:
        none = value_and_gradients(draw(0, 3, 4), draw(0, 2, 4), kernel)
        assert none[0].shape == (0,) and none[1].shape == (0, 3, 4)
        x, y = draw(2, 3, 0), draw(2, 2, 0)
        found = value_and_gradients(x, y, kernel)
        torch.testing.assert_close(found[0], torch.zeros(2, dtype=torch.float64))
        assert found[1].shape == x.shape


def test_halves_whose_distances_overflow():
    """Squared norms beyond 65504 are ordinary numbers in float32."""
    x, y = (t.half() * 8 for t in sets(torch.float32, 1, 8, 9, 2048))
    for kernel in ("gaussian", "energy", "laplace"):
        assert all(t.isfinite().all() for t in value_and_gradients(x, y, kernel))
        agree(x, y, kernel, 1e-5)


def test_what_is_not_finite_shows():
    x, y = sets(torch.float32, n=20, m=20)
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[0, 3, 1] = bad
        for kernel in KERNELS:
            value = losses.mmd(spoilt, y, kernel)
            assert not value[0].isfinite() and value[1].isfinite(), kernel


def test_a_thousand_classes():
    x, y = sets(torch.float32, 1000, 3, 5, 7)
    ours = value_and_gradients(x, y)
    with ddfast.use_backend("reference"):
        expected = value_and_gradients(x, y)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-6)


PEAK = """
import torch
from ddfast import losses
from ddfast.memory import peak_resident

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(10_000, {d}, generator=generator) for _ in range(2))
sets = (x, y) if {both} else (x,)
for each in sets:
    each.requires_grad_()
losses.mmd(x[:300], y[:300], {kernel!r}, {bandwidth!r}, {unbiased}).backward()
for each in sets:
    each.grad = None

def peak():
    return peak_resident() / 2**20

before = peak()
value = losses.mmd(x, y, {kernel!r}, {bandwidth!r}, {unbiased})
value.backward()
print(peak() - before)
assert torch.isfinite(value)
assert all(each.grad.isfinite().all() and each.grad.any() for each in sets)
"""


@pytest.mark.parametrize(
    ("d", "kernel", "bandwidth", "unbiased", "both"),
    [
        (128, "gaussian", None, False, True),
        (128, "gaussian", [1.0, 3.0, 100.0], True, False),
        (128, "polynomial", None, True, False),
        (128, "energy", None, False, False),
        (8, "gaussian", "median", False, False),
        (8, "laplace", None, False, True),
        (8, "m3d_laplace", None, True, False),
        (1024, "linear", None, True, False),
    ],
)
def test_no_matrix_of_pairs_is_stored(d, kernel, bandwidth, unbiased, both):
    """10 000 rows against 10 000: 1.6 GB of distances, of which 64 MiB may be there at once, the
    gradients that are returned included."""
    code = PEAK.format(d=d, kernel=kernel, bandwidth=bandwidth, unbiased=unbiased, both=both)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, done.stdout


# --- errors -------------------------------------------------------------------------------------

three = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0], three), TypeError, "x: got list, expected a tensor"),
        ((three, three.int()), TypeError, "y: got torch.int32, expected a floating dtype"),
        ((torch.ones(3), three), ValueError, r"x: got shape \(3,\), expected \(..., rows, d\)"),
        ((three, torch.ones(2, 0, 4)), ValueError, "y: got 0 rows, expected at least 1"),
        ((three, torch.ones(3, 3, 4)), ValueError, r"y: got shape \(3, 3, 4\), expected that of x"),
        ((three, torch.ones(2, 3, 5)), ValueError, r"y: got shape \(2, 3, 5\), expected that of x"),
        ((three, torch.ones(3, 4)), ValueError, r"y: got shape \(3, 4\), expected that of x"),
        ((three, three.to("meta")), ValueError, "y: on meta, expected cpu, where x is"),
        ((three, three, "rbf"), ValueError, "kernel: got 'rbf', expected one of gaussian, laplace"),
        ((three, three, "energy", 1.0), ValueError, "bandwidth: given, expected None because"),
        ((three, three, "linear", "median"), ValueError, "bandwidth: given, expected None"),
        ((three, three, "gaussian", "mode"), ValueError, "bandwidth: got 'mode', expected None"),
        ((three, three, "gaussian", 0.0), ValueError, "bandwidth: got 0.0, expected positive"),
        ((three, three, "gaussian", [1.0, -2.0]), ValueError, r"bandwidth: got \[1.0, -2.0\]"),
        ((three, three, "laplace", float("nan")), ValueError, "bandwidth: got nan"),
        ((three, three, "laplace", float("inf")), ValueError, "bandwidth: got inf"),
        ((three, three, "gaussian", []), ValueError, r"bandwidth: got \[\], expected positive"),
        ((three, three, "gaussian", torch.zeros(2)), ValueError, "expected positive finite"),
        ((three, three, "gaussian", 1e-40), ValueError, "for torch.float32 at least 2e-31"),
        ((three, three, "laplace", torch.tensor(1e-40)), ValueError, "at least 2e-31"),
        ((three, three.double(), "laplace", 1e-310), ValueError, "for torch.float64 at least 4e-3"),
        ((three, three, "gaussian", torch.ones(3)), ValueError, r"bandwidth: got shape \(3,\)"),
        ((three, three, "gaussian", {}), ValueError, "bandwidth: got {}, expected positive"),
        ((three, three, "gaussian", object()), TypeError, "bandwidth: got <object"),
        ((three, three, "gaussian", ["a"]), TypeError, r"bandwidth: got \['a'\]"),
        ((three, three, "polynomial", None, False, 0), ValueError, "degree: got 0, expected"),
    ],
)
def test_bad_input_is_named(arguments, kind, message):
    for f in (losses.mmd, losses.mmd_and_gradient):
        with pytest.raises(kind, match=message):
            f(*arguments)


def test_a_negative_bandwidth_that_nobody_checked_shows():
    """Under torch.compile the values of a tensor cannot be looked at."""
    x, y = sets()
    bandwidths = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for backend in ("reference", "auto"):
        with ddfast.use_backend(backend):
            value, _ = ops.mmd(x, y, bandwidths, "gaussian", 2, False, False, False)
        assert value[0].isnan() and value[1].isfinite()
