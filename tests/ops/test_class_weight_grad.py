"""Gates of `class_conv`, `class_input_grad` and `class_weight_grad`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import ddfast
from ddfast.ops import class_weight_grad as ops
from ddfast.reference import class_weight_grad as reference
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    levels,
)

BACKENDS = ["reference", "auto"]


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(counts, inputs, outputs, size, kernel, padding, dtype=torch.float64, last=False):
    """x, weight and grad that fit together."""
    planes = [n + 2 * padding - k + 1 for n, k in zip(size, kernel, strict=True)]
    x = draw(sum(counts), inputs, *size, seed=1, dtype=dtype)
    weight = draw(len(counts), outputs, inputs, *kernel, seed=2, dtype=dtype)
    grad = draw(sum(counts), outputs, *planes, seed=3, dtype=dtype)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x, weight, grad


def everything(x, weight, grad, counts, padding, algorithm="auto"):
    """The three products."""
    return [
        ops.class_conv(x, weight, counts, padding, algorithm),
        ops.class_input_grad(grad, weight, counts, x.shape[2:], padding, algorithm),
        ops.class_weight_grad(x, grad, counts, weight.shape[3:], padding, algorithm),
    ]


# --- the definition -----------------------------------------------------------------------------


def literal(x, weight, grad, counts, padding):
    """The three products pixel by pixel, in Python floats."""
    n_class = [c for c, n in enumerate(counts) for _ in range(n)]
    (inputs, height, width), (outputs, kh, kw) = x.shape[1:], weight.shape[1:2] + weight.shape[3:]
    out = torch.zeros_like(grad)
    by_x, by_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for n, o, i, y, z, a, b in itertools.product(
        *map(range, (len(x), outputs, inputs, *grad.shape[2:], kh, kw))
    ):
        row, column, c = y + a - padding, z + b - padding, n_class[n]
        if 0 <= row < height and 0 <= column < width:
            out[n, o, y, z] += x[n, i, row, column] * weight[c, o, i, a, b]
            by_x[n, i, row, column] += grad[n, o, y, z] * weight[c, o, i, a, b]
            by_weight[c, o, i, a, b] += grad[n, o, y, z] * x[n, i, row, column]
    return [out, by_x, by_weight]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [((3, 4), (3, 3), 1), ((4, 3), (2, 3), 0), ((2, 3), (1, 2), 2), ((1, 1), (3, 3), 1)],
)
def test_the_formula(backend, size, kernel, padding):
    counts = [1, 0, 2]
    x, weight, grad = problem(counts, 2, 3, size, kernel, padding)
    with ddfast.use_backend(backend):
        found = everything(x, weight, grad, counts, padding)
    expected = literal(x, weight, grad, counts, padding)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formula_of_linear_layers(backend):
    counts = [2, 0, 3]
    x, weight, grad = draw(5, 20, seed=1), draw(3, 18, 20, seed=2), draw(5, 18, seed=3)
    with ddfast.use_backend(backend):
        found = everything(x, weight, grad, counts, 0)
    of = torch.tensor([0, 0, 2, 2, 2])
    outer = grad[:, :, None] * x[:, None, :]
    expected = [
        torch.einsum("ni,noi->no", x, weight[of]),
        torch.einsum("no,noi->ni", grad, weight[of]),
        torch.zeros_like(weight).index_add(0, of, outer),
    ]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_the_three_are_one_trilinear_form(algorithm):
    counts = [3, 1]
    x, weight, grad = problem(counts, 5, 7, (8, 4), (3, 3), 1)
    out, by_x, by_weight = everything(x, weight, grad, counts, 1, algorithm)
    values = [(out * grad).sum(), (by_x * x).sum(), (by_weight * weight).sum()]
    torch.testing.assert_close(values[1:], [values[0]] * 2, rtol=1e-12, atol=0)


def test_one_class_is_a_plain_convolution():
    x, weight, grad = problem([6], 20, 24, (9, 7), (3, 3), 1, dtype=torch.float32)
    leaf, kernel = x.clone().requires_grad_(), weight[0].clone().requires_grad_()
    out = torch.nn.functional.conv2d(leaf, kernel, padding=1)
    expected = [out.detach(), *torch.autograd.grad(out, (leaf, kernel), grad)]
    found = everything(x, weight, grad, [6], 1)
    found[2] = found[2][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- derivatives --------------------------------------------------------------------------------

FORMS = {
    "direct": ([1, 0, 2], 2, 3, (3, 4), (3, 2), 1, "direct"),
    "winograd": ([1, 2], 1, 2, (4, 4), (3, 3), 1, "winograd"),
}


@pytest.mark.uses_global_random_state  # gradcheck does
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("product", ["conv", "input_grad", "weight_grad"])
def test_gradcheck_to_third_order(backend, form, product):
    counts, *shape, algorithm = FORMS[form]
    padding = shape[-1]
    x, weight, grad = problem(counts, *shape)
    f, inputs = {
        "conv": (lambda a, b: ops.class_conv(a, b, counts, padding, algorithm), (x, weight)),
        "input_grad": (
            lambda a, b: ops.class_input_grad(a, b, counts, x.shape[2:], padding, algorithm),
            (grad, weight),
        ),
        "weight_grad": (
            lambda a, b: ops.class_weight_grad(a, b, counts, weight.shape[3:], padding, algorithm),
            (x, grad),
        ),
    }[product]
    inputs = tuple(t.requires_grad_() for t in inputs)

    def first(a, b):
        return torch.autograd.grad((f(a, b) ** 2).sum(), (a, b), create_graph=True)

    with ddfast.use_backend(backend):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)
        # First derivatives are functions of their own: their second ones are the third here.
        assert torch.autograd.gradgradcheck(first, inputs, fast_mode=True)


@pytest.mark.uses_global_random_state  # gradcheck does
def test_gradcheck_entry_by_entry():
    counts = [1, 1]
    x, weight, _ = problem(counts, 2, 1, (2, 3), (3, 3), 1)
    linear = draw(2, 3, seed=4).requires_grad_(), draw(2, 2, 3, seed=5).requires_grad_()
    for inputs, padding in (((x.requires_grad_(), weight.requires_grad_()), 1), (linear, 0)):
        check_derivatives(lambda a, b, p=padding: ops.class_conv(a, b, counts, p, "auto"), inputs)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_any_subset_may_require_a_gradient(wanted):
    counts = [2, 1]
    x, weight, grad = problem(counts, 3, 4, (4, 4), (3, 3), 1)
    x.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    out = ops.class_conv(x, weight, counts, 1, "auto")
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(grad)
    expected = everything(x.detach(), weight.detach(), grad, counts, 1)[1:]
    for tensor, want, gradient in zip((x, weight), wanted, expected, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-13, atol=1e-13)


def matching(f, images, weight, counts):
    """Gradient matching in small: a function of the classes' weight gradients."""
    shared = weight.expand(len(counts), -1, -1, -1, -1)
    out = f(images, shared, counts, 1, "auto")
    (gradient,) = torch.autograd.grad((out.tanh() ** 2).sum(), shared, create_graph=True)
    return (gradient**3).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_gradient(compiled):
    counts = [2, 1]
    images, weight = draw(3, 2, 4, 4).requires_grad_(), draw(3, 2, 3, 3, seed=1).requires_grad_()

    def ours(x, w):
        return matching(ops.class_conv, x, w, counts)

    exact = matching(reference.class_conv, images, weight, counts)
    expected = torch.autograd.grad(exact, (images, weight))
    if compiled and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(ours, backend="aot_eager", fullgraph=True)
            found = torch.autograd.grad(whole(images, weight), (images, weight))
    else:  # torch before 2.13 cannot trace autograd.grad
        found = torch.autograd.grad(ours(images, weight), (images, weight))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


