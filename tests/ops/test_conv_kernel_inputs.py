"""What `conv_kernel` takes: layouts, dtypes, edges, memory, and the errors for everything else."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast.ops import conv_kernel as ops
from ddfast.reference import conv_kernel as reference
from ddfast.testing import assert_same_bits, poisoned, unchanged

NETWORK = ("ntk", [True, False], "flatten", 2.0, 0.01)


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradients(x: Tensor, y: Tensor | None, *network) -> list[Tensor]:
    """The matrix, and the gradients of a random combination of its entries."""
    leaves = [t.detach().requires_grad_() for t in (x, y) if t is not None]
    matrix = ops.conv_kernel(leaves[0], None if y is None else leaves[1], *network)
    weights = draw(*matrix.shape, seed=9).to(matrix.dtype)
    return [matrix.detach(), *torch.autograd.grad(matrix, leaves, weights)]


VIEWS = {
    "transposed": lambda t: t.transpose(2, 3),
    "channels last": lambda t: t.permute(0, 3, 1, 2),
    "images inside": lambda t: t.transpose(0, 1),
    "images expanded": lambda t: t[:1].expand(5, 4, 6, 6),
    "pixels expanded": lambda t: t[:, :, :1, :1].expand(6, 4, 6, 6),
    "sliced": lambda t: t[::2, 1:3, 1:6, ::2],
    "flipped": lambda t: t.flip(3),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts(view, dtype):
    base = draw(6, 4, 6, 6, dtype=dtype)
    x = VIEWS[view](base)
    y = (x + 0.5).contiguous()
    for a, b in ((x, y), (y, x), (x, None)):
        with unchanged(base, y):
            ours = value_and_gradients(a, b, *NETWORK)
        same = [None if t is None else t.contiguous() for t in (a, b)]
        assert_same_bits(ours, value_and_gradients(*same, *NETWORK))


@pytest.mark.parametrize("types", itertools.product([torch.float64, torch.float32], repeat=2))
def test_mixed_dtypes(types):
    x, y = draw(2, 2, 6, 6, dtype=types[0]), draw(3, 2, 6, 6, seed=1, dtype=types[1])
    ours = value_and_gradients(x, y, *NETWORK)
    wide = torch.promote_types(*types)
    assert [t.dtype for t in ours] == [wide, *types]
    exact = value_and_gradients(x.to(wide), y.to(wide), *NETWORK)
    assert_same_bits(ours, [a.to(t.dtype) for a, t in zip(exact, ours, strict=True)])


def test_halves_are_computed_in_single_precision():
    x, y = draw(2, 2, 6, 6, dtype=torch.bfloat16), draw(3, 2, 6, 6, seed=1, dtype=torch.float16)
    ours = value_and_gradients(x, y, *NETWORK)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.float16]
    exact = value_and_gradients(x.float(), y.float(), *NETWORK)
    assert_same_bits(ours, [a.to(t.dtype) for a, t in zip(exact, ours, strict=True)])


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_of_any_subset(needs):
    x, y = draw(3, 2, 6, 6), draw(20, 2, 6, 6, seed=1)
    expected = value_and_gradients(x, y, *NETWORK)
    leaves = [t.clone().requires_grad_(n) for t, n in zip((x, y), needs, strict=True)]
    matrix = ops.conv_kernel(*leaves, *NETWORK)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(matrix, wanted, draw(*matrix.shape, seed=9))
    assert_same_bits(found, [g for g, need in zip(expected[1:], needs, strict=True) if need])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_images_and_single_images(backend, dtype):
    x, none = draw(3, 2, 6, 6, dtype=dtype), draw(0, 2, 6, 6, dtype=dtype)
    with ddfast.use_backend(backend):
        for a, b in ((x, none), (none, x), (none, None), (x[:1], x[2:]), (x[:1], None)):
            matrix, *gradients = value_and_gradients(a, b, *NETWORK)
            assert matrix.shape == (len(a), len(a if b is None else b))
            for gradient, t in zip(gradients, (a, b), strict=False):
                assert gradient.shape == t.shape
                assert (gradient == 0).all() or matrix.numel() > 0


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_no_layers_is_a_product(kind):
    x, y = draw(3, 2, 6, 6), draw(4, 2, 6, 6, seed=1)
    found = ops.conv_kernel(x, y, kind, [], "flatten", 1.5, 0.1)
    torch.testing.assert_close(found, 1.5 / 72 * x.flatten(1) @ y.flatten(1).mT + 0.1)
    assert [t.shape for t in value_and_gradients(x, None, kind, [], "gap", 1.5, 0.1)][1] == x.shape


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("readout", ["flatten", "gap"])
@pytest.mark.parametrize("bias_var", [0.0, 0.01])
def test_equal_opposite_and_empty_images(backend, dtype, readout, bias_var):
    """Where patches are parallel or zero, angles have no derivative: none made up, none NaN."""
    x = draw(6, 2, 8, 8, dtype=dtype)
    x[2], x[3], x[4] = x[0], -x[1], 0.0
    x[5, :, 3:] = 0.0  # half an image without anything
    kinds = ["ntk", "nngp"]
    for kind in kinds:
        network = (kind, [True, False, True], readout, 2.0, bias_var)
        with ddfast.use_backend(backend):
            found = [value_and_gradients(a, b, *network) for a, b in ((x, None), (x, x.clone()))]
        with ddfast.use_backend("reference"):
            wide = x.double()
            exact = [value_and_gradients(a, b, *network) for a, b in ((wide, None), (wide, wide))]
        limit = 1e-12 if dtype == torch.float64 else 2e-6
        for ours, wanted in zip(found, exact, strict=True):
            for a, b in zip(ours, wanted, strict=True):
                assert a.isfinite().all()
                assert float((a.double() - b).abs().max()) <= limit * float(b.abs().max())
    # The diagonal is exact: half of the angles' measure, and S = K / 2.
    assert torch.equal(found[0][0][0, 0], found[0][0][0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_backgrounds(dtype):
    """As of digits: many patches of one image equal many of another, at every offset."""
    x, y = torch.full((4, 1, 14, 14), -0.42), torch.full((3, 1, 14, 14), -0.42)
    x[:, :, 4:10, 5:9] = draw(4, 1, 6, 4).float()
    y[:, :, 5:9, 3:10] = draw(3, 1, 4, 7, seed=1).float()
    for readout in ("flatten", "gap"):
        network = ("ntk", [True, True], readout, 2.0, 0.01)
        ours = value_and_gradients(x.to(dtype), y.to(dtype), *network)
        with ddfast.use_backend("reference"):
            exact = value_and_gradients(x.double(), y.double(), *network)
            eager = value_and_gradients(x.to(dtype), y.to(dtype), *network)
        for a, b, c in zip(ours, exact, eager, strict=True):
            # In float64 the exact result is no more exact than ours.
            tiny = (64 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
            allowed = 2 * float((c.double() - b).abs().max()) + tiny * float(b.abs().max())
            assert float((a.double() - b).abs().max()) <= allowed


def test_what_is_not_finite_shows():
    for bad, dtype in itertools.product(
        (float("nan"), float("inf")), (torch.float32, torch.float64)
    ):
        x, y = draw(3, 2, 6, 6, dtype=dtype), draw(20, 2, 6, 6, seed=1, dtype=dtype)
        y[17, 1, 2, 3] = bad
        for kind in ("ntk", "nngp"):
            matrix = ops.conv_kernel(x, y, kind, *NETWORK[1:])
            assert not matrix[:, 17].isfinite().any()
            assert matrix[:, :17].isfinite().all() and matrix[:, 18:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_beyond_the_images_is_read(dtype):
    for n, m in ((1, 1), (3, 17), (5, 16)):
        x = poisoned((n, 3, 7, 5), dtype, "cpu")
        y = poisoned((m, 3, 7, 5), dtype, "cpu")
        for a, b in ((x, y), (y, None)):
            assert all(t.isfinite().all() for t in value_and_gradients(a, b, *NETWORK))


def test_large_and_small_images_scale():
    """Without biases the kernel is homogeneous; float32 leaves room for 2^+-40."""
    x, y = draw(2, 2, 6, 6, dtype=torch.float32), draw(3, 2, 6, 6, seed=1, dtype=torch.float32)
    for kind in ("ntk", "nngp"):
        network = (kind, [True, False], "gap", 2.0, 0.0)
        plain = value_and_gradients(x, y, *network)
        for power in (-40, 40):
            scaled = value_and_gradients(x * 2.0**power, y, *network)
            expected = [plain[0] * 2.0**power, plain[1], plain[2] * 2.0**power]
            torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)


PEAK = """
import torch
from ddfast.memory import peak_resident
from ddfast.ops.conv_kernel import conv_kernel

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(count, 3, {size}, {size}, generator=generator) for count in ({n}, {m}))
network = ("ntk", {pools}, {readout!r}, 2.0, 0.01)

