"""Arc-cosine kernels of order 0 and 1 in Triton: one square root and a polynomial each.

The fits, their errors and what they are of: csrc/arc_cosine_fit.h, which has the same coefficients.
Tiles are float32 or float64; NaN stays.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _angle(t):
    if t.dtype == tl.float32:
        s = 0.000398987147 * t - 0.00067977421
        s = s * t + 0.00112553721
        s = s * t + 0.000428294559
        s = s * t + 0.00263014063
        s = s * t + 0.00842467975
        s = s * t + 0.0375139751
        s = s * t + 0.450158149
    else:
        s = 2.5267725651329922e-06 * t - 1.7517716000287866e-05
        s = s * t + 5.7893580735542584e-05
        s = s * t - 0.00011716626906366432
        s = s * t + 0.00016270748041299319
        s = s * t - 0.0001608053047910788
        s = s * t + 0.00012022277171851647
        s = s * t - 6.149316472347279e-05
        s = s * t + 3.5475120773452974e-05
        s = s * t + 1.2023340147071254e-05
        s = s * t + 5.099676403215657e-05
        s = s * t + 0.00012174567367049324
        s = s * t + 0.0003147543023110617
        s = s * t + 0.0008547898544127654
        s = s * t + 0.0025120434142910267
        s = s * t + 0.008440465461047946
        s = s * t + 0.037513179839907304
        s = s * t + 0.450158158078553
    return s


@triton.jit
def _order1(t):
    if t.dtype == tl.float32:
        s = 7.66560261e-05 * t - 6.21080617e-05
        s = s * t + 0.000242986425
        s = s * t + 0.000524401607
        s = s * t + 0.00241763424
        s = s * t + 0.0150048686
        s = s * t + 0.300105453
    else:
        s = 1.717189636722991e-07 * t - 1.0861246424886327e-06
        s = s * t + 3.3182756600579835e-06
        s = s * t - 6.142705915531243e-06
        s = s * t + 7.841917535545515e-06
        s = s * t - 6.8836126313711015e-06
        s = s * t + 4.931154512073445e-06
        s = s * t - 1.4195523404350082e-06
        s = s * t + 2.9388531910438095e-06
        s = s * t + 5.568630270301937e-06
        s = s * t + 1.6313096658934252e-05
        s = s * t + 4.8413243185579976e-05
        s = s * t + 0.00015541725205185409
        s = s * t + 0.0005582318205718591
        s = s * t + 0.0024115615617388963
        s = s * t + 0.0150052719359453
        s = s * t + 0.3001054387190354
    return s


@triton.jit
def _sine(t):
    if t.dtype == tl.float32:
        s = -0.000458519527 * t + 0.000791466795
        s = s * t - 0.00134835683
        s = s * t - 0.000581169326
        s = s * t - 0.00366391335
        s = s * t - 0.0140471831
        s = s * t - 0.112540603
        s = s * t + 0.450158179
    else:
        s = -2.732814479394695e-06 * t + 1.9087666258325754e-05
        s = s * t - 6.354573539357315e-05
        s = s * t + 0.00012960389560140125
        s = s * t - 0.00018141542300335262
        s = s * t + 0.00018085944560192955
        s = s * t - 0.00013635262769433698
        s = s * t + 7.059424570241177e-05
        s = s * t - 4.071535299516637e-05
        s = s * t - 1.3322551263093969e-05
        s = s * t - 5.88987856582929e-05
        s = s * t - 0.00014387601821272332
        s = s * t - 0.0003846994547328388
        s = s * t - 0.0010990156664147746
        s = s * t - 0.0035168607621800076
        s = s * t - 0.014067442436224377
        s = s * t - 0.11253953951967452
        s = s * t + 0.4501581580785531
    return s


@triton.jit
def part_of(k, p, inverse, same):
    """(p - |k|, that by p, and its square root); zero for pairs of equal rows."""
    gap = p - tl.abs(k)
    gap = tl.where(same | (gap < 0), 0.0, gap)
    t = gap * inverse
    root = tl.sqrt_rn(t) if t.dtype == tl.float32 else tl.sqrt(t)
    return gap, t, root


@triton.jit
def order1_of(k, gap, t, root):
    """p kappa1(k / p)"""
    return tl.where(k < 0, 0.0, k) + gap * (root * _order1(t))


@triton.jit
def order0_of(k, t, root):
    """kappa0(k / p)"""
    a = root * _angle(t)
    return tl.where(k < 0, a, 1.0 - a)


@triton.jit
def slopes_of(p, inverse, t, root):
    """p sqrt(1 - c^2) / pi, and the derivative of kappa0 by k: zero where c = +-1."""
    sine = root * _sine(t)
    below = tl.where(root == 0, 1.0, sine * 9.86960440108935861883)
    return p * sine, tl.where(root == 0, 0.0, inverse / below)
