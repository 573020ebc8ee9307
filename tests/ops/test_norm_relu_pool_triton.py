"""Gates of the Triton kernels of `norm_relu_pool`: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from ddfast.reference import norm_relu_pool as reference
from ddfast.testing import (
    assert_same_bits,
    assert_within_budget,
    compile_ahead_of_time,
    poisoned,
    unchanged,
)

EPS = 1e-5
OPERATORS = (
    "norm_relu_pool",
    "norm_relu_pool_bwd",
    "norm_relu_pool_tangent",
    "norm_relu_pool_tangent_bwd",
)


@pytest.fixture
def kernels(triton_device):
    from ddfast.kernels import norm_relu_pool

    return norm_relu_pool


def tensors(shape, groups, pool, dtype, device, last=False, each=True, mean=0.5):
    """Everything the four operators take, each with NaN right before and behind it.

    The tangents of weight and bias are one row per image if `each`.
    """
    images, channels, height, width = shape
    pooled = (height, width) if pool == "none" else (height // 2, width // 2)

    def plane(size, seed):
        if last:
            t = poisoned((images, *size, channels), dtype, device, margin=64 + seed)
            t = t.permute(0, 3, 1, 2)
        else:
            t = poisoned((images, channels, *size), dtype, device, margin=64 + seed)
        return t.mul_(1 + 0.1 * seed).add_(0.01 * seed)

    x, tangent = plane((height, width), 0).add_(mean), plane((height, width), 1)
    # `poisoned` draws the same numbers for the same size.
    tangent.copy_(tangent.flip(2, 3).roll(1, 1).contiguous())
    grad, grad_tangent = plane(pooled, 2), plane(pooled, 3)
    grad_tangent.copy_(grad_tangent.flip(1, 3).contiguous())
    if groups == 0:
        return [x, tangent, grad, grad_tangent, None, None, None, None]
    weight, bias = (poisoned((channels,), dtype, device, margin=m) for m in (64, 65))
    weight.add_(1)
    bias.copy_(bias.flip(0).clone())
    rows = (images, channels) if each else (channels,)
    by_weight, by_bias = (poisoned(rows, dtype, device, margin=m) for m in (66, 67))
    return [x, tangent, grad, grad_tangent, weight, bias, by_weight, by_bias.mul_(-0.5)]


def run(module, given, groups, activation, pool, statistics=None):
    """All results of the four operators; the statistics of the last three are the reference's."""
    x, tangent, grad, grad_tangent, weight, bias, *tangents = given
    settings = (groups, activation, pool)
    forward = module.norm_relu_pool(x, weight, bias, groups, EPS, activation, pool)
    if statistics is None:
        statistics = reference.norm_relu_pool(x, weight, bias, groups, EPS, activation, pool)[1:]
    statistics = [poisoned(s.shape, s.dtype, s.device).copy_(s) for s in statistics]
    return [
        *forward,
        *module.norm_relu_pool_bwd(grad, x, weight, bias, *statistics, *settings),
        module.norm_relu_pool_tangent(x, tangent, weight, bias, *tangents, *statistics, *settings),
        *module.norm_relu_pool_tangent_bwd(
            grad, grad_tangent, x, tangent, weight, bias, *tangents, *statistics, *settings
        ),
    ]


def check(kernels, given, groups, activation, pool, tiny=16.0):
    """Ours against the reference in the same dtype, both measured in float64; returns ours."""
    with unchanged([t for t in given if t is not None]):
        ours = run(kernels, given, groups, activation, pool)
    wide = [None if t is None else t.double() for t in given]
    eager = run(reference, given, groups, activation, pool)
    statistics = [s.double() for s in eager[1:3]]
    exact = run(reference, wide, groups, activation, pool, statistics)
    exact[1:3] = run(reference, wide, groups, activation, pool)[1:3]
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    planes = (0, 3, 6, 7)
    for k in planes:
        form = reference.memory_format(given[0])
        assert ours[k].is_contiguous(memory_format=form)
    assert_within_budget(ours, eager, exact, tiny=tiny)
    return ours


@pytest.mark.parametrize("pool", reference.POOLS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("groups", [4, 2, 0])
def test_error_budget(kernels, triton_device, groups, activation, pool):
    """Odd sizes: the last row and column enter the statistics, get gradient, and are not pooled."""
    which = reference.ACTIVATIONS.index(activation) + reference.POOLS.index(pool)
    shape, last = (1, 4, 5, 3), bool((which + groups) % 2)
    given = tensors(shape, groups, pool, torch.float32, triton_device, last)
    check(kernels, given, groups, activation, pool)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "last"), [(4, True), (2, False)])
def test_dtypes_and_several_images(kernels, triton_device, dtype, groups, last):
    given = tensors((2, 4, 2, 6), groups, "average", dtype, triton_device, last)
    check(kernels, given, groups, "swish", "average")


