"""Operator `dense_kernel`: schema, shapes, implementations, the first derivative.

NNGP and NTK of fully connected ReLU networks for all pairs of rows. The chain is `dense_kernel` ->
`dense_kernel_bwd`, which raises when it is differentiated. With `keep` the covariances behind the
first layer are returned too, and backward starts from them: all other layers are recomputed from
those. `ddfast.kernel_matrix` checks what a user passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.layout import readable
from ddfast.ops.memory import empty
from ddfast.ops.registry import TYPES, declare, derivative, end_of_chain
from ddfast.reference import dense_kernel as reference
from ddfast.reference.dense_kernel import common_dtype


def _shape(x: Tensor, y: Tensor | None) -> tuple[int, int]:
    return x.shape[0], (x if y is None else y).shape[0]


def _wide(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both sets in the dtype that is computed in."""
    dtype = common_dtype(x, y)
    return x.to(dtype), None if y is None else y.to(dtype)


def _call_compiled(
    compiled: Any,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    gram: Tensor | None = None,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    by_x: Tensor | None = None,
    by_y: Tensor | None = None,
) -> None:
    """Hand both sets to the compiled kernel, which writes `out` and `gram`, or by_x and by_y."""
    # Rows are read where they lie if their columns are side by side.
    x, y = readable(x), None if y is None else readable(y)
    sets = [
        [] if t is None else [t.data_ptr(), TYPES[t.dtype], t.stride(0), t.shape[0]] for t in (x, y)
    ]
    compiled.dense_kernel(
        *sets,
        common_dtype(x, y) == torch.float64,
        x.shape[1],
        kind == "ntk",
        depth,
        weight_var,
        bias_var,
        [0 if t is None else t.data_ptr() for t in (gram, out, grad, by_x, by_y)],
        torch.get_num_threads(),
    )


# --- the kernel ---------------------------------------------------------------------------------


def _reference(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    wide = _wide(x, y)
    kernel = reference.dense_kernel(*wide, kind, depth, weight_var, bias_var)
    # The definition's own backward begins from the rows: there is nothing to keep.
    kept = _shape(x, y) if keep else (0, 0)
    return kernel, torch.zeros((), dtype=kernel.dtype, device=x.device).expand(kept).clone()


def _cpu(
    compiled: Any,
    x: Tensor,
    y: Tensor | None,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    n, m = _shape(x, y)
    dtype = common_dtype(x, y)
    out = empty(n * m, dtype).view(n, m)
    gram = empty(n * m, dtype).view(n, m) if keep else out.new_empty(0, 0)
    if out.numel():
        kept = gram if keep else None
        _call_compiled(compiled, x, y, kind, depth, weight_var, bias_var, kept, out)
    return out, gram


def _cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.dense_kernel(*arguments)


def _fake(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    shape, dtype = _shape(x, y), common_dtype(x, y)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if keep else (0, 0), dtype=dtype)


dense_kernel = declare(
    "dense_kernel(Tensor x, Tensor? y, str kind, int depth, float weight_var, float bias_var, "
    "bool keep) -> (Tensor kernel, Tensor gram)",
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    kernels="dense_kernel",
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, *ctx.network, ctx.kept = inputs
    # The covariances are an intermediate of ours, without a derivative of their own.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    rest = (None,) * 5
    need_x, need_y = ctx.needs_input_grad[:2]
    if grad is None or not (need_x or need_y):
        return None, None, *rest
    x, y, gram = ctx.saved_tensors
    if not ctx.kept:
        with torch.no_grad():
            gram = dense_kernel(x, y, *ctx.network, True)[1]
    found = dense_kernel_bwd(grad, x, y, gram, *ctx.network, need_x, need_y)
    by_x = found[0].to(x.dtype) if need_x else None
    by_y = found[-1].to(y.dtype) if need_y else None
    return by_x, by_y, *rest


derivative("dense_kernel", _backward, _setup)


# --- first derivative ---------------------------------------------------------------------------


def _bwd_reference(
    grad: Tensor, x: Tensor, y: Tensor | None, gram: Tensor, *arguments: Any
) -> list[Tensor]:
    wide = _wide(x, y)
    return reference.dense_kernel_bwd(grad.to(wide[0].dtype), *wide, *arguments)


def _bwd_cpu(
    compiled: Any,
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    gram: Tensor,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    dtype = common_dtype(x, y)
    if grad.numel() == 0:
        return [torch.zeros_like(t) for t in _bwd_like(x, y, need_x, need_y)]
    out = [empty(t.numel(), dtype).view(t.shape) for t in _needed(x, y, need_x, need_y)]
    by_x, by_y = out[0] if need_x else None, out[-1] if need_y else None
    grad, gram = grad.to(dtype).contiguous(), gram.contiguous()
    _call_compiled(compiled, x, y, kind, depth, weight_var, bias_var, gram, None, grad, by_x, by_y)
    return out


def _bwd_cuda(kernels: Any, *arguments: Any) -> Any:
    return kernels.dense_kernel_bwd(*arguments)


def _needed(x: Tensor, y: Tensor | None, need_x: bool, need_y: bool) -> list[Tensor]:
    return [t for t, need in ((x, need_x), (y, need_y)) if need and t is not None]


def _bwd_like(x: Tensor, y: Tensor | None, need_x: bool, need_y: bool) -> list[Tensor]:
    dtype = common_dtype(x, y)
    return [t.new_empty(t.shape, dtype=dtype) for t in _needed(x, y, need_x, need_y)]


def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    gram: Tensor,
    kind: str,
    depth: int,
    weight_var: float,
    bias_var: float,
    need_x: bool,
    need_y: bool,
) -> list[Tensor]:
    return _bwd_like(x, y, need_x, need_y)


dense_kernel_bwd = declare(
    "dense_kernel_bwd(Tensor grad, Tensor x, Tensor? y, Tensor gram, str kind, int depth, "
    "float weight_var, float bias_var, bool need_x, bool need_y) -> Tensor[]",
    reference=_bwd_reference,
    cpu=_bwd_cpu,
    cuda=_bwd_cuda,
    fake=_bwd_fake,
    kernels="dense_kernel",
)
end_of_chain("dense_kernel_bwd", "the second derivative of dense_kernel is not implemented")
