"""Features, class means of the maps and their vector-Jacobian product, against autograd."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import nn

from ddfast import engine, nets
from ddfast.nets import initialise

NORMS = ("instancenorm", "none", "groupnorm", "batchnorm", "layernorm")
FUSED = ("instancenorm", "none", "groupnorm")
ACTIVATIONS = ("relu", "leakyrelu", "sigmoid", "swish")
POOLINGS = ("avgpooling", "maxpooling", "none")
COUNTS = [2, 3, 1]
BOUND = 1e-12


def exact(net, images, counts, by_features=None, by_maps=None):
    """Features, class means of the activations (from hooks) and gradient, in plain torch."""
    net.fused = False
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, given, out: seen.append(out))
        for layer in net.features
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU))
    ]
    leaf = images.clone().requires_grad_()
    out = net.embed(leaf)
    for hook in hooks:
        hook.remove()
    net.fused = True
    maps = [
        torch.stack([p.mean(0) if len(p) else 0 * a[0] for p in a.split(counts)])
        if sum(counts)
        else a.new_zeros(len(counts), *a.shape[1:])
        for a in seen
    ]
    total = 0
    if by_features is not None:
        total = total + (out * by_features).sum()
    for mean, by_mean in zip(maps, by_maps or (), strict=False):
        total = total + (mean * by_mean).sum()
    gradient = None
    if isinstance(total, torch.Tensor):
        gradient = torch.autograd.grad(total, leaf)[0]
    return out.detach(), [m.detach() for m in maps], gradient


def like(tensor, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=random, dtype=tensor.dtype)


def close(tools, found, expected, bound=BOUND):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert not found.requires_grad
    assert not found.is_inference()
    assert tools.relative(found, expected) < bound


def compare(
    tools, net, counts=COUNTS, shape=(3, 8, 8), bound=BOUND, dtype=torch.float64, **options
):
    images, _ = tools.batch(counts, shape, dtype)
    before = images.clone()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    plain = engine.features(net, images, **options)
    layered = engine.features(net, images, counts, keep=True, layers=True, **options)
    only = engine.features(net, images, counts, layers=True, **options)
    by_features = like(plain.features, 3)
    by_maps = [like(m, 4 + number) for number, m in enumerate(layered.maps)]
    features, maps, both = exact(net, images, counts, by_features, by_maps)
    assert len(maps) == len(layered.maps) > 0
    for found in (plain, layered, only):
        close(tools, found.features, features, bound)
    for number, expected in enumerate(maps):
        close(tools, layered.maps[number], expected, bound)
        close(tools, only.maps[number], expected, bound)
    for _ in range(2):  # as often as one likes
        close(tools, layered.backward(by_features, by_maps), both, bound)
    _, _, alone = exact(net, images, counts, by_features)
    close(tools, layered.backward(by_features), alone, bound)
    kept = engine.features(net, images, keep=True, **options)
    assert kept.maps == []
    close(tools, kept.backward(by_features), alone, bound)
    _, _, of_maps = exact(net, images, counts, None, by_maps)
    close(tools, layered.backward(None, by_maps), of_maps, bound)
    assert not layered.backward(None).any()
    assert torch.equal(images, before)
    for name, value in net.named_parameters():
        assert value.grad is None
        assert value.requires_grad
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize(
    ("norm", "activation", "pooling"), list(itertools.product(NORMS, ACTIVATIONS, POOLINGS))
)
def test_equals_autograd(engine_tools, norm, activation, pooling) -> None:
    compare(engine_tools, engine_tools.make(norm, activation, pooling))


@pytest.mark.parametrize(
    ("size", "channels", "depth", "width"),
    [
        ((7, 9), 3, 2, 5),  # odd planes lose their last row or column
        ((28, 28), 1, 3, 4),  # padding 3 in the first convolution
        ((4, 4), 4, 1, 20),
        ((8, 8), 1, 3, 17),  # ends in single pixels
        ((16, 16), 3, 3, 32),
        ((16, 8), 5, 2, 32),
        ((32, 32), 3, 3, 16),
    ],
)
@pytest.mark.parametrize("norm", FUSED)
@pytest.mark.parametrize("algorithm", ["auto", "direct"])
def test_sizes(engine_tools, size, channels, depth, width, norm, algorithm) -> None:
    width = -(-width // 4) * 4 if norm == "groupnorm" else width
    net = engine_tools.make(norm, "relu", "avgpooling", size, depth, width, channels)
    shape = (channels, *size)
    compare(engine_tools, net, [2, 3], shape, path="fused", algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_float32_is_as_exact_as_torch(engine_tools, algorithm, pooling) -> None:
    """Errors against float64, ours at most twice torch's (Winograd's kernels have their own)."""
    single = engine_tools.make("instancenorm", "swish", pooling, (16, 16), 3, 32)
    single = single.float()
    images, _ = engine_tools.batch([20, 12], (3, 16, 16), torch.float32)
    found = engine.features(
        single, images, [20, 12], keep=True, layers=True, path="fused", algorithm=algorithm
    )
    by_features = like(found.features, 3)
    by_maps = [like(m, 4) for m in found.maps]
    gradient = found.backward(by_features, by_maps)
    eager = exact(single, images, [20, 12], by_features, by_maps)
    double = exact(
        single.double(),
        images.double(),
        [20, 12],
        by_features.double(),
        [g.double() for g in by_maps],
    )
    tiny = 4e-6 if algorithm != "direct" else 2e-7
    ours = [found.features, *found.maps, gradient]
    for a, b, wanted in zip(ours, flat(eager), flat(double), strict=True):
        assert a.dtype == torch.float32
        error, allowed = (engine_tools.relative(t.double(), wanted) for t in (a, b))
        assert error <= 2 * allowed + tiny


def flat(result):
    return [result[0], *result[1], result[2]]


@pytest.mark.parametrize("norm", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_changes_no_bits(engine_tools, norm, dtype) -> None:
    net = engine_tools.make(norm, size=(16, 16), depth=3, width=32, dtype=dtype)
    images, _ = engine_tools.batch([9], (3, 16, 16), dtype)
    kept = engine.features(net, images, [4, 5], keep=True, layers=True)
    assert torch.equal(engine.features(net, images).features, kept.features)
    dropped = engine.features(net, images, [4, 5], layers=True)
    assert torch.equal(dropped.features, kept.features)
    assert all(torch.equal(a, b) for a, b in zip(dropped.maps, kept.maps, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bits(engine_tools, threads) -> None:
    net = engine_tools.make(size=(16, 16), depth=3, width=32, dtype=torch.float32)
    images, _ = engine_tools.batch([9, 4], (3, 16, 16), torch.float32)
    before = torch.get_num_threads()
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            found = engine.features(net, images, [9, 4], keep=True, layers=True)
            by_maps = [like(m, 3) for m in found.maps]
            gradient = found.backward(like(found.features, 2), by_maps)
        finally:
            torch.set_num_threads(before)
        results.append([found.features, *found.maps, gradient])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("together", [1, 2, 3, 5])
@pytest.mark.parametrize("counts", [[4, 0, 2, 7, 1], [0, 5], [3, 0, 0]])
def test_pieces_change_nothing_beyond_rounding(engine_tools, together, counts, monkeypatch) -> None:
    module = importlib.import_module("ddfast.engine.features")
    net = engine_tools.make()
    outputs, inputs = module.recognise(net).elements((3, 8, 8))
    monkeypatch.setattr(module, "CACHE", together * 8 * (outputs + inputs))
    compare(engine_tools, net, counts)


@pytest.mark.parametrize("counts", [[0], [0, 0]])
@pytest.mark.parametrize("norm", ["instancenorm", "layernorm"])
def test_no_images(engine_tools, counts, norm) -> None:
    net = engine_tools.make(norm)
    images, _ = engine_tools.batch(counts)
    found = engine.features(net, images, counts, keep=True, layers=True)
    assert found.features.shape == (0, net.classifier.in_features)
    assert [m.shape for m in found.maps] == [(len(counts), 8, 8, 8), (len(counts), 8, 4, 4)]
    assert not any(m.any() for m in found.maps)
    assert found.backward(found.features).shape == images.shape


def test_other_images_do_not_matter(engine_tools) -> None:
    net = engine_tools.make(size=(16, 16), width=32)
    images, _ = engine_tools.batch([12], (3, 16, 16))
    together = engine.features(net, images).features
    apart = torch.cat([engine.features(net, part).features for part in images.split(5)])
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ResNet18BN", "ResNet18", "VGG11", "AlexNet", "MLP", "ConvNetBN"])
@pytest.mark.parametrize("training", [True, False])
def test_networks_through_autograd(engine_tools, name, training) -> None:
    random = torch.Generator().manual_seed(3)
    net = nets.build(name, 3, 10, (32, 32), random).double().train(training)
    images, _ = engine_tools.batch([4, 3], (3, 32, 32))
    found = engine.features(net, images, keep=True)
    assert net.training is training
    by_features = like(found.features, 5)
    leaf = images.clone().requires_grad_()
    features = net.embed(leaf)
    close(engine_tools, found.features, features.detach())
    (features * by_features).sum().backward()
    close(engine_tools, found.backward(by_features), leaf.grad)
    close(engine_tools, engine.features(net, images).features, features.detach())
    with pytest.raises(ValueError, match="path: 'fused' cannot serve this"):
        engine.features(net, images, path="fused")
    if not name.startswith("ConvNet"):
        with pytest.raises(ValueError, match=f"layers: {type(net).__name__} has no blocks"):
            engine.features(net, images, [4, 3], layers=True)


def test_frozen_networks_and_fresh_weights(engine_tools) -> None:
    net = engine_tools.make().requires_grad_(False)
    images, _ = engine_tools.batch([3])
    kept = engine.features(net, images, keep=True)
    by_features = like(kept.features, 3)
    _, _, gradient = exact(net, images, [3], by_features)
    close(engine_tools, kept.backward(by_features), gradient)
    initialise(net, torch.Generator().manual_seed(99))
    with pytest.raises(RuntimeError, match="net: its weights have changed"):
        kept.backward(by_features)
    assert not torch.equal(engine.features(net, images).features, kept.features)


def test_gradients_flow_around_not_through(engine_tools) -> None:
    net = engine_tools.make()
    images, _ = engine_tools.batch([3])
    found = engine.features(net, images.requires_grad_(), keep=True)
    by_features = like(found.features, 3).requires_grad_()
    assert not found.features.requires_grad
    assert not found.backward(by_features).requires_grad
    close(engine_tools, found.features, engine.features(net, images, path="general").features)


def test_hooks_are_respected(engine_tools) -> None:
    net = engine_tools.make()
    images, _ = engine_tools.batch([3])
    calls: list[int] = []
    net.features[0].register_forward_hook(lambda module, given, out: calls.append(1))
    engine.features(net, images)
    assert calls == [1]


def test_errors_name_the_argument(engine_tools) -> None:
    net = engine_tools.make()
    images, _ = engine_tools.batch([2, 3])
    with pytest.raises(ValueError, match=r"counts: got \[2, 2\], expected .* sum to 5"):
        engine.features(net, images, [2, 2])
    with pytest.raises(ValueError, match="counts: got"):
        engine.features(net, images, [6, -1])
    with pytest.raises(ValueError, match="counts: needed with layers"):
        engine.features(net, images, layers=True)
    with pytest.raises(TypeError, match="images: expected a floating-point"):
        engine.features(net, images.long())
    with pytest.raises(ValueError, match=r"images: got \(3, 8, 8\)"):
        engine.features(net, images[0])
    with pytest.raises(ValueError, match=r"images: got torch\.float32"):
        engine.features(net, images.float())
    with pytest.raises(ValueError, match="path: got 'fast'"):
        engine.features(net, images, path="fast")
    with pytest.raises(ValueError, match="algorithm: got 'fft'"):
        engine.features(net, images, algorithm="fft")
    with pytest.raises(TypeError, match=r"net: Linear has no method embed"):
        engine.features(nn.Linear(2, 2, device="meta"), images)
    with pytest.raises(ValueError, match="images: got 2 channels, expected 3"):
        engine.features(net, images[:, :2])
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: engine.features(net, x[None]).features)(images)

    found = engine.features(net, images, [2, 3], layers=True)
    with pytest.raises(RuntimeError, match="keep: nothing was kept"):
        found.backward(found.features)
    kept = engine.features(net, images, [2, 3], keep=True, layers=True)
    with pytest.raises(ValueError, match=r"by_features: got \(2, 32\), expected \(5, 32\)"):
        kept.backward(kept.features[:2])
    with pytest.raises(ValueError, match=r"by_features: got torch\.float32"):
        kept.backward(kept.features.float())
    with pytest.raises(ValueError, match="by_maps: got 1 tensors, expected 2"):
        kept.backward(None, kept.maps[:1])
    with pytest.raises(ValueError, match=r"by_maps\[1\]: got \(2, 8, 8, 8\)"):
        kept.backward(None, [kept.maps[0], kept.maps[0]])
    plain = engine.features(net, images, keep=True)
    with pytest.raises(ValueError, match="by_maps: got 2 tensors, expected 0"):
        plain.backward(None, kept.maps)


def test_images_at_once(engine_tools) -> None:
    net = engine_tools.make(size=(32, 32), depth=3, width=128, dtype=torch.float32)
    few, many = (engine.images_at_once(net, (3, 32, 32), "1GiB", keep) for keep in (True, False))
    assert 100 < few < 1000
    assert 20 < many < 200  # the cache
    assert engine.images_at_once(net, (3, 32, 32), "16MiB", True) < few
    assert engine.images_at_once(net, (3, 32, 32), None, True) == few
    other = engine_tools.make("batchnorm", size=(32, 32), depth=3, width=128, dtype=torch.float32)
    kept, dropped = (
        engine.images_at_once(other, (3, 32, 32), "1GiB", keep) for keep in (True, False)
    )
    assert 0 < kept < dropped
    with pytest.raises(ValueError, match="memory: the budget of 1000 bytes is too small"):
        engine.images_at_once(net, (3, 32, 32), 1000, False)
    with pytest.raises(ValueError, match="memory: the budget of 1000 bytes is too small"):
        engine.images_at_once(other, (3, 32, 32), 1000, True)
    with pytest.raises(ValueError, match=r"image_shape: got \(32, 32\)"):
        engine.images_at_once(net, (32, 32), None, True)
