"""Operator `krr`: schema, shapes, implementations, derivative.

Kernel ridge regression with one factorisation and a closed-form derivative, so that no step
differentiates a factorisation. The work is LAPACK's (cuSOLVER's on CUDA) through torch.linalg on
every device; there is no kernel of our own. The chain is `krr` -> `krr_bwd`, and the last one
raises when it is differentiated. `ddfast.losses` checks what a user passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops.registry import declare, derivative, end_of_chain
from ddfast.reference import krr as reference


def _fake(
    k_ss: Tensor, k_ts: Tensor, y_s: Tensor, reg: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, columns = y_s.shape
    return (
        k_ts.new_empty(k_ts.shape[0], columns, dtype=dtype),
        y_s.new_empty(n, columns, dtype=dtype),
        k_ss.new_empty(n + 1, n * dtype.itemsize, dtype=torch.uint8),
        torch.empty((), dtype=torch.int64, device="cpu"),
    )


krr = declare(
    "krr(Tensor k_ss, Tensor k_ts, Tensor y_s, float reg, ScalarType dtype) -> "
    "(Tensor prediction, Tensor alpha, Tensor packed, Tensor how)",
    reference=reference.krr,
    cpu=None,
    cuda=None,
    fake=_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k_ss, k_ts, y_s, ctx.reg, _ = inputs
    ctx.dtypes = k_ss.dtype, k_ts.dtype, y_s.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(k_ts, *output[1:])


def _backward(
    ctx: Any, by_prediction: Tensor | None, by_alpha: Tensor | None, *_: None
) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = krr_bwd(by_prediction, by_alpha, *ctx.saved_tensors, ctx.reg, needed)
    return (
        *(
            gradient.to(dtype) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, needed, strict=True)
        ),
        None,
        None,
    )


derivative("krr", _backward, _setup)


def _bwd_fake(
    by_prediction: Tensor | None,
    by_alpha: Tensor | None,
    k_ts: Tensor,
    alpha: Tensor,
    packed: Tensor,
    how: Tensor,
    reg: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n = alpha.shape[0]
    return (
        alpha.new_empty(n, n) if needed[0] else alpha.new_empty(0),
        k_ts.new_empty(k_ts.shape) if needed[1] else alpha.new_empty(0),
        alpha.new_empty(alpha.shape) if needed[2] else alpha.new_empty(0),
    )


krr_bwd = declare(
    "krr_bwd(Tensor? by_prediction, Tensor? by_alpha, Tensor k_ts, Tensor alpha, Tensor packed, "
    "Tensor how, float reg, bool[] needed) -> (Tensor by_k_ss, Tensor by_k_ts, Tensor by_y_s)",
    reference=reference.krr_bwd,
    cpu=None,
    cuda=None,
    fake=_bwd_fake,
)

end_of_chain("krr_bwd", "kernel ridge regression has first derivatives only")