def run(a, b):
    matrix = conv_kernel(a.requires_grad_(), b.requires_grad_(), *network)
    return torch.autograd.grad(matrix.sum(), (a, b))

run(x[:1, :, :16, :16].detach(), y[:1, :, :16, :16].detach())
before = peak_resident()
run(x, y)
print((peak_resident() - before) / 2**20)
"""


@pytest.mark.parametrize(
    ("size", "pools", "readout", "n", "m"),
    [
        (32, [True, True, True], "flatten", 2, 16),
        (32, [False, True, True, True], "flatten", 1, 16),
        (32, [True, True, True], "gap", 1, 2),
        (16, [True, True, True], "flatten", 16, 160),
    ],
)
def test_little_memory_whatever_the_number_of_pairs(size, pools, readout, n, m):
    """Less than 10 MiB a thread, where the position pairs of one pair of images alone take 8."""
    code = PEAK.format(size=size, pools=pools, readout=readout, n=n, m=m)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    images = 4 * 3 * size * size * (n + m) * 4 / 2**20  # gradients, and what is kept per image
    assert float(done.stdout) < 10 + images, done.stdout


def test_the_reference_keeps_to_its_budget():
    code = """
import torch
from ddfast.memory import peak_resident
from ddfast.reference import conv_kernel as reference
from ddfast.reference.conv_kernel_bwd import conv_kernel_bwd

