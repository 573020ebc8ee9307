"""The presets against the published numbers, and DC's augmentation against SciPy and PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddfast.data import Dataset
from ddfast.evaluate import PROTOCOLS, Protocol, protocol, steps_matched
from ddfast.evaluate import dc_augmentation as module
from ddfast.evaluate.dc_augmentation import dc_augment, rotated

ALL = "color_crop_cutout_flip_scale_rotate"
NO_FLIP = "color_crop_cutout_scale_rotate"


def named(name: str) -> Dataset:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    return Dataset(name, images, labels, images, labels, ("a", "b"), (0.5,), (0.5,))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in PROTOCOLS
        if name not in ("ncfm", "linba", "rat_bptt", "frepo", "rfad", "krr", "kip")
    ],
)
def test_what_all_presets_share(name):
    chosen = protocol(name, named("CIFAR10"))
    assert chosen.name == name
    assert (chosen.lr, chosen.momentum, chosen.weight_decay) == (0.01, 0.9, 5e-4)
    assert chosen.batch == {"idc": 64, "m3d": 64, "datm": 128}.get(name, 256)


@pytest.mark.parametrize("name", ["dsa", "dm"])
@pytest.mark.parametrize(
    ("dataset", "strategy"),
    [("CIFAR10", ALL), ("FashionMNIST", ALL), ("MNIST", NO_FLIP), ("SVHN", NO_FLIP),
     ("digits", NO_FLIP), ("my own", ALL)],
)  # fmt: skip
def test_augmented_presets(name, dataset, strategy):
    for batchnorm in (False, True):
        chosen = protocol(name, named(dataset), batchnorm)
        assert (chosen.epochs, chosen.augmentation, chosen.strategy) == (1000, "dsa", strategy)
    assert protocol(name, named(dataset), dsa_strategy="crop").strategy == "crop"
    without = protocol(name, named(dataset), dsa_strategy="none")
    assert (without.epochs, without.augmentation, without.strategy) == (1000, "none", "")


@pytest.mark.parametrize(("ipc", "factor"), [(1, 1), (40, 2)])
@pytest.mark.parametrize(
    ("dataset", "strategy"),
    [("CIFAR10", "color_crop_flip_scale_rotate"), ("SVHN", "color_crop_scale_rotate"),
     ("MNIST", "color_crop_scale_rotate"), ("digits", "color_crop_scale_rotate")],
)  # fmt: skip
def test_m3d_mixes_always_and_cuts_out_never(dataset, strategy, ipc, factor):
    """IDC's preset has exceptions for SVHN and MNIST."""
    chosen = protocol("m3d", named(dataset), ipc=ipc, factor=factor)
    assert (chosen.epochs, chosen.schedule, chosen.cutmix) == (1500, "multistep", 0.5)
    assert (chosen.augmentation, chosen.strategy) == ("idc", strategy)
    assert protocol("m3d", named(dataset), dsa_strategy="crop").strategy == "crop"


@pytest.mark.parametrize(
    ("dataset", "batchnorm", "epochs", "augmentation", "strategy"),
    [
        ("CIFAR10", False, 300, "none", ""),
        ("digits", False, 300, "none", ""),
        ("FashionMNIST", False, 300, "none", ""),
        ("MNIST", False, 1000, "dc", "crop_scale_rotate"),
        ("MNIST", True, 1000, "dc", "crop_noise"),
        ("CIFAR10", True, 1000, "dc", "crop_noise"),
    ],
)
def test_dc(dataset, batchnorm, epochs, augmentation, strategy):
    chosen = protocol("dc", named(dataset), batchnorm)
    assert chosen.epochs == epochs
    assert (chosen.augmentation, chosen.strategy) == (augmentation, strategy)


@pytest.mark.parametrize(
    ("dataset", "batchnorm", "epochs", "augmentation", "strategy"),
    [
        ("CIFAR10", False, 600, "none", ""),
        ("digits", False, 600, "none", ""),
        ("MNIST", False, 1000, "dc", "crop_scale_rotate"),
        ("CIFAR10", True, 1000, "dc", "crop_noise"),
    ],
)
def test_cafe(dataset, batchnorm, epochs, augmentation, strategy):
    for given in (None, "none", "None"):
        chosen = protocol("cafe", named(dataset), batchnorm, dsa_strategy=given)
        assert chosen.epochs == epochs
        assert (chosen.augmentation, chosen.strategy) == (augmentation, strategy)
    with_dsa = protocol("cafe", named(dataset), batchnorm, dsa_strategy="color_crop")
    assert (with_dsa.epochs, with_dsa.augmentation, with_dsa.strategy) == (
        1000, "dsa", "color_crop"
    )  # fmt: skip


def test_overrides_and_steps():
    chosen = protocol("dm", named("CIFAR10"), epochs=20, batch=64, lr=0.1)
    assert (chosen.epochs, chosen.batch, chosen.lr, chosen.passes) == (20, 64, 0.1, 21)
    assert [place for place in range(21) if chosen.decay(place) != 1] == [11]
    assert chosen.steps(64) == 21
    assert chosen.steps(65) == 42
    assert protocol("dm", named("CIFAR10")).steps(100) == 1001


