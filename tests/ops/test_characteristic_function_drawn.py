"""Frequencies that are drawn inside the kernel: the generator, its values, their statistics."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ddfast
from ddfast import losses
from ddfast.losses import Frequencies
from ddfast.ops import characteristic_function as ops
from ddfast.reference import frequencies as reference
from ddfast.testing import assert_same_bits, at_level, levels

WORD = reference.WORD


def hexadecimal(words) -> list[str]:
    return [f"{int(word):08x}" for word in words]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # From the known answers that the generator's authors publish (Random123, kat_vectors).
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_philox(counter, key, expected):
    words = reference.philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert hexadecimal(words) == expected.split()


def values_of_kernel(count, width, seed, scale, stream, classes, dtype):
    """What the kernel draws, read from what it computes: the gradient of a zero row, feature by
    feature, is the imaginary cotangent times the frequency."""
    x = torch.zeros(classes, 1, width, dtype=dtype)
    rows = []
    for m in range(count):
        grad = torch.zeros(classes, count, 2, dtype=dtype)
        grad[:, m, 1] = 1
        none = torch.empty(0, dtype=dtype)
        numbers = (count, seed, scale, stream)
        by_x, _ = ops.characteristic_function_bwd(grad, x, None, none, *numbers, True, False)
        rows.append(by_x)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 15, 64, 70, 300])
def test_the_kernel_draws_what_the_reference_draws(dtype, width):
    arguments = (5, width, 2**62 + 12345, 0.7, 9, 2)
    exact = reference.frequencies(*arguments, torch.float64)
    expected = reference.frequencies(*arguments, dtype)
    torch.testing.assert_close(expected.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for level in levels():
        with at_level(level):
            found = values_of_kernel(*arguments, dtype).double()
        # A few units in the last place of each value, however small it is.
        assert ((found - exact).abs() <= 6 * torch.finfo(dtype).eps * exact.abs()).all(), level


@pytest.mark.parametrize("level", levels())
def test_values_at_the_ends_of_the_uniform_numbers(level):
    """A hundred thousand values: some of them among the largest and smallest there are."""
    arguments = (40, 2500, 7, 1.0, 0, 1)
    exact = reference.frequencies(*arguments, torch.float64)
    with at_level(level):
        found = values_of_kernel(*arguments, torch.float32).double()
    assert float(exact.abs().max()) > 4 and float(exact.abs().min()) < 1e-4
    assert ((found - exact).abs() <= 6 * 2**-23 * exact.abs()).all()


@pytest.mark.parametrize("level", levels())
def test_forward_and_backward_draw_the_same(level):
    """Both against given frequencies, which are those of the reference in the same dtype."""
    x, y = torch.randn(2, 2, 9, 300, generator=torch.Generator().manual_seed(0)).double()
    drawn = Frequencies(count=270, seed=2**33 + 1, scale=0.1, stream=5)
    t = reference.frequencies(270, 300, 2**33 + 1, 0.1, 5, 2, torch.float64)
    with at_level(level):
        found = losses.characteristic_function_distance_and_gradient(x, y, drawn)
        given = losses.characteristic_function_distance_and_gradient(x, y, t)
    torch.testing.assert_close(found, given, rtol=1e-10, atol=1e-14)


def test_the_reference_backend_draws_the_same():
    x = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(0))
    y, drawn = x.flip(1) * 2, Frequencies(30, 4, 0.3)
    found = losses.characteristic_function_distance_and_gradient(x, y, drawn)
    with ddfast.use_backend("reference"):
        expected = losses.characteristic_function_distance_and_gradient(x, y, drawn)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_part_of_the_classes_has_the_frequencies_it_has_among_all():
    x = torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(0))
    whole = losses.characteristic_function(x, Frequencies(30, 4))
    parts = [
        losses.characteristic_function(x[c : c + 1], Frequencies(30, 4, 1.0, c)) for c in range(3)
    ]
    assert_same_bits(whole, torch.cat(parts))
    assert_same_bits(whole, losses.characteristic_function(x, Frequencies(30, 4)))


def test_seed_stream_and_scale_matter():
    x = torch.ones(1, 20)
    base = losses.characteristic_function(x, Frequencies(30, 4))
    for other in (
        Frequencies(30, 5),
        Frequencies(30, 4 + 2**32),
        Frequencies(30, 4, 1.0, 1),
        Frequencies(30, 4, 0.5),
    ):
        assert (losses.characteristic_function(x, other) - base).abs().max() > 0.1
    # More frequencies, or more features, begin with the same ones.
    more = losses.characteristic_function(x, Frequencies(50, 4))
    torch.testing.assert_close(more[:30], base)
    still = losses.characteristic_function(x, Frequencies(30, 4, 0.0))
    assert torch.equal(still, torch.tensor([1.0, 0.0]).expand(30, 2))


def test_statistics():
    """Mean, variance, skewness and kurtosis of a normal distribution; nothing correlates."""
    t = reference.frequencies(200, 640, 2026, 1.0, 0, 8, torch.float64)
    count = t.numel()
    assert abs(float(t.mean())) < 4 / count**0.5
    assert abs(float(t.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((t**3).mean())) < 4 * (15 / count) ** 0.5
    assert abs(float((t**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    inside = float((t.abs() < 1).double().mean())
    assert abs(inside - 0.6826894921) < 4 * (0.2166 / count) ** 0.5
    # Every feature, frequency and class by itself has the variance, too.
    for axes in ((0, 1), (1, 2), (0, 2)):
        size = count / t.var(axes).numel()
        assert float((t.var(axes) - 1).abs().max()) < 6 * (2 / size) ** 0.5
    pairs = {
        "classes": (t[:-1], t[1:]),
        "frequencies": (t[:, :-1], t[:, 1:]),
        "features": (t[..., :-1], t[..., 1:]),
        "pairs": (t[..., :-16], t[..., 16:]),
        "words": (t[..., :-32], t[..., 32:]),
        "groups": (t[..., :-64], t[..., 64:]),
        "squares of pairs": (t[..., :-16] ** 2 - 1, t[..., 16:] ** 2 - 1),
    }
    for name, (a, b) in pairs.items():
        scale = float((a.var() * b.var()).sqrt())
        assert abs(float((a * b).mean())) < 4 * scale / a.numel() ** 0.5, name
    assert len(reference.words(3, 64, 5, 0, 2, "cpu").unique()) == 3 * 64 * 2


PEAK = """
import torch
from ddfast import losses
from ddfast.losses import Frequencies
from ddfast.memory import peak_resident

torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
x, y = (torch.randn(rows, 2048, generator=random) / 45 for rows in (4, 30))
x.requires_grad_()

def once(count):
    value = losses.characteristic_function_distance(x, y, Frequencies(count, seed=1))
    value.backward()
    by_hand = losses.characteristic_function_distance_and_gradient(x, y, Frequencies(count, seed=1))
    torch.testing.assert_close(by_hand[0], value.detach())
    assert x.grad.isfinite().all() and x.grad.any()

once(100)
before = peak_resident()
once(1 << 16)
print((peak_resident() - before) / 2**20)
"""


def test_frequencies_are_never_stored():
    """65536 of them for 2048 features would be 512 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, done.stdout
