"""Operator `gradient_distance`: schema, shapes, implementations, derivatives up to the second.

The chain is `gradient_distance` -> `gradient_distance_bwd` -> `gradient_distance_bwd_bwd`, and the
last one raises when it is differentiated. All take contiguity, equal shapes and one dtype for
granted or arrange it here; `ddfast.losses.gradient_distance` checks what a user passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.ops.memory import empty_like
from ddfast.ops.registry import TYPES, declare, derivative, end_of_chain
from ddfast.reference import gradient_distance as reference
from ddfast.reference.gradient_distance import METRICS, accumulator, has_rows


def _classes(tensors: Sequence[Tensor], batched: bool) -> int:
    return tensors[0].shape[0] if batched else 1


def _rows_and_length(tensor: Tensor, batched: bool) -> tuple[int, int]:
    """Rows per class and elements per row, a row being all that belongs to one output unit."""
    shape = tensor.shape[int(batched) :]
    rows = shape[0] if shape else 1
    length = 1
    for size in shape[1:]:
        length *= size
    return rows, length


def _call_compiled(
    compiled: Any,
    syn: Sequence[Tensor],
    real: Sequence[Tensor],
    cotangents: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    out_syn: Sequence[Tensor] | None,
    out_real: Sequence[Tensor] | None,
    grad: Tensor | None,
    metric: str,
    eps: float,
    batched: bool,
) -> Tensor:
    """Hand the tensors that the metric counts to the compiled kernel; zero the others' outputs."""
    keep: list[Tensor] = []  # contiguous copies must outlive the call

    def address(tensors: Sequence[Tensor] | None, i: int) -> int:
        if tensors is None:
            return 0
        tensor = tensors[i]
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            keep.append(tensor)
        return tensor.data_ptr()

    u, w = cotangents if cotangents is not None else (None, None)
    layers = []
    for i, tensor in enumerate(syn):
        if metric == "row_cosine" and not has_rows(tensor, batched):
            for out in (out_syn, out_real):
                if out is not None:
                    out[i].zero_()
            continue
        pointers = [address(t, i) for t in (syn, real, u, w, out_syn, out_real)]
        layers.append([*pointers, *_rows_and_length(tensor, batched)])
    values = compiled.gradient_distance(
        layers,
        TYPES[syn[0].dtype],
        METRICS.index(metric),
        _classes(syn, batched),
        eps,
        [] if grad is None else grad.tolist(),
        cotangents is not None,
        torch.get_num_threads(),
    )
    return torch.tensor(values, dtype=accumulator(syn[0].dtype))


# --- the distance, with its gradient with respect to syn if asked for -------------------------


