"""`ddfast.kernel_matrix`: what its arguments mean, and the errors for everything else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ddfast.kernel_matrix import kernel_matrix
from ddfast.kernel_matrix.networks import NETS, PRESETS
from ddfast.reference import conv_kernel as conv_reference
from ddfast.reference import dense_kernel as dense_reference
from ddfast.testing import assert_same_bits, unchanged


def images(n: int, seed: int = 0, dtype=torch.float64, size=(2, 8, 8)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, *size), generator=generator, dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_fully_connected_networks_see_flat_images(kind):
    x, y = images(3), images(4, 1)
    flat = x.reshape(3, -1), y.reshape(4, -1)
    expected = dense_reference.dense_kernel(*flat, kind, 2, 1.5, 0.1)
    found = kernel_matrix(x, y, kind, depth=2, weight_var=1.5, bias_var=0.1)
    close(found, expected)
    assert_same_bits(kernel_matrix(*flat, kind, "fc", 2, True, "flatten", 1.5, 0.1), found)
    # The order of values is that of the indices, not of memory.
    strided = x.to(memory_format=torch.channels_last)
    assert_same_bits(kernel_matrix(strided, y, kind, "fc", 2, True, "flatten", 1.5, 0.1), found)


def test_the_defaults():
    x = images(3)
    expected = dense_reference.dense_kernel(x.flatten(1), None, "ntk", 3, 2.0, 0.01)
    close(kernel_matrix(x), expected)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("readout", ["flatten", "gap"])
@pytest.mark.parametrize("pool", [True, False, [False, True], (True, False)])
def test_convolutional_networks(kind, readout, pool):
    x, y = images(2), images(3, 1)
    pools = [pool] * 2 if isinstance(pool, bool) else list(pool)
    found = kernel_matrix(x, y, kind, "conv", 2, pool, readout, 1.5, 0.1)
    close(found, conv_reference.conv_kernel(x, y, kind, pools, readout, 1.5, 0.1))
    alone = kernel_matrix(x, None, kind, "conv", 2, pool, readout, 1.5, 0.1)
    assert_same_bits(alone, alone.mT.contiguous())
    close(alone, kernel_matrix(x, x.clone(), kind, "conv", 2, pool, readout, 1.5, 0.1))


def test_the_networks_with_names():
    """Their layers, written out a second time."""
    t, f = True, False
    expected = {
        "kip_convnet": ([f, t, t, t], "flatten"),
        "myrtle5": ([f, t, t, f], "gap"),
        "myrtle7": ([f, t, f, t, f, f], "gap"),
        "myrtle10": ([f, f, t, f, f, t, f, f, f], "gap"),
    }
    assert set(NETS) == {"fc", "conv", *expected} and set(PRESETS) == set(expected)
    x = images(2)
    for net, (pools, readout) in expected.items():
        found = kernel_matrix(x, net=net)
        close(found, conv_reference.conv_kernel(x, None, "ntk", pools, readout, 2.0, 0.01))
        assert_same_bits(found, kernel_matrix(x, None, "ntk", "conv", len(pools), pools, readout))


@pytest.mark.parametrize("net", ["fc", "conv"])
def test_gradients_reach_both_sets_and_only_those_that_ask(net):
    x, y = images(2), images(3, 1)
    for wanted in ((True, False), (False, True), (True, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, y), wanted, strict=True)]
        with unchanged(*leaves):
            kernel_matrix(*leaves, net=net).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        for leaf in leaves:
            assert leaf.grad is None or (leaf.grad.shape == leaf.shape and leaf.grad.norm() > 0)
    with torch.no_grad():
        assert not kernel_matrix(x.requires_grad_(), y, net=net).requires_grad


@pytest.mark.parametrize("net", ["fc", "conv", "kip_convnet"])
def test_blocks_are_the_same_matrix(net):
    x, y = images(5), images(4, 1)
    whole = kernel_matrix(x, y, net=net)
    tiles = [[kernel_matrix(a, b, net=net) for b in y.split(3)] for a in x.split(2)]
    close(torch.cat([torch.cat(row, 1) for row in tiles]), whole)
    itself = kernel_matrix(x, net=net)
    close(torch.cat([kernel_matrix(a, x, net=net) for a in x.split(2)]), itself)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("net", ["fc", "conv"])
def test_halves_are_computed_in_float32(dtype, net):
    x, y = images(2, dtype=dtype), images(3, 1, dtype=torch.float16)
    found = kernel_matrix(x.requires_grad_(), y, net=net)
    assert found.dtype == torch.float32
    expected = kernel_matrix(x.detach().double(), y.double(), net=net)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-7)
    found.sum().backward()
    assert x.grad.dtype == dtype
    assert kernel_matrix(x, y.double(), net=net).dtype == torch.float64


@pytest.mark.parametrize("net", ["fc", "conv"])
def test_no_images(net):
    x, none = images(2), images(0)
    assert kernel_matrix(none, net=net).shape == (0, 0)
    assert kernel_matrix(none, x, net=net).shape == (0, 2)
    assert kernel_matrix(x, none, net=net).shape == (2, 0)


def test_whole_numbers_of_other_kinds():
    x = images(2)
    numpy = pytest.importorskip("numpy")
    found = kernel_matrix(x, depth=numpy.int64(2), weight_var=numpy.float32(2), bias_var=1)
    assert_same_bits(found, kernel_matrix(x, depth=2, weight_var=2.0, bias_var=1.0))


def test_ddfast_is_imported_without_it():
    code = "import ddfast, sys; assert 'ddfast.kernel_matrix' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


x = images(2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([1.0],), TypeError, "x: got list, expected a tensor"),
        ((x.byte(),), TypeError, "x: got torch.uint8, expected a floating dtype"),
        ((x, x.int()), TypeError, "y: got torch.int32, expected a floating dtype"),
        ((torch.ones(3),), ValueError, r"x: got shape \(3,\), expected \(n, ...\)"),
        ((torch.ones(3, 0),), ValueError, r"x: got shape \(3, 0\), expected \(n, ...\) with at"),
        (
            (x, images(2, size=(1, 8, 8))),
            ValueError,
            r"y: got images of shape \(1, 8, 8\), expected",
        ),
        ((x, x.flatten(1)), ValueError, r"y: got images of shape \(128,\), expected \(2, 8, 8\)"),
        ((x, x.to("meta")), ValueError, "y: on meta, expected cpu, where x is"),
        ((x, None, "NTK"), ValueError, "kind: got 'NTK', expected one of ntk, nngp"),
        ((x, None, "ntk", "mlp"), ValueError, "net: got 'mlp', expected one of fc, conv, kip_conv"),
        ((x, None, "ntk", "fc", 1.5), TypeError, "depth: got 1.5, expected an integer"),
        ((x, None, "ntk", "fc", True), TypeError, "depth: got True, expected an integer"),
        ((x, None, "ntk", "fc", -1), ValueError, "depth: got -1, expected at least 0 for net='fc'"),
        ((x, None, "ntk", "conv", 0), ValueError, "depth: got 0, expected at least 1 for net='co"),
        ((x, None, "ntk", "conv", 2, 1), TypeError, "pool: got 1, expected a bool or a sequence"),
        ((x, None, "ntk", "conv", 2, [1, 0]), TypeError, r"pool: got \[1, 0\], expected bools"),
        ((x, None, "ntk", "conv", 2, [True]), ValueError, "pool: got 1 bools, expected 2, one for"),
        ((x, None, "ntk", "conv", 2, "no"), TypeError, "pool: got 'no', expected a bool"),
        (
            (x, None, "ntk", "conv", 2, True, "max"),
            ValueError,
            "readout: got 'max', expected one of",
        ),
        (
            (x, None, "ntk", "conv", 4),
            ValueError,
            "x: got images of 8 x 8, expected at least 16 x 1",
        ),
        (
            (x[..., :7], None, "ntk", "kip_convnet"),
            ValueError,
            "x: got images of 8 x 7, expected at",
        ),
        (
            (x[0], None, "ntk", "conv"),
            ValueError,
            r"x: got shape \(2, 8, 8\), expected \(n, channels",
        ),
        (
            (x, None, "ntk", "myrtle5", 4),
            ValueError,
            "net: 'myrtle5' has a depth, pools and a reado",
        ),
        (
            (x, None, "ntk", "kip_convnet", 3, False),
            ValueError,
            "pool=False, readout='flatten', expected the defaults",
        ),
        (
            (x, None, "ntk", "fc", 3, True, "flatten", 0.0),
            ValueError,
            "weight_var: got 0.0, expect",
        ),
        (
            (x, None, "ntk", "fc", 3, True, "flatten", "2"),
            TypeError,
            "weight_var: got '2', expected",
        ),
        (
            (x, None, "ntk", "fc", 3, True, "flatten", 2, -1),
            ValueError,
            "bias_var: got -1, expected",
        ),
        (
            (x, None, "ntk", "fc", 3, True, "flatten", float("inf")),
            ValueError,
            "weight_var: got inf, expected a finite number above 0",
        ),
        (
            (x, None, "ntk", "fc", 3, True, "flatten", 2, float("nan")),
            ValueError,
            "bias_var: got nan, expected a finite number >= 0",
        ),
    ],
)
def test_bad_input_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        kernel_matrix(*arguments)


@pytest.mark.parametrize("net", ["fc", "conv"])
def test_function_transforms_and_forward_mode_are_refused(net):
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda t: kernel_matrix(t, net=net).sum())(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        kernel_matrix(torch.autograd.forward_ad.make_dual(x, x), net=net)
