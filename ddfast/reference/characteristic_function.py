"""The definition of `characteristic_function` and of NCFM's distance, in plain torch.

Source: Wang et al., Dataset Distillation with Neural Characteristic Function, CVPR 2025, eq. 7 and
8. With the empirical characteristic function of the rows x_i at frequency t_m

    phi_x(m) = mean over i of exp(j <t_m, x_i>)         the mean first, then the modulus

the distance is the mean over the frequencies of

    sqrt(alpha (|phi_x| - |phi_y|)^2 + beta max(2 (|phi_x| |phi_y| - Re Re - Im Im), 1e-12))

and the published loss 300 times that. The first term compares amplitudes and the second one phases:
together they are |phi_x - phi_y|^2, so with alpha = beta the radicand is alpha |phi_x - phi_y|^2
where nothing is clamped.

Features are (classes, rows, width), frequencies (classes or 1, count, width), or drawn as
ddfast/reference/frequencies.py says. Characteristic functions are (..., count, 2): real and
imaginary parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.reference.frequencies import frequencies
from ddfast.reference.gradient_distance import accumulator

#: Below this the phase term is constant: its root has a derivative that grows without bound.
FLOOR = 1e-12


def wide_dtype(x: Tensor, t: Tensor | None) -> torch.dtype:
    """Of sums and results: float64 if either is, else float32."""
    return accumulator(x.dtype if t is None else torch.promote_types(x.dtype, t.dtype))


def frequencies_of(
    x: Tensor, t: Tensor | None, count: int, seed: int, scale: float, stream: int
) -> Tensor:
    """t in the dtype of the sums, drawn where it is None."""
    dtype = wide_dtype(x, t)
    if t is not None:
        return t.to(dtype)
    return frequencies(count, x.shape[2], seed, scale, stream, x.shape[0], dtype, x.device)


def characteristic_function(
    x: Tensor,
    t: Tensor | None,
    count: int = 0,
    seed: int = 0,
    scale: float = 1.0,
    stream: int = 0,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean of exp(j <t, x>) over the rows, (classes, count, 2), and the products <x, t>.

    May be differentiated any number of times.

    Args:
        x: (classes, rows, width).
        t: (classes, count, width), or (1, count, width) for all classes; None: drawn.
        count, seed, scale, stream: of drawn frequencies.
        keep: whether the products, (classes, rows, count), are wanted; else an empty tensor.
    """
    t = frequencies_of(x, t, count, seed, scale, stream)
    phase = x.to(t.dtype) @ t.mT
    phi = torch.stack([phase.cos().mean(1), phase.sin().mean(1)], -1)
    return phi, phase.clone() if keep else phase.new_empty(0)


def characteristic_function_bwd(
    grad: Tensor,
    x: Tensor,
    t: Tensor | None,
    phase: Tensor,
    count: int,
    seed: int,
    scale: float,
    stream: int,
    by_x: bool,
    by_t: bool,
) -> tuple[Tensor, Tensor]:
    """The first derivative, for a gradient (classes, count, 2): by x and by t, empty if not wanted.

    With W_im = (Im g_m cos - Re g_m sin) / rows: W t, and W transposed times x, which is summed
    over the classes where they share t.
    """
    shared = t is not None and t.shape[0] == 1
    wide = frequencies_of(x, t, count, seed, scale, stream)
    if phase.numel() == 0:
        phase = x.to(wide.dtype) @ wide.mT
    share = (grad / x.shape[1]).unsqueeze(1)
    weights = share[..., 1] * phase.cos() - share[..., 0] * phase.sin()
    empty = weights.new_empty(0)
    grad_t = weights.mT @ x.to(wide.dtype) if by_t else empty
    if by_t and shared:
        grad_t = grad_t.sum(0, keepdim=True)
    return (
        (weights @ wide).to(x.dtype) if by_x else empty.to(x.dtype),
        grad_t.to(t.dtype) if t is not None else empty,
    )


def _safe(x: Tensor, inside: Tensor) -> Tensor:
    """x, and 1 outside, so that what is computed there is finite and so is its derivative."""
    return torch.where(inside, x, torch.ones_like(x))


def _modulus(z: Tensor) -> Tensor:
    """|z|, with derivative 0 at 0."""
    square = (z * z).sum(-1)
    inside = square > 0
    return torch.where(inside, _safe(square, inside).sqrt(), torch.zeros_like(square))


def _terms(phi_x: Tensor, phi_y: Tensor) -> tuple[Tensor, Tensor]:
    """|phi_x| - |phi_y|, and 2 (|phi_x| |phi_y| - Re Re - Im Im) before it is clamped.

    Written like this they cancel where the two are close, which is where training ends. So they are
    computed from the difference, of which every digit is known:

        |a| - |b| = <a - b, a + b> / (|a| + |b|)
        |a| |b| - <a, b> = (a x b)^2 / (|a| |b| + <a, b>)        with a x b = a x (b - a)

    the latter where <a, b> is positive; elsewhere nothing cancels.
    """
    difference = phi_y - phi_x
    modulus_x, modulus_y = _modulus(phi_x), _modulus(phi_y)
    total = modulus_x + modulus_y
    inside = total > 0
    amplitude = -(difference * (phi_x + phi_y)).sum(-1) / _safe(total, inside)
    product = modulus_x * modulus_y
    dot = (phi_x * phi_y).sum(-1)
    cross = phi_x[..., 0] * difference[..., 1] - phi_x[..., 1] * difference[..., 0]
    positive = (dot > 0) & (product > 0)
    near = cross * cross / _safe(product + dot, positive)
    return amplitude, 2 * torch.where(positive, near, product - dot)


def distance(phi_x: Tensor, phi_y: Tensor, alpha: float, beta: float) -> Tensor:
    """The distance of two characteristic functions, (..., count, 2) each: (...).

    Where a modulus or the whole radicand is 0, its derivative is taken as 0.
    """
    amplitude, phase = _terms(phi_x, phi_y)
    # Not clamp, whose derivative is 1 at the floor itself.
    phase = torch.where(phase > FLOOR, phase, torch.full_like(phase, FLOOR))
    radicand = alpha * amplitude * amplitude + beta * phase
    inside = radicand > 0
    root = _safe(radicand, inside).sqrt()
    return torch.where(inside, root, torch.zeros_like(root)).mean(-1)


def distance_and_gradient(
    phi_x: Tensor, phi_y: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The distance and its derivative by phi_x in closed form, outside autograd.

    The phase term is |a - b|^2 - (|a| - |b|)^2, whose derivative by a is twice a - b less the
    difference of the moduli in the direction of a.
    """
    amplitude, phase = _terms(phi_x, phi_y)
    active = phase > FLOOR
    root = (alpha * amplitude * amplitude + beta * phase.clamp_min(FLOOR)).sqrt()
    modulus = _modulus(phi_x)
    direction = phi_x / _safe(modulus, modulus > 0).unsqueeze(-1)
    radial = amplitude.unsqueeze(-1) * direction
    by_phase = torch.where(active.unsqueeze(-1), phi_x - phi_y - radial, torch.zeros_like(radial))
    scale = 1 / _safe(root, root > 0) / max(1, root.shape[-1])
    return root.mean(-1), (alpha * radial + beta * by_phase) * scale.unsqueeze(-1)
