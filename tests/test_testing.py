"""The gates themselves: each helper must pass what is right and fail what is wrong."""

from __future__ import annotations

import pytest
import torch

import ddfast
from ddfast import testing

EXACT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def test_error_is_the_largest_and_nan_never_passes():
    assert testing.error(torch.tensor([1.0, 2.5, 4.0]), EXACT) == 0.5
    nan, inf = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])
    assert testing.error(nan, nan.double()) == 0 and testing.error(inf, inf.double()) == 0
    assert not testing.error(nan, torch.ones(2).double()) <= 1e300
    assert not testing.error(inf, torch.ones(2).double()) <= 1e300
    assert not testing.error(torch.ones(2), nan.double()) <= 1e300
    with pytest.raises(AssertionError, match="shape"):
        testing.error(torch.ones(3), torch.ones(1, 3))


def test_budget():
    eager = EXACT.float() + 1e-3
    testing.assert_within_budget(EXACT.float() - 1.9e-3, eager, EXACT)
    testing.assert_within_budget(
        [[EXACT.float()], EXACT.float()], [[eager], eager], [[EXACT], EXACT]
    )
    with pytest.raises(AssertionError, match=r"result 0: error 0\.0021 over its budget 0\.002"):
        testing.assert_within_budget(EXACT.float() - 2.1e-3, eager, EXACT)
    with pytest.raises(AssertionError, match="over its budget"):
        testing.assert_within_budget(EXACT.float() * float("nan"), eager, EXACT)
    with pytest.raises(ValueError):
        testing.assert_within_budget([EXACT], [EXACT, EXACT], [EXACT])


def test_budget_always_allows_rounding_and_nothing_else():
    eps = torch.finfo(torch.float32).eps
    exact = EXACT.float()
    testing.assert_within_budget(exact + 3 * eps * 4, exact, EXACT)
    with pytest.raises(AssertionError):
        testing.assert_within_budget(exact + 8 * eps * 4, exact, EXACT)


def test_same_bits_sees_the_sign_of_zero_and_nan_payloads():
    testing.assert_same_bits([EXACT, [EXACT]], [EXACT.clone(), [EXACT.clone()]])
    for a, b in [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (EXACT, EXACT.float()),
        (EXACT, EXACT[None]),
        (EXACT, EXACT + 1e-15),
    ]:
        with pytest.raises(AssertionError):
            testing.assert_same_bits(a, b)


def test_thread_gate_sees_a_result_that_depends_on_threads():
    before = torch.get_num_threads()
    testing.assert_same_bits_for_any_threads(lambda: EXACT)
    with pytest.raises(AssertionError):
        testing.assert_same_bits_for_any_threads(lambda: EXACT * torch.get_num_threads())
    calls = iter(range(100))
    with pytest.raises(AssertionError):
        testing.assert_same_bits_for_any_threads(lambda: EXACT * next(calls))
    assert torch.get_num_threads() == before


def test_unchanged_sees_writes_behind_the_version_counter():
    tensor = EXACT.clone()
    with testing.unchanged([tensor], EXACT):
        tensor.sum()
    with pytest.raises(AssertionError, match="input 0 was written to"), testing.unchanged(tensor):
        tensor.add_(1)
    with pytest.raises(AssertionError, match="input 1 was written to"):  # noqa: SIM117
        with testing.unchanged(EXACT, tensor):
            tensor.numpy()[0] = 7.0


def test_derivative_gate_sees_a_wrong_second_derivative():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 3 * x.detach() ** 2  # first order right, second silently zero

    x = EXACT.clone().requires_grad_()
    testing.check_derivatives(lambda t: t**3, [x])
    testing.check_derivatives(Wrong.apply, [x], order=1)
    with pytest.raises(RuntimeError):
        testing.check_derivatives(Wrong.apply, [x], order=2)


def test_poisoned_tensors_are_surrounded_by_nan():
    inner = testing.poisoned((3, 5), torch.float32, "cpu")
    assert inner.is_contiguous() and inner.isfinite().all()
    around = inner.as_strided((15 + 128,), (1,), inner.storage_offset() - 64)
    assert around[:64].isnan().all() and around[-64:].isnan().all()


def test_backend_names_and_nesting():
    with pytest.raises(ValueError, match="name: got 'cuda', expected one of auto, reference"):  # noqa: SIM117
        with ddfast.use_backend("cuda"):
            pass
    with ddfast.use_backend("reference"):
        assert "forced" in ddfast.backends()["CPU"]
        with ddfast.use_backend("auto"):
            assert "forced" not in ddfast.backends()["CPU"]
        assert "forced" in ddfast.backends()["CUDA"]
    assert "forced" not in ddfast.backends()["CPU"]


def test_loaded_bytes_counts_instructions_of_the_compiled_text():
    ptx = """
        @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 ];
        ld.global.v2.b16 { %rs1, %rs2 }, [ %rd3 ];
        st.global.b32 [ %rd4 ], { %r1 };
        ld.shared.b32 %r6, [ %r7 ];
    """
    assert testing.loaded_bytes(ptx) == 4 + 16 + 4


def test_ahead_of_time_compilation_reports_a_kernel_that_does_not_compile():
    with pytest.raises(AssertionError, match="no_such_operator"):
        testing.compile_ahead_of_time("no_such_operator", 90)
