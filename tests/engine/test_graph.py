"""The matching step as a CUDA graph; needs a GPU."""

from __future__ import annotations

import pytest
import torch

from ddfast import engine, nets


@pytest.mark.gpu
def test_a_replayed_step_equals_the_direct_one(engine_tools) -> None:
    net = engine_tools.make(size=(16, 16), width=32, dtype=torch.float32).cuda()
    counts = [3] * 10
    names = engine.weight_names(net)
    for seed in range(3):
        nets.initialise(net, torch.Generator().manual_seed(seed))  # in place: replayed, not anew
        images, labels = engine_tools.batch(counts, (3, 16, 16), torch.float32, seed)
        real = [g.cuda() for g in engine_tools.real_gradients(net, names, 10, seed)]
        arguments = (net, images.cuda(), labels.cuda(), counts, real)
        losses, gradient = engine.match_gradients(*arguments)
        again, replayed = engine.match_gradients(*arguments, graph=True)
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-6)
        error = (replayed - gradient).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
        assert error.median() < 1e-5
        assert (error > 1e-4).double().mean() <= 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[3] * 10, [1, 2, 3]])
def test_the_fused_engine_on_the_gpu_equals_double_backward(engine_tools, counts) -> None:
    net = engine_tools.make(size=(16, 16), width=16)
    images, labels = engine_tools.batch(counts, (3, 16, 16))
    names = engine.weight_names(net)
    real = engine_tools.real_gradients(net, names, len(counts))
    expected_losses, expected = engine_tools.double_backward(
        net, images, labels, counts, real, names
    )
    losses, gradient = engine.match_gradients(
        *(net.cuda(), images.cuda(), labels.cuda(), counts, [g.cuda() for g in real]), path="fused"
    )
    assert engine_tools.relative(losses.cpu(), expected_losses) < 1e-10
    assert engine_tools.relative(gradient.cpu(), expected) < 1e-10
