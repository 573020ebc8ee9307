"""How an operator is declared: schema, one implementation per dispatch key, shapes for tracing.

Declared with `torch.library.Library` rather than `custom_op` (10 to 28 microseconds a call) and
given derivatives with `register_autograd` rather than `autograd.Function` (silently wrong at second
order under torch.compile).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddfast import backend

library = torch.library.Library("ddfast", "DEF")

#: Element types as the compiled kernels number them (csrc/cpu/kernels.h).
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments, lists included."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def refuse_forward_mode(name: str, arguments: Iterable[Any]) -> None:
    """Raise where a tensor carries a tangent: `register_autograd` would drop it silently."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors_in(arguments):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"ddfast::{name} has no forward-mode derivative. Use the plain PyTorch definition "
                "in ddfast.reference, which has one."
            )


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise under torch.func, whose jvp would get zeros and whose vmap a loop.

    Raises:
        NotImplementedError: a tensor belongs to a torch.func transform.
    """
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise NotImplementedError(
            "ddfast's operators do not run under torch.func (grad, jvp, vmap, ...). Use the plain "
            "PyTorch definitions in ddfast.reference there, or torch.autograd here."
        )


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None,
    fake: Callable[..., Any],
    kernels: str = "",
) -> Any:
    """Declare one operator and return it.

    Args:
        schema: "name(arguments) -> results", all results new tensors.
        reference: plain torch, answers on every device without an implementation of its own.
        cpu: called as cpu(compiled_module, *arguments); None: the reference.
        cuda: called as cuda(triton_kernels, *arguments); None: the reference.
        fake: the results' shapes and dtypes.
        kernels: the module of ddfast.kernels that `cuda` is called with.
    """
    name = schema.split("(")[0]

    def on_cpu(*arguments: Any) -> Any:
        refuse_forward_mode(name, arguments)
        compiled = None if cpu is None or backend.reference_forced() else backend.cpu_kernels()
        if cpu is None or compiled is None:
            return reference(*arguments)
        return cpu(compiled, *arguments)

    def on_cuda(*arguments: Any) -> Any:
        refuse_forward_mode(name, arguments)
        triton = None
        if cuda is not None and not backend.reference_forced():
            triton = backend.triton_kernels(kernels)
        if cuda is None or triton is None:
            return reference(*arguments)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(next(tensors_in(arguments)).device):
            return cuda(triton, *arguments)

    def elsewhere(*arguments: Any) -> Any:
        refuse_forward_mode(name, arguments)
        return reference(*arguments)

    library.define(schema)
    library.impl(name, on_cpu, "CPU")
    library.impl(name, on_cuda, "CUDA")
    library.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ddfast::{name}", fake, lib=library)
    return getattr(torch.ops.ddfast, name).default


def derivative(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Give operator `name` its derivative."""
    torch.library.register_autograd(
        f"ddfast::{name}", backward, setup_context=setup_context, lib=library
    )


def end_of_chain(name: str, order: str) -> None:
    """Make differentiating operator `name` an error instead of a silent zero."""

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(
            f"ddfast::{name}: {order}. Use the plain PyTorch definition in ddfast.reference, which "
            "has every order of derivative."
        )

    derivative(name, refuse)