def _reference(
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    value = reference.gradient_distance(syn, real, metric, eps, batched)
    if not with_gradient:
        return value, []
    ones = torch.ones_like(value)
    return value, reference.gradient_distance_bwd(ones, syn, real, metric, eps, batched)[0]


def _cpu(
    compiled: Any,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    out = empty_like(syn) if with_gradient else None
    value = _call_compiled(compiled, syn, real, None, out, None, None, metric, eps, batched)
    return value, out or []


def _cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.gradient_distance(*arguments)


def _fake(
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    value = syn[0].new_empty(_classes(syn, batched), dtype=accumulator(syn[0].dtype))
    return value, [s.new_empty(s.shape) for s in syn] if with_gradient else []


gradient_distance = declare(
    "gradient_distance(Tensor[] syn, Tensor[] real, str metric, float eps, bool batched, "
    "bool with_gradient) -> (Tensor, Tensor[])",
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="gradient_distance",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    syn, real, ctx.metric, ctx.eps, ctx.batched, _ = inputs
    ctx.count = len(syn)
    # The gradient is an intermediate of ours: it has no derivative formula of its own, and whoever
    # differentiates twice goes through gradient_distance_bwd.
    ctx.gradient = output[1]
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*syn, *real)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing, rest = [None] * ctx.count, (None,) * 4
    if grad is None:
        return nothing, nothing, *rest
    saved = ctx.saved_tensors
    syn, real = list(saved[: ctx.count]), list(saved[ctx.count :])
    need_syn, need_real = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    gradient, ctx.gradient = ctx.gradient, []
    if gradient and not need_real and not torch.is_grad_enabled():
        # Handed over once, then forgotten: a second backward recomputes, so nobody else holds it.
        return _scaled(gradient, grad, ctx.batched), nothing, *rest
    out = gradient_distance_bwd(
        grad, syn, real, ctx.metric, ctx.eps, ctx.batched, need_syn, need_real
    )
    by_syn, by_real = out[: ctx.count * need_syn], out[ctx.count * need_syn :]
    return by_syn if need_syn else nothing, by_real if need_real else nothing, *rest


def _scaled(gradient: list[Tensor], grad: Tensor, batched: bool) -> list[Tensor]:
    if torch.compiler.is_compiling() or grad.device.type != "cpu" or type(grad) is not Tensor:
        return [
            v
            * (
                grad.to(v.dtype).reshape(-1, *[1] * (v.dim() - 1))
                if batched
                else grad[0].to(v.dtype)
            )
            for v in gradient
        ]
    factors = grad.tolist()
    if any(factor != 1 for factor in factors):
        for v in gradient:
            for part, factor in zip(v if batched else [v], factors, strict=True):
                part.mul_(factor)
    return gradient


derivative("gradient_distance", _backward, _setup)


# --- first derivative -------------------------------------------------------------------------


def _bwd_reference(
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    need_syn: bool,
    need_real: bool,
) -> list[Tensor]:
    by_syn, by_real = reference.gradient_distance_bwd(grad, syn, real, metric, eps, batched)
    return (by_syn if need_syn else []) + (by_real if need_real else [])


def _bwd_cpu(
    compiled: Any,
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    need_syn: bool,
    need_real: bool,
) -> list[Tensor]:
    out_syn = empty_like(syn) if need_syn else None
    out_real = empty_like(real) if need_real else None
    _call_compiled(compiled, syn, real, None, out_syn, out_real, grad, metric, eps, batched)
    return (out_syn or []) + (out_real or [])


def _bwd_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.gradient_distance_bwd(*arguments)


def _bwd_fake(
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
    need_syn: bool,
    need_real: bool,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in syn * need_syn + real * need_real]


gradient_distance_bwd = declare(
    "gradient_distance_bwd(Tensor grad, Tensor[] syn, Tensor[] real, str metric, float eps, "
    "bool batched, bool need_syn, bool need_real) -> Tensor[]",
    reference=_bwd_reference,
    cpu=_bwd_cpu,
    cuda=_bwd_cuda,
    fake=_bwd_fake,
    kernels="gradient_distance",
)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, syn, real, ctx.metric, ctx.eps, ctx.batched, need_syn, need_real = inputs
    ctx.count, ctx.need_syn, ctx.need_real = len(syn), need_syn, need_real
    ctx.save_for_backward(grad, *syn, *real)


def _bwd_backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    grad, *saved = ctx.saved_tensors
    n = ctx.count
    syn, real = saved[:n], saved[n:]
    given = iter(cotangents)

    def filled(like: list[Tensor], present: bool) -> list[Tensor]:
        parts = [next(given) if present else None for _ in like]
        return [torch.zeros_like(t) if p is None else p for t, p in zip(like, parts, strict=True)]

    u, w = filled(syn, ctx.need_syn), filled(real, ctx.need_real)
    by_grad, *by_tensors = gradient_distance_bwd_bwd(
        u, w, grad, syn, real, ctx.metric, ctx.eps, ctx.batched
    )
    return by_grad, by_tensors[:n], by_tensors[n:], None, None, None, None, None


derivative("gradient_distance_bwd", _bwd_backward, _bwd_setup)


# --- second derivative ------------------------------------------------------------------------


def _bwd_bwd_reference(
    u: list[Tensor],
    w: list[Tensor],
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
) -> list[Tensor]:
    by_grad, by_syn, by_real = reference.gradient_distance_bwd_bwd(
        u, w, grad, syn, real, metric, eps, batched
    )
    return [by_grad, *by_syn, *by_real]


def _bwd_bwd_cpu(
    compiled: Any,
    u: list[Tensor],
    w: list[Tensor],
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
) -> list[Tensor]:
    out_syn, out_real = empty_like(syn), empty_like(real)
    by_grad = _call_compiled(
        compiled, syn, real, (u, w), out_syn, out_real, grad, metric, eps, batched
    )
    return [by_grad, *out_syn, *out_real]


def _bwd_bwd_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.gradient_distance_bwd_bwd(*arguments)


def _bwd_bwd_fake(
    u: list[Tensor],
    w: list[Tensor],
    grad: Tensor,
    syn: list[Tensor],
    real: list[Tensor],
    metric: str,
    eps: float,
    batched: bool,
) -> list[Tensor]:
    return [grad.new_empty(grad.shape), *(t.new_empty(t.shape) for t in [*syn, *real])]


gradient_distance_bwd_bwd = declare(
    "gradient_distance_bwd_bwd(Tensor[] u, Tensor[] w, Tensor grad, Tensor[] syn, Tensor[] real, "
    "str metric, float eps, bool batched) -> Tensor[]",
    reference=_bwd_bwd_reference,
    cpu=_bwd_bwd_cpu,
    cuda=_bwd_bwd_cuda,
    fake=_bwd_bwd_fake,
    kernels="gradient_distance",
)

end_of_chain(
    "gradient_distance_bwd_bwd", "the third derivative of gradient_distance is not implemented"
)