torch.set_num_threads(1)
reference.BUDGET = 32 << 20
generator = torch.Generator().manual_seed(0)
x = torch.randn(24, 3, 12, 12, generator=generator)
network = ("ntk", [True, True], "flatten", 2.0, 0.01)
small = x[:, :, :4, :4]
conv_kernel_bwd(reference.conv_kernel(small, None, *network), small, None, *network, True, False)
before = peak_resident()
conv_kernel_bwd(reference.conv_kernel(x, None, *network), x, None, *network, True, False)
print((peak_resident() - before) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, done.stdout  # all pairs at once would take 0.5 GB


def test_blocks_of_the_reference():
    x, y = draw(5, 2, 4, 4), draw(7, 2, 4, 4, seed=1)
    whole = reference.conv_kernel(x, y, *NETWORK)
    budget = reference.BUDGET
    try:
        for pairs in (1, 3, 10):
            reference.BUDGET = pairs * reference.TEMPORARIES * 8 * 256
            torch.testing.assert_close(reference.conv_kernel(x, y, *NETWORK), whole)
            own = reference.conv_kernel(x, None, *NETWORK)
            assert torch.equal(own, own.mT)
            torch.testing.assert_close(own, reference.conv_kernel(x, x, *NETWORK))
    finally:
        reference.BUDGET = budget


# --- errors -------------------------------------------------------------------------------------

images = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"x": images.int()}, TypeError, "x: got torch.int32, expected a floating dtype"),
        ({"y": images.int()}, TypeError, "y: got torch.int32, expected a floating dtype"),
        ({"x": images[0]}, ValueError, r"x: got shape \(3, 4, 4\), expected \(n, C, H, W\)"),
        ({"y": images[:, :0]}, ValueError, r"y: got shape \(2, 0, 4, 4\), expected \(n, C"),
        (
            {"y": images[..., 1:]},
            ValueError,
            r"y: got images of shape \(3, 4, 3\), expected",
        ),
        ({"y": images.to("meta")}, ValueError, "y: on meta, expected cpu, where x is"),
        ({"kind": "rbf"}, ValueError, "kind: got 'rbf', expected one of nngp, ntk"),
        ({"readout": "max"}, ValueError, "readout: got 'max', expected one of flatten, gap"),
        ({"pools": [True] * 3}, ValueError, "pools: got a pool after layer 2, where images of"),
        ({"weight_var": -1.0}, ValueError, "weight_var: got -1.0, expected a finite number"),
        ({"weight_var": float("inf")}, ValueError, "weight_var: got inf, expected a finite number"),
        ({"bias_var": float("nan")}, ValueError, "bias_var: got nan, expected a finite number"),
    ],
)
def test_bad_input_is_named(changed, kind, message, backend):
    given = {"x": images, "y": images, "kind": "ntk", "pools": [True], "readout": "flatten"}
    given |= {"weight_var": 2.0, "bias_var": 0.01} | changed
    if changed.get("y") is not None and changed["y"].device.type == "meta":
        return  # the dispatcher takes meta tensors to the shapes, which say the same
    with ddfast.use_backend(backend), pytest.raises(kind, match=message):
        ops.conv_kernel(*given.values())
    with ddfast.use_backend(backend), pytest.raises(kind, match=message):
        ops.conv_kernel_bwd(torch.ones(2, 2), *given.values(), True, True)


def test_a_cotangent_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"grad: got shape \(2, 3\), expected \(2, 2\)"):
        ops.conv_kernel_bwd(torch.ones(2, 3), images, None, *NETWORK, True, False)