@pytest.mark.parametrize(
    ("size", "pool"),
    [((1, 1), "none"), ((1, 5), "none"), ((4, 1), "none"), ((2, 2), "max"), ((3, 9), "average")],
)
def test_planes(kernels, triton_device, size, pool):
    for groups, last in ((3, False), (1, True)):
        given = tensors((1, 3, *size), groups, pool, torch.float32, triton_device, last)
        check(kernels, given, groups, "leaky_relu", pool)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_constant_planes(kernels, triton_device, activation):
    """No variance: rstd is 1 / sqrt(eps); of four equal maxima the first one counts."""
    given = tensors((1, 2, 5, 4), 2, "max", torch.float64, triton_device)
    given[0].fill_(0.75)
    ours = check(kernels, given, 2, activation, "max")
    torch.testing.assert_close(ours[2], torch.full_like(ours[2], EPS**-0.5))
    expected = run(reference, given, 2, activation, "max")
    torch.testing.assert_close(ours[5], expected[5])


def test_relu_has_no_slope_at_its_kink(kernels, triton_device):
    given = tensors((1, 2, 4, 4), 0, "none", torch.float32, triton_device)
    given[0].zero_()
    ours = run(kernels, given, 0, "relu", "none")
    for gradient in (ours[3], ours[6], ours[7]):
        assert_same_bits(gradient.abs(), torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("groups", "last", "pool"), [(3, False, "max"), (3, True, "average"), (1, False, "none")]
)
def test_units_that_do_not_fit_into_registers(
    kernels, triton_device, monkeypatch, groups, last, pool
):
    monkeypatch.setattr(kernels, "LIMITS", dict.fromkeys(kernels.LIMITS, (8, 8)))
    monkeypatch.setattr(kernels, "TILE", 64)
    given = tensors((1, 3, 7, 6), groups, pool, torch.float32, triton_device, last, mean=20.0)
    ours = check(kernels, given, groups, "swish", pool)
    assert_same_bits(ours, run(kernels, given, groups, "swish", pool))


def test_no_norm_that_does_not_fit(kernels, triton_device, monkeypatch):
    monkeypatch.setattr(kernels, "LIMITS", dict.fromkeys(kernels.LIMITS, (8, 8)))
    monkeypatch.setattr(kernels, "TILE", 32)
    given = tensors((1, 3, 5, 6), 0, "average", torch.float32, triton_device)
    check(kernels, given, 0, "leaky_relu", "average")


def test_statistics_of_values_far_from_zero(kernels, triton_device, monkeypatch):
    """A sum of squares would lose the variance, 1, beside the mean's square, 1e8."""
    given = tensors((1, 2, 12, 12), 2, "none", torch.float32, triton_device, mean=1e4)
    exact = reference.norm_relu_pool(given[0].double(), None, None, 2, EPS, "relu", "none")[2]
    for limit in (16384, 8):
        monkeypatch.setattr(kernels, "LIMITS", dict.fromkeys(kernels.LIMITS, (limit, limit)))
        monkeypatch.setattr(kernels, "TILE", 64)
        rstd = kernels.norm_relu_pool(given[0], None, None, 2, EPS, "relu", "none")[2]
        torch.testing.assert_close(rstd.double(), exact, rtol=1e-4, atol=0)


def test_what_may_be_left_out(kernels, triton_device):
    """Weight, bias, their tangents, one row of them for all images, and the tangent of grad."""
    given = tensors((2, 2, 2, 4), 2, "average", torch.float32, triton_device, each=False)
    check(kernels, given, 2, "swish", "average")
    for missing in ((3, 5, 7), (4, 6)):
        fewer = [None if k in missing else t for k, t in enumerate(given)]
        check(kernels, fewer, 2, "relu", "average")


def test_layouts(kernels, triton_device):
    """Results do not depend on how the inputs lie in memory; x decides how the results lie."""
    given = tensors((2, 2, 4, 2), 2, "average", torch.float32, triton_device)
    statistics = reference.norm_relu_pool(*given[0::4], None, 2, EPS, "relu", "none")[1:]

    def all_of(given):
        return run(kernels, given, 2, "swish", "average", statistics)

    dense = all_of(given)

    def strided(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]

    def sliced(t):
        wide = torch.full((3, 4, *t.shape[2:]), float("nan"), device=t.device)
        wide[1:, 1:3] = t
        return wide[1:, 1:3]

    def channels_last(t):
        return t.contiguous(memory_format=torch.channels_last)

    def turned(t):
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    for first, others in ((strided, sliced), (sliced, channels_last), (turned, turned)):
        views = [first(given[0]), *map(others, given[1:4]), *given[4:]]
        ours = all_of(views)
        assert_same_bits(ours, dense)
        assert all(ours[k].is_contiguous() for k in (0, 3, 6, 7))
    expanded = [*given[:2], given[2][:1, :1].expand_as(given[2]), *given[3:]]
    copied = [*given[:2], expanded[2].contiguous(), *given[3:]]
    assert_same_bits(all_of(expanded), all_of(copied))
    ours = all_of([channels_last(given[0]), *given[1:]])
    assert all(ours[k].is_contiguous(memory_format=torch.channels_last) for k in (0, 3, 6, 7))
    assert_within_budget(ours, dense, [t.double() for t in dense], tiny=16)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum
