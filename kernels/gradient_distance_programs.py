"""What one program of `gradient_distance` does with its row or chunk: first and second derivative.

The launches are in gradient_distance.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inverse(x):
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def _load(pointer, offsets, mask, ACC: tl.constexpr):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def first_kernel(
    syn,
    real,
    out_syn,
    out_real,
    scale,  # per class, or anything if not HAS_SCALE
    value,  # (programs,) for rows and elementwise; (programs, 3) sums for cosine
    coefficients,  # (classes, 3) for the cosine's second launch
    share,  # elements per class
    length,  # elements per row or chunk
    per_class,  # programs per class
    METRIC: tl.constexpr,
    PHASE: tl.constexpr,  # cosine only: 0 sums, 1 gradient
    EPS: tl.constexpr,  # a constant, because a float argument arrives as float32
    HAS_SCALE: tl.constexpr,
    HAS_SYN: tl.constexpr,
    HAS_REAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = program // per_class
    begin = (program % per_class) * length
    left = tl.minimum(share - begin, length)
    base = c * share + begin
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    factor = tl.load(scale + c).to(ACC) if HAS_SCALE else 1.0

    if METRIC < 2 and PHASE == 0:
        ab = tl.zeros([BLOCK], ACC)
        aa = tl.zeros([BLOCK], ACC)
        bb = tl.zeros([BLOCK], ACC)
        for start in range(0, left, BLOCK):
            inside = start + lanes < left
            a = _load(real, base + start + lanes, inside, ACC)
            b = _load(syn, base + start + lanes, inside, ACC)
            ab += a * b
            aa += a * a
            bb += b * b
        s = tl.sum(ab, 0)
        mm = tl.sum(aa, 0)
        nn = tl.sum(bb, 0)
        if METRIC == 1:
            tl.store(value + program * 3, s)
            tl.store(value + program * 3 + 1, mm)
            tl.store(value + program * 3 + 2, nn)
        else:
            m = tl.sqrt(mm)
            n = tl.sqrt(nn)
            d = 1.0 / (m * n + EPS)
            tl.store(value + program, 1.0 - s * d)
            cross = -d * factor
            by_b = s * m * d * d * _inverse(n) * factor
            by_a = s * n * d * d * _inverse(m) * factor
    if METRIC == 1 and PHASE == 1:
        cross = tl.load(coefficients + c * 3).to(ACC) * factor
        by_b = tl.load(coefficients + c * 3 + 1).to(ACC) * factor
        by_a = tl.load(coefficients + c * 3 + 2).to(ACC) * factor
    if (HAS_SYN or HAS_REAL) and (METRIC == 0 or (METRIC == 1 and PHASE == 1)):
        for start in range(0, left, BLOCK):
            inside = start + lanes < left
            a = _load(real, base + start + lanes, inside, ACC)
            b = _load(syn, base + start + lanes, inside, ACC)
            if HAS_SYN:
                out = by_b * b + cross * a
                tl.store(out_syn + base + start + lanes, out, mask=inside)
            if HAS_REAL:
                out = by_a * a + cross * b
                tl.store(out_real + base + start + lanes, out, mask=inside)
    if METRIC >= 2:
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, left, BLOCK):
            inside = start + lanes < left
            a = _load(real, base + start + lanes, inside, ACC)
            b = _load(syn, base + start + lanes, inside, ACC)
            e = b - a
            if METRIC == 2:
                total += e * e
                slope = 2.0 * e
            else:
                total += tl.abs(e)
                slope = tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e))
            if HAS_SYN:
                tl.store(out_syn + base + start + lanes, factor * slope, mask=inside)
            if HAS_REAL:
                tl.store(out_real + base + start + lanes, -factor * slope, mask=inside)
        tl.store(value + program, tl.sum(total, 0))


@triton.jit
def _second_coefficients(s, m, n, ua, ub, wb, wa, EPS: tl.constexpr):
    """phi and what a, b, u, w are multiplied by; see ddfast.reference.gradient_distance."""
    d = 1.0 / (m * n + EPS)
    im = _inverse(m)
    i_n = _inverse(n)
    dd = d * d
    mixed = m * ub * i_n + n * wa * im
    phi = -(ua + wb) * d + s * mixed * dd
    by_d = (ua + wb) * dd - 2.0 * s * mixed * dd * d
    by_m = n * by_d + s * (ub * i_n - n * wa * im * im) * dd
    by_n = m * by_d + s * (wa * im - m * ub * i_n * i_n) * dd
    return phi, mixed * dd, s * m * i_n * dd, -d, by_n * i_n, s * n * im * dd, by_m * im


@triton.jit
def second_kernel(
    syn,
    real,
    u,
    w,
    out_syn,
    out_real,
    scale,
    value,  # (programs,) for rows and elementwise; (programs, 7) sums for cosine
    coefficients,  # (classes, 6)
    share,
    length,
    per_class,
    METRIC: tl.constexpr,
    PHASE: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = program // per_class
    begin = (program % per_class) * length
    left = tl.minimum(share - begin, length)
    base = c * share + begin
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    factor = tl.load(scale + c).to(ACC)

    if METRIC < 2 and PHASE == 0:
        ab = tl.zeros([BLOCK], ACC)
        aa = tl.zeros([BLOCK], ACC)
        bb = tl.zeros([BLOCK], ACC)
        ua = tl.zeros([BLOCK], ACC)
        ub = tl.zeros([BLOCK], ACC)
        wb = tl.zeros([BLOCK], ACC)
        wa = tl.zeros([BLOCK], ACC)
        for start in range(0, left, BLOCK):
            inside = start + lanes < left
            x = _load(real, base + start + lanes, inside, ACC)
            y = _load(syn, base + start + lanes, inside, ACC)
            p = _load(u, base + start + lanes, inside, ACC)
            q = _load(w, base + start + lanes, inside, ACC)
            ab += x * y
            aa += x * x
            bb += y * y
            ua += p * x
            ub += p * y
            wb += q * y
            wa += q * x
        if METRIC == 1:
            tl.store(value + program * 7, tl.sum(ab, 0))
            tl.store(value + program * 7 + 1, tl.sum(aa, 0))
            tl.store(value + program * 7 + 2, tl.sum(bb, 0))
            tl.store(value + program * 7 + 3, tl.sum(ua, 0))
            tl.store(value + program * 7 + 4, tl.sum(ub, 0))
            tl.store(value + program * 7 + 5, tl.sum(wb, 0))
            tl.store(value + program * 7 + 6, tl.sum(wa, 0))
        else:
            m = tl.sqrt(tl.sum(aa, 0))
            n = tl.sqrt(tl.sum(bb, 0))
            phi, by_s, to_u, cross, to_b, to_w, to_a = _second_coefficients(
                tl.sum(ab, 0),
                m,
                n,
                tl.sum(ua, 0),
                tl.sum(ub, 0),
                tl.sum(wb, 0),
                tl.sum(wa, 0),
                EPS,
            )
            tl.store(value + program, phi)
    if METRIC == 1 and PHASE == 1:
        by_s = tl.load(coefficients + c * 6).to(ACC)
        to_u = tl.load(coefficients + c * 6 + 1).to(ACC)
        cross = tl.load(coefficients + c * 6 + 2).to(ACC)
        to_b = tl.load(coefficients + c * 6 + 3).to(ACC)
        to_w = tl.load(coefficients + c * 6 + 4).to(ACC)
        to_a = tl.load(coefficients + c * 6 + 5).to(ACC)
    if METRIC == 0 or PHASE == 1:
        for start in range(0, left, BLOCK):
            inside = start + lanes < left
            x = _load(real, base + start + lanes, inside, ACC)
            y = _load(syn, base + start + lanes, inside, ACC)
            p = _load(u, base + start + lanes, inside, ACC)
            q = _load(w, base + start + lanes, inside, ACC)
            by_syn = factor * (by_s * x + to_u * p + cross * q + to_b * y)
            by_real = factor * (by_s * y + cross * p + to_w * q + to_a * x)
            tl.store(out_syn + base + start + lanes, by_syn, mask=inside)
            tl.store(out_real + base + start + lanes, by_real, mask=inside)
    if METRIC >= 2:
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, left, BLOCK):
            inside = start + lanes < left
            x = _load(real, base + start + lanes, inside, ACC)
            y = _load(syn, base + start + lanes, inside, ACC)
            p = _load(u, base + start + lanes, inside, ACC)
            q = _load(w, base + start + lanes, inside, ACC)
            e = y - x
            if METRIC == 2:
                total += 2.0 * e * (p - q)
                out = factor * 2.0 * (p - q)
            else:
                total += tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e)) * (p - q)
                out = tl.zeros([BLOCK], ACC)
            tl.store(out_syn + base + start + lanes, out, mask=inside)
            tl.store(out_real + base + start + lanes, -out, mask=inside)
        tl.store(value + program, tl.sum(total, 0))