# --- the C++ kernel -----------------------------------------------------------------------------

# counts, I, O, (H, W), (kh, kw), padding: around vectors, panels, blocks, by every way of computing
DIRECT = [
    ([2, 0, 3], 3, 8, (10, 9), (3, 3), 1),  # few inputs: copied rows
    ([5], 1, 33, (12, 7), (5, 5), 2),
    ([2, 3], 16, 16, (8, 8), (3, 3), 1),
    ([1, 4], 20, 70, (7, 9), (3, 3), 1),  # outputs that fill no panel
    ([4], 33, 3, (16, 16), (3, 3), 1),  # few outputs: shifted products
    ([70, 9], 40, 1, (4, 4), (3, 3), 1),
    ([2], 2, 130, (33, 20), (3, 3), 0),
    ([40, 1], 130, 65, (2, 2), (3, 3), 1),  # depth in chunks, groups of images
    ([300], 17, 19, (1, 1), (1, 1), 0),
    ([2, 2], 24, 20, (6, 6), (1, 1), 1),  # pixels that no tap reaches
    ([3], 5, 4, (9, 9), (7, 7), 3),
    ([1], 20, 20, (40, 41), (3, 3), 1),  # large planes: blocks of rows
    ([1], 4, 20, (40, 41), (3, 3), 1),
    ([2, 1], 6, 6, (5, 4), (1, 1), 2),
    ([3], 18, 24, (6, 7), (2, 3), 2),
    ([3], 18, 2, (6, 7), (3, 2), 3),  # padding larger than the kernel
]
WINOGRAD = [
    ([2, 0, 3], 3, 8, (8, 12), (3, 3), 1),
    ([70, 9], 20, 70, (4, 4), (3, 3), 1),  # several blocks of tiles
    ([5], 130, 3, (16, 16), (3, 3), 1),
    ([1, 2], 64, 64, (8, 8), (3, 3), 1),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_error_budget_at_every_level(case, last):
    counts, padding = case[0], case[-1]
    for dtype in (torch.float32, torch.float64):
        tensors = problem(*case, dtype=dtype, last=last)
        with ddfast.use_backend("reference"):
            eager = everything(*tensors, counts, padding)
            exact = everything(*(t.double() for t in tensors), counts, padding)
        for level in levels():
            with at_level(level):
                ours = everything(*tensors, counts, padding, "direct")
            # In float64 the "exact" result has rounding of its own, of sums of a thousand terms.
            assert_within_budget(ours, eager, exact, tiny=4 if dtype == torch.float32 else 64)


#: Of the largest entry, on normal data: what docstrings and documentation promise.
WINOGRAD_ERROR = 5e-6


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", WINOGRAD, ids=str)
def test_error_of_winograd_at_every_level(case, last):
    counts = case[0]
    for dtype, allowed in ((torch.float32, WINOGRAD_ERROR), (torch.float64, 1e-14)):
        tensors = problem(*case, dtype=dtype, last=last)
        with ddfast.use_backend("reference"):
            exact = everything(*(t.double() for t in tensors), counts, 1)
        for level in levels():
            with at_level(level):
                found = everything(*tensors, counts, 1, "winograd")
            for ours, wanted in zip(found, exact, strict=True):
                error = (ours.double() - wanted).abs().max() / wanted.abs().max()
                assert error <= allowed, f"{dtype}, {level}: {error:.3g}"


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize(
    ("counts", "inputs", "outputs", "size"),
    [
        ([33], 20, 70, (8, 8)),
        ([3, 0, 1, 40, 2, 5, 1, 7], 17, 18, (4, 4)),
        ([2, 2], 3, 80, (24, 24)),
        ([2, 2], 70, 3, (24, 24)),
    ],
)
def test_same_bits_for_any_number_of_threads(algorithm, counts, inputs, outputs, size):
    tensors = problem(counts, inputs, outputs, size, (3, 3), 1, torch.float32)
    assert_same_bits_for_any_threads(lambda: everything(*tensors, counts, 1, algorithm))


def test_a_class_does_not_see_the_others():
    """Each class alone gives the same bits as all of them together."""
    counts = [3, 9, 1]
    x, weight, grad = problem(counts, 18, 20, (8, 8), (3, 3), 1, torch.float32)
    for algorithm in ("direct", "winograd"):
        together = everything(x, weight, grad, counts, 1, algorithm)
        parts = zip(x.split(counts), weight.split(1), grad.split(counts), counts, strict=True)
        alone = [everything(a, w, g, [n], 1, algorithm) for a, w, g, n in parts]
        joined = [torch.cat([result[i] for result in alone]) for i in range(3)]
        assert_same_bits(together, joined)


# --- the operators ------------------------------------------------------------------------------


@pytest.mark.uses_global_random_state  # opcheck does
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last):
    counts = [2, 1]
    x, weight, grad = problem(counts, 2, 3, (4, 4), (3, 3), 1, last=last)
    calls = (
        (ops.class_conv, (x, weight, counts, 1, "auto")),
        (ops.class_input_grad, (grad, weight, counts, [4, 4], 1, "direct")),
        (ops.class_weight_grad, (x, grad, counts, [3, 3], 1, "winograd")),
    )
    for operator, arguments in calls:
        inputs = [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(inputs))


@pytest.mark.parametrize("last", [False, True])
def test_compiles_as_one_graph(last):
    counts = [1, 3]
    tensors = problem(counts, 3, 4, (8, 4), (3, 3), 1, torch.float32, last)
    torch._dynamo.reset()
    whole = torch.compile(
        lambda x, w, g: everything(x, w, g, counts, 1), backend="aot_eager", fullgraph=True
    )
    found, expected = whole(*tensors), everything(*tensors, counts, 1)
    assert_same_bits(found, expected)
    assert [f.stride() for f in found] == [e.stride() for e in expected]
