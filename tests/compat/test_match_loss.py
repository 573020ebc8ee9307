"""`match_loss` against the official formulas, written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ddfast.compat.dc import match_loss


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3, 3, 3), (4,), (4, 5, 5), (6, 16), (6,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) * 0.01 for s in shapes]


def written_out(syn, real, metric):
    if metric == "ours":
        total = 0.0
        for s, r in zip(syn, real, strict=True):
            if s.dim() == 1:
                continue
            s, r = s.flatten(1), r.flatten(1)
            dot = (s * r).sum(1)
            total = total + (1 - dot / (s.norm(dim=1) * r.norm(dim=1) + 0.000001)).sum()
        return total
    s, r = (torch.cat([t.flatten() for t in x]) for x in (syn, real))
    if metric == "mse":
        return ((s - r) ** 2).sum()
    return 1 - (s * r).sum() / (s.norm() * r.norm() + 0.000001)


@pytest.mark.parametrize("metric", ["ours", "mse", "cos"])
def test_values_and_gradients(metric):
    syn = [t.requires_grad_() for t in gradients(0)]
    real = gradients(1)
    args = SimpleNamespace(dis_metric=metric, device="cpu")
    counted = [t for t in syn if metric != "ours" or t.dim() > 1]
    ours, official = match_loss(syn, real, args), written_out(syn, real, metric)
    torch.testing.assert_close(ours, official, rtol=1e-13, atol=0)
    found = torch.autograd.grad(ours, counted)
    torch.testing.assert_close(
        found, torch.autograd.grad(official, counted), rtol=1e-11, atol=1e-13
    )


def test_generators_of_gradients_are_taken_as_the_official_code_does():
    args = SimpleNamespace(dis_metric="ours")
    a, b = gradients(0), gradients(1)
    assert match_loss(tuple(a), (t for t in b), args) == match_loss(a, b, args)


def test_unknown_metric_is_an_error_and_not_an_exit():
    with pytest.raises(ValueError, match=r"args\.dis_metric: got 'l2'"):
        match_loss(gradients(0), gradients(1), SimpleNamespace(dis_metric="l2"))
