"""What kernel ridge regression takes, and the errors that name what it does not."""

from __future__ import annotations

import pytest
import torch

from ddfast import losses

GIVEN = {
    "k_ss": torch.eye(3, dtype=torch.float64),
    "k_ts": torch.full((4, 3), 0.5, dtype=torch.float64),
    "y_s": torch.ones(3, 2, dtype=torch.float64),
    "y_t": torch.ones(4, 2, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"k_ss": 3}, TypeError, "k_ss: got int, expected a tensor"),
        ({"k_ss": torch.ones(3, 3).long()}, TypeError, "k_ss: got torch.int64"),
        ({"k_ss": torch.ones(3, 2)}, ValueError, r"k_ss: got shape \(3, 2\), expected \(3, 3\)"),
        ({"k_ss": torch.ones(0, 0)}, ValueError, "k_ss: got shape.*not empty"),
        ({"k_ts": torch.ones(3)}, ValueError, "k_ts: got shape.*expected a matrix"),
        ({"k_ts": torch.ones(4, 2)}, ValueError, r"k_ts: got shape \(4, 2\), expected \(4, 3\)"),
        ({"k_ts": torch.ones(0, 3)}, ValueError, "k_ts: got shape.*not empty"),
        ({"y_s": torch.ones(2, 2)}, ValueError, r"y_s: got shape \(2, 2\), expected \(3, 2\)"),
        ({"y_t": torch.ones(4, 3)}, ValueError, r"y_t: got shape \(4, 3\), expected \(4, 2\)"),
        ({"y_t": torch.ones(4).long()}, TypeError, "y_t: got torch.int64, expected a floating"),
        ({"y_t": torch.ones(4), "loss": "cross_entropy"}, TypeError, "y_t: got torch.float32"),
        ({"y_t": torch.ones(3).long(), "loss": "cross_entropy"}, ValueError, r"expected \(4,\)"),
        ({"y_t": None}, TypeError, "y_t: got NoneType"),
        ({"y_s": torch.ones(3, 2).to("meta")}, ValueError, "y_s: on meta"),
        ({"y_t": torch.ones(4, 2).to("meta")}, ValueError, "y_t: on meta"),
        ({"reg": -1e-3}, ValueError, "reg: got -0.001"),
        ({"reg": float("nan")}, ValueError, "reg: got nan"),
        ({"loss": "hinge"}, ValueError, "loss: got 'hinge', expected one of mse, cross_entropy"),
        ({"scale": 1.0}, ValueError, "scale: got 1.0, expected None"),
        ({"scale": torch.ones(2), "loss": "cross_entropy"}, ValueError, "scale: got shape"),
        ({"reduction": "sum"}, ValueError, "reduction: got 'sum'"),
        ({"reduction": "class_sum", "loss": "cross_entropy"}, ValueError, "reduction: got 'class"),
        ({"solve_dtype": torch.float16}, TypeError, "solve_dtype: got torch.float16"),
    ],
)
def test_errors_name_the_argument(changes, kind, message):
    with pytest.raises(kind, match=message):
        losses.krr_loss(**{**GIVEN, **changes})


def test_label_solve_checks_too():
    with pytest.raises(ValueError, match="y_t: got shape"):
        losses.label_solve(GIVEN["k_ss"], GIVEN["k_ts"], GIVEN["y_s"])
    with pytest.raises(TypeError, match="k_ss: got int"):
        losses.label_solve(3, GIVEN["k_ts"], GIVEN["y_t"])
    with pytest.raises(ValueError, match="reg"):
        losses.krr_predict(GIVEN["k_ss"], GIVEN["k_ts"], GIVEN["y_s"], reg=-1)


def test_transforms_are_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda k: losses.krr_loss(k, *list(GIVEN.values())[1:]))(GIVEN["k_ss"])
