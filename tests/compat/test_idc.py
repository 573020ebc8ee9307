"""IDC's matching losses against the official formulas, written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from ddfast import nets
from ddfast.compat.idc import add_loss, dist, matchloss, remove_aug

METRICS = ["mse", "l1", "l1_mean", "cos"]


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def written_out(x, y, method):
    rows = (x - y).abs().reshape(len(x), -1)
    if method == "mse":
        return ((x - y) ** 2).sum()
    if method == "l1":
        return rows.sum()
    if method == "l1_mean":
        return rows.mean(1).sum()
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    return (1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-6)).sum()


@pytest.mark.parametrize("method", METRICS)
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 3, 3, 3)])
def test_distances(method, shape) -> None:
    x, y = drawn(*shape), drawn(*shape, seed=1).requires_grad_()
    found, expected = dist(x, y, method), written_out(x, y, method)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(each, y)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


class Featured(torch.nn.Module):
    """As IDC's models, with the output of some layers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def get_feature(self, x, idx_from, idx_to):
        return [self.net.embed(x), self.net(x)][idx_from : idx_to + 1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("bias", "fc"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("match", ["grad", "feat"])
def test_matchloss(metric, bias, fc, match) -> None:
    args = SimpleNamespace(match=match, metric=metric, bias=bias, fc=fc, idx_from=0, idx_to=1)
    model = Featured(nets.build("ConvNetD2W4", 2, 3, 8).double())
    real, syn = drawn(5, 2, 8, 8), drawn(2, 2, 8, 8, seed=1).requires_grad_()
    labels = torch.ones(5, dtype=torch.int64)
    found = matchloss(args, real, syn, labels, labels[:2], model)
    parameters = list(model.parameters())
    if match == "grad":
        g = torch.autograd.grad(cross_entropy(model(real), labels), parameters)
        s = torch.autograd.grad(
            cross_entropy(model(syn), labels[:2]), parameters, create_graph=True
        )
        pairs = [
            (a, b)
            for a, b in zip(g, s, strict=True)
            if (a.dim() > 1 or bias) and (a.dim() != 2 or fc)
        ]
    else:
        pairs = [
            (a.detach().mean(0), b.mean(0))
            for a, b in zip(*(model.get_feature(x, 0, 1) for x in (real, syn)), strict=True)
        ]
    expected = sum(written_out(a, b, metric) for a, b in pairs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(each, syn)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def test_nothing_to_match_is_none_and_unknown_words_are_refused() -> None:
    args = SimpleNamespace(match="grad", metric="mse", bias=False, fc=False)
    x, label = drawn(1, 2, 8, 8), torch.zeros(1, dtype=torch.int64)
    net = nets.build("MLP", 2, 3, 8).double()
    assert matchloss(args, x, x, label, label, net) is None
    with pytest.raises(ValueError, match=r"args\.match: got 'logits'"):
        matchloss(SimpleNamespace(match="logits"), x, x, label, label, net)
    with pytest.raises(ValueError, match="method: got 'l2', expected one of mse, l1"):
        dist(x, x, "l2")


def test_sums_and_names() -> None:
    one = torch.ones(())
    assert add_loss(None, one) is one and add_loss(one, one) == 2
    assert remove_aug("color_crop_cutout", "cutout") == "color_crop"
    assert remove_aug("color_crop", "flip_color") == "crop"