@pytest.mark.parametrize(
    ("epochs", "images", "full", "passes"),
    [
        (1000, 100, 1438, 167),  # 1001 steps; 6 steps a pass
        (1000, 10, 256, 1001),
        (1000, 500, 50_000, 30),  # 2002 steps would be 11 passes
        (300, 100, 1438, 51),
        (10, 100, 1438, 11),  # never more than the protocol has
        (1000, 10_000, 50_000, 205),
    ],
)
def test_steps_matched(epochs, images, full, passes):
    chosen = Protocol("dm", epochs)
    matched = steps_matched(chosen, images, full)
    assert matched.epochs + 1 == passes
    if 30 < passes <= epochs:
        assert chosen.steps(images) <= matched.steps(full)
        assert matched.steps(full) - chosen.steps(images) < math.ceil(full / 256)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"epochs": -1}, "epochs must be an integer of at least 0, got -1"),
        (ValueError, {"epochs": True}, "epochs"),
        (TypeError, {"epochs": 2.5}, "epochs must be an integer, got 2.5"),
        (ValueError, {"batch": 0}, "batch"),
        (ValueError, {"lr": 0.0}, "lr"),
        (ValueError, {"lr": math.nan}, "lr"),
        (ValueError, {"dsa_strategy": "crop_spin"}, "spin"),
    ],
)
def test_bad_overrides(error, arguments, message):
    with pytest.raises(error, match=message):
        protocol("dm", named("CIFAR10"), **arguments)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"protocol must be one of dc, .*, got 'matching'"):
        protocol("matching", named("CIFAR10"))
    with pytest.raises(ValueError, match="dsa_strategy has no meaning"):
        protocol("dc", named("CIFAR10"), dsa_strategy="crop")
    with pytest.raises(ValueError, match="augmentation must be"):
        Protocol("mine", 1, "mixup")


# --- DC's augmentation --------------------------------------------------------------------------


def pictures(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=g, dtype=torch.float64)


@pytest.mark.parametrize("size", [(28, 28), (8, 11), (2, 5)])
def test_rotations_are_scipy_s(size):
    ndimage = pytest.importorskip("scipy.ndimage")
    degrees = torch.arange(-45, 45)
    x = pictures(len(degrees), 2, *size)
    found = rotated(x, degrees, torch.tensor(0.3, dtype=torch.float64))
    for image, angle, ours in zip(x.numpy(), degrees.tolist(), found.numpy(), strict=True):
        turned = ndimage.rotate(image, angle, axes=(-2, -1), cval=0.3)
        top, left = (int((t - s) / 2) for t, s in zip(turned.shape[1:], size, strict=True))
        wanted = turned[:, top : top + size[0], left : left + size[1]]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-11)


def test_crops_move_and_fill_with_the_means():
    x = pictures(400, 2, 9, 7, seed=1)
    found = dc_augment(x, "crop", torch.Generator().manual_seed(3))
    fill = x.mean((0, 2, 3)).view(2, 1, 1).expand(2, 17, 15)
    seen = set()
    for image, moved in zip(x, found, strict=True):
        canvas = fill.clone()
        canvas[:, 4:13, 4:11] = image
        matches = [
            (r, c)
            for r in range(8)
            for c in range(8)
            if torch.equal(canvas[:, r : r + 9, c : c + 7], moved)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 60  # of 64


def test_scales_are_nearest_neighbours_on_a_centred_canvas():
    x = pictures(300, 1, 10, 10, seed=2)
    found = dc_augment(x, "scale", torch.Generator().manual_seed(3))
    seen = set()
    for image, scaled in zip(x, found, strict=True):
        matches = []
        for h in range(8, 12):
            for w in range(8, 12):
                side = max(h, w, 10)
                canvas = torch.zeros(1, side, side, dtype=x.dtype)
                top, left = int((side - h) / 2), int((side - w) / 2)
                canvas[:, top : top + h, left : left + w] = F.interpolate(image[None], [h, w])[0]
                edge = int((side - 10) / 2)
                if torch.equal(canvas[:, edge : edge + 10, edge : edge + 10], scaled):
                    matches.append((h, w))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 16


def test_one_operation_an_image_from_the_strategy():
    x = pictures(600, 1, 8, 8)
    before = x.clone()
    found = dc_augment(x, "crop_noise", torch.Generator().manual_seed(5))
    assert torch.equal(x, before)
    change = (found - x).flatten(1)
    noisy = (change.abs().amax(1) < 0.01) & (change.abs().amin(1) > 0)
    assert 240 < int(noisy.sum()) < 360
    assert 0.00095 < float(change[noisy].std()) < 0.00105
    again = dc_augment(x, "crop_noise", torch.Generator().manual_seed(5))
    assert torch.equal(found, again)
    with pytest.raises(ValueError, match="got 'flip' in 'crop_flip'"):
        dc_augment(x, "crop_flip", torch.Generator())
    assert module.OPERATIONS == ("crop", "scale", "rotate", "noise")


def test_rotations_are_drawn_from_minus_45_to_44(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "rotated", lambda x, degrees, fill: drawn.append(degrees) or x)
    x = pictures(3000, 1, 2, 2)
    dc_augment(x, "rotate", torch.Generator().manual_seed(1))
    assert drawn[0].unique().tolist() == list(range(-45, 45))


def test_one_image_of_one_pixel_s_height():
    for name in module.OPERATIONS:
        x = pictures(1, 3, 2, 6).float()
        found = dc_augment(x, name, torch.Generator().manual_seed(2))
        assert found.shape == x.shape and found.dtype == x.dtype and torch.isfinite(found).all()
