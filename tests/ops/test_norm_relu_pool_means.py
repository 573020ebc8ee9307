"""Gates of `norm_relu_pool_means`: definition, C++ kernel, operator, Triton kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ddfast
from ddfast import layers
from ddfast.ops import norm_relu_pool as single
from ddfast.ops import norm_relu_pool_means as ops
from ddfast.reference import norm_relu_pool_means as reference
from ddfast.reference.norm_relu_pool import ACTIVATIONS, POOLS
from ddfast.testing import (
    assert_same_bits,
    assert_same_bits_for_any_threads,
    assert_within_budget,
    at_level,
    check_derivatives,
    compile_ahead_of_time,
    levels,
    poisoned,
    unchanged,
)

LAST = torch.channels_last
FORMATS = [torch.contiguous_format, LAST]
NORMS = ["instance", "group", "none"]
CASES = list(itertools.product(NORMS, ACTIVATIONS, POOLS))


def draw(*shape: int, seed: int = 0, dtype=torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def groups_of(norm: str, channels: int) -> int:
    return {"instance": channels, "group": channels // 2, "none": 0}[norm]


def affine(groups: int, channels: int, dtype=torch.float64):
    if groups == 0:
        return None, None
    return draw(channels, seed=1, dtype=dtype), draw(channels, seed=2, dtype=dtype)


def plain(x, weight, bias, counts, groups, activation, pool):
    """Pooled result and class means with torch's own functions."""
    if groups:
        x = F.group_norm(x, groups, weight, bias, 1e-5)
    a = {
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, 0.01),
        "sigmoid": torch.sigmoid,
        "swish": F.silu,
    }[activation](x)
    out = {"average": F.avg_pool2d, "max": F.max_pool2d, "none": lambda t, _: t}[pool](a, 2)
    return out, torch.stack([p.mean(0) if len(p) else 0 * a.sum(0) for p in a.split(counts)])


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("norm", "activation", "pool"), CASES)
@pytest.mark.parametrize("sides", [("out",), ("means",), ("out", "means")])
def test_it_is_what_torch_computes_in_several_steps(backend, norm, activation, pool, sides):
    groups, counts = groups_of(norm, 4), [2, 0, 3]
    x = draw(5, 4, 7, 6, mean=0.5).requires_grad_()
    parameters = [t if t is None else t.requires_grad_() for t in affine(groups, 4)]
    leaves = [x, *(t for t in parameters if t is not None)]

    def total(out, means):
        """A function of a result or both, so that the other has no gradient at all."""
        both = {"out": out, "means": means}
        return sum((both[s] * draw(*both[s].shape, seed=3)).sum() for s in sides)

    expected = plain(x, *parameters, counts, groups, activation, pool)
    with ddfast.use_backend(backend):
        found = layers.norm_relu_pool_means(x, counts, *parameters, groups, 1e-5, activation, pool)
        gradients = torch.autograd.grad(total(*found), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    wanted = torch.autograd.grad(total(*expected), leaves)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_derivatives(norm, pool):
    x = draw(3, 2, 3, 4).requires_grad_()
    groups = {"instance": 2, "group": 1, "none": 0}[norm]
    parameters = [t.requires_grad_() for t in affine(groups, 2) if t is not None]

    def f(x, *parameters):
        given = parameters or (None, None)
        return layers.norm_relu_pool_means(x, [1, 2], *given, groups, 1e-3, "swish", pool)

    check_derivatives(f, (x, *parameters))


def test_a_third_derivative_is_refused():
    x = draw(2, 2, 4, 4).requires_grad_()
    _, means = layers.norm_relu_pool_means(x, [2], groups=2, activation="swish")
    (first,) = torch.autograd.grad((means**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad((second**2).sum(), x)
    _, mean, _, _ = ops.norm_relu_pool_means(x, None, None, [2], 2, 1e-5, "relu", "average")
    assert not mean.requires_grad


# --- the C++ kernel -----------------------------------------------------------------------------

SHAPES = [(5, 4, 5, 6), (5, 32, 8, 8), (40, 35, 7, 9), (5, 130, 2, 2), (70, 16, 5, 4)]


def counts_of(images: int) -> list[int]:
    """Classes of one, of no, and of the other images: more than a block where there are many."""
    return [1, 0, images - 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget_at_every_level(dtype, shape):
    for norm, activation, pool in CASES:
        if norm == "group" and shape[1] % 2:
            continue
        groups, counts = groups_of(norm, shape[1]), counts_of(shape[0])
        x = draw(*shape, mean=0.3, dtype=dtype)
        weight, bias = affine(groups, shape[1], dtype)
        wide = [t if t is None else t.double() for t in (x, weight, bias)]
        settings = counts, groups, 1e-5, activation, pool
        exact = reference.norm_relu_pool_means(*wide, *settings)
        eager = reference.norm_relu_pool_means(x, weight, bias, *settings)
        alone = single.norm_relu_pool(x, weight, bias, *settings[1:])
        for level, form in itertools.product(levels(), FORMATS):
            given = x.contiguous(memory_format=form)
            with at_level(level), unchanged(given):
                ours = ops.norm_relu_pool_means(given, weight, bias, *settings)
                alone = single.norm_relu_pool(given, weight, bias, *settings[1:])
            assert all(t.is_contiguous(memory_format=form) for t in (ours[0], ours[3]))
            assert_within_budget(ours, eager, exact, tiny=8 if dtype == torch.float32 else 32)
            assert_same_bits(ours[:3], alone)


@pytest.mark.parametrize("images", [1, 15, 16, 17, 32, 33, 48, 64, 65, 256, 5000])
def test_means_of_many_images_stay_exact(images):
    x = draw(images, 16, 2, 2, mean=3.0, dtype=torch.float32)
    settings = None, None, [images], 0, 1e-5, "relu", "average"
    exact = reference.norm_relu_pool_means(x.double(), *settings)
    eager = reference.norm_relu_pool_means(x, *settings)
    for form in FORMATS:
        ours = ops.norm_relu_pool_means(x.contiguous(memory_format=form), *settings)
        assert_within_budget(ours, eager, exact, tiny=2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(9, 70, 18, 18), (5, 256, 32, 32)])
def test_same_bits_for_any_number_of_threads(shape, form):
    x = draw(*shape, dtype=torch.float32).contiguous(memory_format=form)
    for groups, counts in itertools.product((shape[1], 2), ([len(x)], [1, len(x) - 1])):
        settings = counts, groups, 1e-5, "swish", "average"
        assert_same_bits_for_any_threads(
            lambda s=settings: ops.norm_relu_pool_means(x, None, None, *s)
        )


def test_other_classes_do_not_matter():
    x = draw(40, 64, 32, 32, dtype=torch.float32).contiguous(memory_format=LAST)
    settings = 64, 1e-5, "relu", "average"
    whole = ops.norm_relu_pool_means(x, None, None, [20, 19, 1], *settings)
    for c, part in enumerate(x.split([20, 19, 1])):
        alone = ops.norm_relu_pool_means(part, None, None, [len(part)], *settings)
        assert torch.equal(alone[3][0], whole[3][c])
        assert torch.equal(alone[0], whole[0].split([20, 19, 1])[c])


def test_layouts_and_stray_reads():
    base = poisoned((6, 10, 8, 8), torch.float32, "cpu")
    for x in (base.transpose(2, 3), base[::2], base[:, 2:7], base[:1].expand(3, 10, 8, 8)):
        settings = None, None, [1, len(x) - 1], x.shape[1], 1e-5, "relu", "average"
        with unchanged(base):
            found = ops.norm_relu_pool_means(x, *settings)
        assert_same_bits(found, ops.norm_relu_pool_means(x.contiguous(), *settings))
        assert all(t.isfinite().all() for t in found)


def test_infinity_and_nan_stay_in_their_class_and_channel():
    x = draw(6, 20, 4, 4, dtype=torch.float32).contiguous(memory_format=LAST)
    x[1, 3, 0, 0], x[4, 5, 2, 1] = float("inf"), float("nan")
    *_, means = ops.norm_relu_pool_means(x, None, None, [3, 3], 0, 1e-5, "leaky_relu", "average")
    assert means[0, 3, 0, 0] == float("inf") and means[1, 5, 2, 1].isnan()
    assert (~means.isfinite()).sum() == 2


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
@pytest.mark.parametrize("form", FORMATS)
def test_no_images(counts, form):
    x = draw(0, 4, 6, 6).contiguous(memory_format=form).requires_grad_()
    out, means = layers.norm_relu_pool_means(x, counts, groups=4)
    assert out.shape == (0, 4, 3, 3) and means.shape == (len(counts), 4, 6, 6)
    assert not means.any()
    (gradient,) = torch.autograd.grad(out.sum() + means.sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x = draw(5, 4, 6, 6, dtype=dtype)
    out, means = layers.norm_relu_pool_means(x, [2, 3], groups=4)
    wide_out, wide = layers.norm_relu_pool_means(x.float(), [2, 3], groups=4)
    assert out.dtype == dtype and means.dtype == torch.float32
    torch.testing.assert_close(means, wide, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.float(), wide_out, rtol=1e-2, atol=1e-2)


# --- the operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("pool", POOLS)
def test_opcheck(form, pool):
    x = draw(3, 4, 5, 4).contiguous(memory_format=form).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(4, 4))
    torch.library.opcheck(
        ops.norm_relu_pool_means, (x, weight, bias, [1, 2], 4, 1e-5, "swish", pool)
    )
    torch.library.opcheck(ops.norm_relu_pool_means, (x, None, None, [3], 0, 1e-5, "relu", pool))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_without_graph_break(compiler):
    torch._dynamo.reset()
    x = draw(3, 4, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = affine(4, 4)

    def f(x):
        out, means = layers.norm_relu_pool_means(x * 2, [1, 2], weight, bias, 4)
        return (out**2).sum() + (means**3).sum()

    expected, found = f(x), torch.compile(f, backend=compiler, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_gradient(compiled):
    """How the images' gradient of a block grows when its kernel changes."""
    images, kernel = draw(3, 3, 6, 6).requires_grad_(), draw(4, 3, 3, 3, seed=1).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(4, 4))
    leaves = images, kernel, weight, bias

    def outer(block, images, kernel, weight, bias):
        out, means = block(F.conv2d(images, kernel, padding=1), weight, bias)
        value = (out**2).sum() + (means**3).sum()
        first = torch.autograd.grad(value, (kernel, weight, bias), create_graph=True)
        return sum((g**2).sum() for g in first)

    def ours(*inputs):
        def block(x, w, b):
            return layers.norm_relu_pool_means(x, [1, 2], w, b, 4, activation="swish")

        return outer(block, *inputs)

    exact = outer(lambda x, w, b: plain(x, w, b, [1, 2], 4, "swish", "average"), *leaves)
    expected = torch.autograd.grad(exact, leaves)
    if compiled and hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            whole = torch.compile(ours, backend="aot_eager", fullgraph=True)
            found = torch.autograd.grad(whole(*leaves), leaves)
    else:  # torch before 2.13 cannot trace autograd.grad
        found = torch.autograd.grad(ours(*leaves), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_compiled_kernel_answers_unless_the_reference_is_forced(monkeypatch):
    calls = []
    original = ddfast.backend.compiled.norm_relu_pool_means
    monkeypatch.setattr(
        ddfast.backend.compiled, "norm_relu_pool_means", lambda *a: (calls.append(a), original(*a))
    )
    x = draw(1, 2, 4, 4)
    layers.norm_relu_pool_means(x, [1])
    assert len(calls) == 1
    with ddfast.use_backend("reference"):
        layers.norm_relu_pool_means(x, [1])
    assert len(calls) == 1


def test_errors_name_the_argument():
    x = draw(3, 4, 6, 6)
    for counts in ([1, 1], [4, -1], []):
        with pytest.raises(ValueError, match=r"counts: got .* that sum to 3"):
            layers.norm_relu_pool_means(x, counts)
    with pytest.raises(TypeError, match="counts: got"):
        layers.norm_relu_pool_means(x, [1.5, 1.5])
    with pytest.raises(ValueError, match="groups: got 3"):
        layers.norm_relu_pool_means(x, [3], groups=3)
    with pytest.raises(ValueError, match="pool: got 'sum'"):
        layers.norm_relu_pool_means(x, [3], pool="sum")
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        layers.norm_relu_pool_means(x.long(), [3])
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda t: layers.norm_relu_pool_means(t[None], [1])[1])(x)


# --- the Triton kernel --------------------------------------------------------------------------


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import norm_relu_pool_means

    return norm_relu_pool_means


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(5, 6, 5, 6), (4, 34, 3, 3), (7, 2, 40, 30)])
def test_triton_error_budget(kernels, triton_device, dtype, norm, form, shape):
    x = poisoned(shape, dtype, triton_device).contiguous(memory_format=form)
    groups, counts = groups_of(norm, shape[1]), counts_of(shape[0])
    weight, bias = (
        t if t is None else t.to(triton_device) for t in affine(groups, shape[1], dtype)
    )
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    settings = counts, groups, 1e-5, "swish", "average"
    with unchanged(x):
        ours = kernels.norm_relu_pool_means(x, weight, bias, *settings)
    eager = reference.norm_relu_pool_means(x, weight, bias, *settings)
    exact = reference.norm_relu_pool_means(*wide, *settings)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    assert all(t.is_contiguous(memory_format=form) for t in (ours[0], ours[3]))
    assert_within_budget(ours, eager, exact, tiny=32)
    assert_same_bits(ours, kernels.norm_relu_pool_means(x, weight, bias, *settings))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_triton_settings(kernels, triton_device, activation, pool):
    x = poisoned((5, 3, 5, 6), torch.float64, triton_device)
    settings = None, None, [2, 3], 3, 1e-5, activation, pool
    found = kernels.norm_relu_pool_means(x, *settings)
    expected = reference.norm_relu_pool_means(x, *settings)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_triton_infinity_and_no_images(kernels, triton_device):
    x = poisoned((4, 3, 4, 4), torch.float32, triton_device).clone()
    x[1, 2, 0, 0] = float("inf")
    settings = 0, 1e-5, "leaky_relu", "average"
    *_, means = kernels.norm_relu_pool_means(x, None, None, [3, 1], *settings)
    assert means[0, 2, 0, 0] == float("inf")
    assert (~means.isfinite()).sum() == 1
    *_, means = kernels.norm_relu_pool_means(x[:0], None, None, [0, 0], *settings)
    assert means.shape == (2, 3, 4, 4) and not means.any()


def test_triton_offsets_beyond_32_bits(kernels, triton_device):
    """Images that lie 2^31 elements and more apart in memory never touched."""
    stride = 2**31 + 64
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(stride + 32, dtype=torch.bfloat16, device=triton_device)
    values = poisoned((2, 2, 4, 4), torch.bfloat16, triton_device)
    x = flat.as_strided(values.shape, (stride, 16, 4, 1))
    x.copy_(values)
    settings = None, None, [2], 2, 1e-5, "relu", "average"
    found = kernels.norm_relu_pool_means(x, *settings)
    assert_same_bits(found, kernels.norm_relu_pool_means(values, *settings))


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("norm_relu_pool_means", capability)
    assert {k["name"] for k in kernels} == {"means_kernel"}
    assert all(k["spilled"] == 0 for k in kernels), kernels
