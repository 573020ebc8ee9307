"""Gates of `first_block`: the first block of a network, its convolution recomputed backwards."""

from __future__ import annotations

import pytest
import torch

from ddfast.ops import first_block as ops
from ddfast.reference import first_block as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
    unchanged,
)

# images, channels, outputs, (H, W), kernel, padding, groups, activation, pool
CASES = {
    "ConvNet": (5, 3, 32, (16, 16), 3, 1, 32, "relu", "average"),
    "grey, padded": (3, 1, 8, (28, 28), 3, 3, 8, "swish", "average"),
    "no norm, odd": (4, 3, 7, (9, 7), 3, 1, 0, "leaky_relu", "max"),
    "group norm, no pool": (2, 4, 12, (6, 6), 3, 1, 3, "sigmoid", "none"),
    "5x5 kernel": (2, 2, 20, (8, 10), 5, 2, 20, "relu", "max"),
    "slabs of many images": (70, 3, 16, (8, 8), 3, 1, 16, "relu", "average"),
    "many channels": (3, 6, 16, (8, 8), 3, 1, 16, "relu", "average"),
    "no images": (0, 3, 16, (8, 8), 3, 1, 16, "relu", "average"),
}


def inputs(case: str, dtype: torch.dtype = torch.float64):
    """The tensors of a case, its settings, a gradient of its result, and counts of classes."""
    n, channels, outputs, size, kernel, padding, groups, activation, pool = CASES[case]
    random = torch.Generator().manual_seed(n + outputs)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    x = draw(n, channels, *size).contiguous(memory_format=torch.channels_last)
    weight, bias = draw(outputs, channels, kernel, kernel), draw(outputs)
    affine = (draw(outputs), draw(outputs)) if groups else (None, None)
    tall, wide = (side + 2 * padding - kernel + 1 for side in size)
    if pool != "none":
        tall, wide = tall // 2, wide // 2
    grad = draw(n, outputs, tall, wide)
    counts = [1, 0, n - 1] if n else [0, 0]
    return (x, weight, bias, *affine), (padding, groups, activation, pool), grad, counts


def both(module, case, dtype=torch.float64, wide=False, layout=lambda t: t):
    """Forward, then backward from the reference's statistics, so that only one step differs."""
    tensors, (padding, groups, *rest), grad, counts = inputs(case, dtype)
    if wide:
        tensors, grad = [None if t is None else t.double() for t in tensors], grad.double()
    tensors = [layout(tensors[0]), *tensors[1:]]
    forward = module.first_block(*tensors, padding, groups, 1e-5, *rest)
    statistics = reference.first_block(*tensors, padding, groups, 1e-5, *rest)[1:]
    backward = module.first_block_bwd(
        layout(grad), *tensors, *statistics, counts, padding, groups, *rest
    )
    # A bias in front of a norm of its own channel has gradient 0, of which rounding is left.
    return [*forward, *(t for i, t in enumerate(backward) if i != 1 or groups != grad.shape[1])]


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype, level):
    with at_level(level):
        ours = both(ops, case, dtype)
    eager, exact = both(reference, case, dtype), both(reference, case, dtype, wide=True)
    # In float64 the reference is its own truth: only the order of its sums differs.
    assert_within_budget(ours, eager, exact, tiny=4 if dtype == torch.float32 else 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_composed(dtype):
    ours, eager = both(ops, "ConvNet", dtype), both(reference, "ConvNet", dtype)
    assert_within_budget(ours, eager, both(reference, "ConvNet", dtype, wide=True), factor=3.0)


@pytest.mark.parametrize(
    "layout",
    [
        torch.Tensor.contiguous,
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t, t])[::2] * 0 + t,
        lambda t: t.repeat(1, 1, 1, 2)[..., : t.shape[3]],
    ],
)
def test_any_layout_of_images_and_gradient(layout):
    expected = both(reference, "ConvNet", torch.float64)
    tensors, *_ = inputs("ConvNet")
    with unchanged(*tensors):
        found = both(ops, "ConvNet", torch.float64, layout=layout)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["ConvNet", "slabs of many images", "no norm, odd"])
def test_same_bits_for_any_threads(case):
    assert_same_bits_for_any_threads(lambda: both(ops, case, torch.float32))


def test_classes_are_the_batch_cut_into_pieces():
    (x, *rest), (padding, *settings), grad, _ = inputs("slabs of many images")
    counts = [33, 1, 0, 36]
    _, mean, rstd = ops.first_block(x, *rest, padding, settings[0], 1e-5, *settings[1:])
    whole = ops.first_block_bwd(grad, x, *rest, mean, rstd, counts, padding, *settings)[0]
    for c, parts in enumerate(zip(*(t.split(counts) for t in (grad, x, mean, rstd)), strict=True)):
        g, images, m, r = parts
        one = ops.first_block_bwd(g, images, *rest, m, r, [counts[c]], padding, *settings)[0]
        assert_same_bits(one[0], whole[c])
    assert not whole[2].any()


@pytest.mark.parametrize("case", ["group norm, no pool", "no norm, odd"])
def test_first_derivative(case):
    (x, *parameters), (padding, groups, *rest), _, _ = inputs(case)

    def block(*given):
        iterator = iter(given)
        tensors = [None if p is None else next(iterator) for p in parameters]
        return ops.first_block(x, *tensors, padding, groups, 1e-5, *rest)[0]

    leaves = [p.requires_grad_() for p in parameters if p is not None]
    check_derivatives(block, leaves, order=1)


def test_what_has_no_derivative_is_refused():
    (x, *parameters), (padding, groups, *rest), _, _ = inputs("ConvNet")
    settings = (padding, groups, 1e-5, *rest)
    parameters[0].requires_grad_()
    out, mean, _ = ops.first_block(x, *parameters, *settings)
    assert not mean.requires_grad
    (by_weight,) = torch.autograd.grad(out.sum(), parameters[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of first_block"):
        torch.autograd.grad(by_weight.sum(), parameters[0])
    x.requires_grad_()
    out, _, _ = ops.first_block(x, *parameters, *settings)
    with pytest.raises(NotImplementedError, match="no gradient with respect to the images"):
        torch.autograd.grad(out.sum(), x)


def test_opcheck():
    tensors, (padding, groups, *rest), grad, counts = inputs("ConvNet", torch.float32)
    settings = (padding, groups, 1e-5, *rest)
    tensors[1].requires_grad_()
    torch.library.opcheck(ops.first_block, (*tensors, *settings))
    _, *statistics = ops.first_block(*tensors, *settings)
    torch.library.opcheck(
        ops.first_block_bwd,
        (grad, *(t.detach() for t in tensors), *statistics, counts, padding, groups, *rest),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    (x, *parameters), (padding, groups, *rest), _, _ = inputs("ConvNet", torch.float32)
    leaves = [p.requires_grad_() for p in parameters]

    def f(*given):
        return ops.first_block(x, *given, padding, groups, 1e-5, *rest)[0].square().sum()

    expected = torch.autograd.grad(f(*leaves), leaves)
    compiled = torch.compile(f, backend=compiler, fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_wrong_is_named():
    (x, weight, *rest), (padding, groups, *more), _, _ = inputs("ConvNet")
    with pytest.raises(ValueError, match="weight"):
        ops.first_block(x, weight[:, :2], *rest, padding, groups, 1e-5, *more)
    with pytest.raises(TypeError, match=r"weight: got torch\.float32"):
        ops.first_block(x, weight.float(), *rest, padding, groups, 1e-5, *more)
    with pytest.raises(ValueError, match="padding: got -1"):
        ops.first_block(x, weight, *rest, -1, groups, 1e-5, *more)
