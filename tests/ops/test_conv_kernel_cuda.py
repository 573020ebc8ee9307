"""`conv_kernel` in CUDA C++: its arithmetic on the host, what nvcc makes of it, and on a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddfast.ops import conv_kernel as ops
from ddfast.reference import conv_kernel as reference
from ddfast.reference import conv_kernel_bwd as reference_bwd

ROOT = Path(__file__).resolve().parents[2]
VARIANCES = 2.0, 0.01

NETWORKS = [  # size, channels, pools, readout
    ((8, 8), 3, (True, True, True), "flatten"),
    ((8, 8), 1, (True, True), "gap"),
    ((7, 9), 2, (True, True), "flatten"),
    ((6, 6), 3, (False, True, True), "flatten"),
    ((5, 7), 1, (False, False), "gap"),
    ((8, 8), 2, (False, True, False), "gap"),
    ((9, 5), 2, (False, False, True, False, False), "gap"),
    ((4, 4), 2, (False, False, False), "flatten"),
    ((14, 14), 1, (True, True), "flatten"),
    ((5, 6), 2, (), "flatten"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """The GPU's kernels compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "kernel.so"
    source = ROOT / "tests" / "ops" / "conv_kernel_on_host.cpp"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def deviations(images: Tensor, pools) -> Tensor:
    """As kernels/conv_kernel.py makes them."""
    found = reference.variances(images.double(), pools, *VARIANCES)
    flat = [layer.reshape(len(images), -1) for layer in found]
    return torch.cat([images.new_zeros(len(images), 0), *flat], 1).sqrt().float().contiguous()


def on_host(host, x, y, kind, pools, readout, grad=None, threads=64, off=1.0):
    """The kernel and, with `grad`, the gradient by x of its images and tables."""
    (n, channels, height, width), m = x.shape, len(x if y is None else y)
    other = x if y is None else y
    network = (ctypes.c_bool * max(1, len(pools)))(*pools)
    starts = (ctypes.c_int * 24)()
    shape = channels, height, width, network, len(pools)
    size = host.table_of(*shape, readout == "gap", starts)
    assert size == sum(v[0].numel() for v in reference.variances(x, pools, *VARIANCES))
    out, by_x = torch.zeros(n, m), torch.zeros(n, size + x[0].numel())
    tables = off * deviations(x, pools), off * deviations(other, pools)
    grad = None if grad is None else grad.contiguous()
    host.kernel_on_host(
        *shape, kind == "ntk", readout == "gap", *map(ctypes.c_float, VARIANCES),
        address(x), address(other), *map(address, tables), n, m, y is None, threads,
        address(out), address(grad), address(by_x),
    )  # fmt: skip
    return out, by_x[:, size:].reshape(x.shape), by_x[:, :size]


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(("size", "channels", "pools", "readout"), NETWORKS)
def test_the_arithmetic_of_the_gpu_on_the_host(host, size, channels, pools, readout, kind):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=random)
    y = torch.randn(3, channels, *size, generator=random)
    grad = torch.randn(2, 3, generator=random)
    network = kind, pools, readout, *VARIANCES
    out, by_image, by_table = on_host(host, x, y, kind, pools, readout, grad)
    expected = reference.conv_kernel(x.double(), y.double(), *network)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)

    wide = x.double()
    layers, start, gradient = [], 0, by_image.double()
    for variance in reference.variances(wide, pools, *VARIANCES):
        stop = start + variance[0].numel()
        layers.append(by_table[:, start:stop].double().reshape(variance.shape))
        start = stop
    if pools:
        gradient = gradient + reference_bwd.variances_bwd(layers, wide, pools, *VARIANCES)
    wanted, _ = reference_bwd.conv_kernel_bwd(
        grad.double(), wide, y.double(), *network, True, False
    )
    close = 1e-6 * float(wanted.abs().max())
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=close)


@pytest.mark.parametrize("readout", ["flatten", "gap"])
def test_images_with_themselves_are_exactly_parallel(host, readout):
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    x[2, :, :4] = 0
    pools = True, True
    for kind in ("ntk", "nngp"):
        out, _, _ = on_host(host, x, None, kind, pools, readout)
        expected = reference.conv_kernel(x.double(), None, kind, pools, readout, *VARIANCES)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)


def test_an_image_with_itself_does_not_ask_its_variances(host):
    """Its positions are parallel to themselves; without pools there are no other pairs."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    exact, off = (
        on_host(host, x, None, "ntk", (False, False), "flatten", off=off)[0] for off in (1.0, 1.001)
    )
    assert torch.equal(exact.diagonal(), off.diagonal())
    assert exact[0, 1] != off[0, 1]


def test_the_number_of_groups_changes_nothing(host):
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 8, 8, generator=random) for _ in range(2))
    first, second = (
        on_host(host, x, y, "ntk", (True,) * 3, "flatten", threads=threads)[0]
        for threads in (8, 128)
    )
    assert torch.equal(first, second)


def test_what_nvcc_makes_of_it(tmp_path):
    """No spilled registers, and a pair of 32x32 images twice into the shared memory of an H100."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = ROOT / "csrc" / "cuda" / "conv_kernel.cu"
    said = subprocess.run(
        [
            nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas=-v", "-cubin", str(source),
            "-o", str(tmp_path / "kernel.cubin"),
        ],
        check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert spills == [("0", "0")] * 2
    assert len(registers) == 2 and max(registers) <= 128  # 512 threads of 65536 registers
    state = 4 * 2 * (49 * 256 + 9 * 64 + 16)  # bytes: K and T of the planes of three levels
    assert 2 * state < 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(("size", "channels", "pools", "readout"), NETWORKS)
def test_on_a_gpu(size, channels, pools, readout, kind):
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, channels, *size, generator=random) for n in (3, 5))
    network = kind, pools, readout, *VARIANCES
    for second in (y, None):
        grad = torch.randn(3, 3 if second is None else 5, generator=random)
        wide = x.double(), None if second is None else second.double()
        narrow = x.cuda(), None if second is None else second.cuda()
        expected = reference.conv_kernel(*wide, *network)
        found = ops.conv_kernel(*narrow, *network)
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-6, atol=0)
        wanted = reference_bwd.conv_kernel_bwd(grad.double(), *wide, *network, True, True)
        gradients = ops.conv_kernel_bwd(grad.cuda(), *narrow, *network, True, True)
        for got, want in zip(gradients, wanted, strict=True):
            if want.numel():
                close = 1e-6 * float(want.abs().max())
                torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=close)
