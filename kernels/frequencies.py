"""Random frequencies inside a Triton kernel, as ddfast/reference/frequencies.py defines them.

Any of them can be drawn on its own, where it is needed: they never lie in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logarithm(x):
    """ln x of float32 in (0, 1), to a few units in the last place near 1 too."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = -0.07859583 * f + 0.12881632
    p = p * f - 0.13128757
    p = p * f + 0.14181194
    p = p * f - 0.16624554
    p = p * f + 0.20002286
    p = p * f - 0.2500081
    p = p * f + 0.33333316
    e = exponent.to(tl.float32)
    return e * 0.693145751953 + (f + (f * f * (f * p - 0.5) + e * 1.42860682e-6))


@triton.jit
def _normal_pair(first, second, scale):
    """Two normal values from two random words."""
    u = ((first >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608)
    radius = scale * tl.sqrt_rn(-2.0 * _logarithm(u))
    # Quarter turns and what is left of one, both exact; the angle left is at most pi/4.
    quarters = ((second >> 9).to(tl.int32).to(tl.float32) + 0.5) * (4.0 / 8388608)
    turns = tl.floor(quarters + 0.5)
    r = (quarters - turns) * 1.57079633
    z = r * r
    sine = r + r * z * ((-1.9510838e-4 * z + 8.332131e-3) * z - 0.16666654)
    cosine = z * z * ((2.4431203e-5 * z - 1.3887306e-3) * z + 0.041666646) + (1.0 - 0.5 * z)
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    s = tl.where((quarter & 2) == 2, -s, s)
    return radius * c, radius * s


@triton.jit
def drawn_words(m, feature, seed, stream, FREQUENCIES: tl.constexpr):
    """Random words of 64 features from `feature` on, each (FREQUENCIES, 16)."""
    block = (feature // 4 + tl.arange(0, 16)).to(tl.int32)
    zero = tl.zeros([FREQUENCIES, 16], tl.int32)
    return tl.philox(
        seed,
        (block[None, :] + zero).to(tl.uint32, bitcast=True),
        (m.to(tl.int32)[:, None] + zero).to(tl.uint32, bitcast=True),
        (stream.to(tl.int32) + zero).to(tl.uint32, bitcast=True),
        zero.to(tl.uint32, bitcast=True),
    )


@triton.jit
def drawn(m, feature, seed, stream, scale, FREQUENCIES: tl.constexpr):
    """Frequencies m, 64 features from `feature` on in four pieces of 16."""
    a, b, c, d = drawn_words(m, feature, seed, stream, FREQUENCIES)
    a, b = _normal_pair(a, b, scale)
    c, d = _normal_pair(c, d, scale)
    return a, b, c, d
