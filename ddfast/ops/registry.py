"""How an operator is declared: schema, one implementation per dispatch key, shapes for tracing.

Declared with `torch.library.Library` rather than `custom_op` (10 to 28 microseconds a call) and
given derivatives with `register_autograd` rather than `autograd.Function` (silently wrong at second
order under torch.compile).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ddfast import backend

library = torch.library.Library("ddfast", "DEF")


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    cpu: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None,
    fake: Callable[..., Any],
) -> Any:
    """Declare one operator and return it.

    Args:
        schema: "name(arguments) -> results", all results new tensors.
        reference: plain torch, answers on every device without an implementation of its own.
        cpu: called as cpu(compiled_module, *arguments); None: the reference.
        cuda: called with the arguments; returns NotImplemented where Triton is missing.
        fake: the results' shapes and dtypes.
    """
    name = schema.split("(")[0]

    def on_cpu(*arguments: Any) -> Any:
        compiled = None if cpu is None or backend.reference_forced() else backend.cpu_kernels()
        if cpu is None or compiled is None:
            return reference(*arguments)
        return cpu(compiled, *arguments)

    def on_cuda(*arguments: Any) -> Any:
        if cuda is None or backend.reference_forced():
            return reference(*arguments)
        results = cuda(*arguments)
        return reference(*arguments) if results is NotImplemented else results

    library.define(schema)
    library.impl(name, on_cpu, "CPU")
    library.impl(name, on_cuda, "CUDA")
    library.impl(name, reference, "CompositeExplicitAutograd")
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