def test_nan_stays_in_its_plane(kernels, triton_device):
    given = tensors((1, 3, 4, 4), 3, "max", torch.float32, triton_device)
    given[0][0, 1, 2, 2], given[0][0, 1, 3, 3] = 9.0, float("nan")
    ours = run(kernels, given, 3, "relu", "max")
    for k in (0, 3, 6, 7):
        assert ours[k][0, 1].isnan().all() and ours[k][0, ::2].isfinite().all()
    plain = kernels.norm_relu_pool(given[0], None, None, 0, EPS, "relu", "max")[0]
    expected = reference.norm_relu_pool(given[0], None, None, 0, EPS, "relu", "max")[0]
    assert plain[0, 1, 1, 1].isnan() and plain.isnan().sum() == 1
    torch.testing.assert_close(plain, expected, equal_nan=True, rtol=0, atol=0)


def test_empty_batch(kernels, triton_device):
    for groups, pool in itertools.product((4, 0), ("average", "none")):
        given = tensors((0, 4, 4, 4), groups, pool, torch.float32, triton_device)
        ours = run(kernels, given, groups, "relu", pool)
        assert_same_bits(ours, run(reference, given, groups, "relu", pool))


def test_offsets_beyond_32_bits(kernels, triton_device):
    """Images, then channels, 2^31 elements and more apart in memory never touched."""
    reach = 2**31 + 64
    if triton_device == "cuda" and torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    flat = torch.empty(reach + 250, dtype=torch.bfloat16, device=triton_device)
    for shape, far in (((2, 1, 2, 4), 0), ((1, 3, 2, 4), 1)):
        given = tensors(shape, shape[1], "average", torch.bfloat16, triton_device)
        dense = run(kernels, given, shape[1], "swish", "average")
        views = list(given)
        for k in range(4):
            strides = list(given[k].stride())
            strides[far] = reach // (shape[far] - 1)
            views[k] = flat.as_strided(given[k].shape, strides, 50 * k)
            views[k].copy_(given[k])
        assert_same_bits(run(kernels, views, shape[1], "swish", "average"), dense)


def test_block_sizes(kernels):
    """Powers of two; a resident tile holds the unit and fits; others keep a program small."""
    sizes = (1, 3, 64, 200)
    for name, channels, cells, grouped, last, plain, double, corners in itertools.product(
        kernels.LIMITS, sizes, (1, 16, 196, 1024, 40000), *[(False, True)] * 4, (1, 4)
    ):
        tile = kernels.choose_tile(name, channels, grouped, cells, corners, last, plain, double)
        elements = tile.channels * tile.cells * corners
        assert all(n & (n - 1) == 0 for n in (tile.channels, tile.cells, tile.warps))
        assert 1 <= tile.warps <= 16
        if tile.resident:
            assert elements <= kernels.LIMITS[name][0] and tile.cells >= cells
            assert tile.channels >= channels or not grouped
        else:
            assert elements <= max(kernels.TILE, 16 * corners)
    # The sizes that matter: a plane of 32x32, instance norm, in both memory formats.
    for name, last in itertools.product(kernels.LIMITS, (False, True)):
        assert kernels.choose_tile(name, 128, False, 256, 4, last, True, False).resident


def test_signatures_are_the_references(kernels):
    for name in OPERATORS:
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, reference))
        assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = compile_ahead_of_time("norm_relu_pool", capability)
    names = {"forward_kernel", "backward_kernel", "tangent_kernel", "tangent_backward_kernel"}
    assert {k["name"] for k in kernels} == names
    assert all(k["spilled"] == 0 for k in kernels), kernels
    # A resident tile is loaded once, by whichever pass comes first: 16 elements of a thread for
    # each plane before pooling and 4 for each behind it, statistics and parameters.
    once = dict(zip(sorted(names), (64 + 16, 64, 2 * 80, 2 * 64), strict=True))
    resident = [k for k in kernels if k["constants"]["ACTIVATION"] == "relu"]
    assert {k["name"] for k in resident} == names
    assert all(k["loaded"] < 1.5 * once[k["name"]] for k in resident), resident
