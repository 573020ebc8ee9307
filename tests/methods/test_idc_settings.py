"""IDC's settings against the table in the published code, and the rules for other data sets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ddfast import methods
from ddfast.data import Dataset
from ddfast.methods import idc, idc_i


@pytest.fixture
def named(make_dataset):
    def make(name: str, size: int, channels: int, classes: int = 2) -> Dataset:
        made = make_dataset([2] * classes, channels=channels, size=(size, size))
        return dataclasses.replace(made, name=name)

    return make


def resolved(dataset: Dataset, method: Any = idc, **settings: Any) -> idc.Config:
    return methods.resolve(method.Config(**settings), dataset)


@pytest.mark.parametrize(
    ("name", "size", "channels", "metric", "base", "n_data"),
    [
        ("CIFAR10", 32, 3, "mse", 5e-3, 2000),
        ("CIFAR100", 32, 3, "mse", 5e-3, 2000),
        ("SVHN", 32, 3, "mse", 5e-3, 500),
        ("MNIST", 28, 1, "l1", 1e-4, 500),
        ("FashionMNIST", 28, 1, "l1", 1e-4 * 28**2 / 32**2, 500),  # base size 32 in the code
    ],
)
@pytest.mark.parametrize("ipc", [1, 10, 50])
@pytest.mark.parametrize("method", [idc, idc_i])
def test_small_images(named, method, ipc, name, size, channels, metric, base, n_data) -> None:
    config = resolved(named(name, size, channels), method, ipc=ipc)
    assert config.factor == (2 if method is idc else 1)
    assert (config.metric, config.n_data) == (metric, n_data)
    assert config.lr_img == pytest.approx(base * ipc / 10, rel=1e-12)
    assert (config.iterations, config.inner_loop, config.early) == (2000, 100, 0)
    assert (config.lr_net, config.momentum_net, config.weight_decay) == (0.01, 0.9, 5e-4)
    assert (config.batch_real, config.batch_train, config.batch_syn_max) == (64, 64, 128)
    assert (config.momentum, config.decode_type, config.init) == (0.5, "single", "mix")
    assert (config.model, config.step) == ("ConvNet", "joint")
    plain = name == "MNIST" and method is idc  # neither cutout nor CutMix
    assert config.aug_type == ("color_crop" if plain else "color_crop_cutout")
    assert config.cutmix == (0 if plain else 0.5)


@pytest.mark.parametrize(
    ("classes", "ipc", "settings"),
    [
        (10, 10, {"lr_img": 3e-3, "early": 10, "decode_type": "single", "lr_net": 0.01}),
        (10, 20, {"lr_img": 6e-3, "early": 10, "decode_type": "bound", "weight_decay": 5e-4}),
        (100, 10, {"lr_img": 1e-3, "early": 5, "lr_net": 0.1, "batch_train": 128}),
        (100, 20, {"lr_img": 2e-3, "decode_type": "bound", "weight_decay": 1e-4}),
    ],
)
def test_imagenet(named, classes, ipc, settings) -> None:
    dataset = named("imagenette", 224, 3, classes)
    config = resolved(dataset, ipc=ipc)
    expected = {"factor": 3, "metric": "l1", "n_data": 500, "iterations": 500, "cutmix": 1.0}
    expected |= {"batch_real": 64, "aug_type": "color_crop_cutout", "model": "ResNetAP10"}
    for name, value in {**expected, **settings}.items():
        found = getattr(config, name)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), name
    single = resolved(dataset, idc_i, ipc=ipc)
    assert (single.factor, single.decode_type) == (1, "single")


@pytest.mark.parametrize(
    ("name", "size", "channels", "kin"),
    [("digits", 8, 1, "MNIST"), ("own", 16, 1, "FashionMNIST"), ("own", 64, 3, "CIFAR10"),
     ("generated", 16, 3, "CIFAR10"), ("own", 65, 3, "ImageNet"), ("SVHN", 32, 3, "SVHN")],
)  # fmt: skip
def test_other_data_sets_are_treated_as_their_kin(named, name, size, channels, kin) -> None:
    dataset = named(name, size, channels)
    assert idc.kin(dataset) == kin
    if name == "own" and size == 64:
        assert resolved(dataset, ipc=10).lr_img == pytest.approx(5e-3 * 4)
    if name == "generated":
        assert resolved(dataset, ipc=10).lr_img == pytest.approx(5e-3 / 4)


def test_digits(named) -> None:
    both = {method: resolved(named("digits", 8, 1), method, ipc=10) for method in (idc, idc_i)}
    assert both[idc].factor == 1 and both[idc].cutmix == both[idc_i].cutmix == 0.5
    divided = resolved(named("digits", 8, 1), ipc=10, factor=2)
    assert divided.factor == 2 and divided.cutmix == 0 and divided.aug_type == "color_crop"
    assert resolved(named("own", 16, 3), ipc=10).factor == 2  # cells of 8 pixels
    for config in both.values():
        assert (config.metric, config.model, config.iterations) == ("l1", "ConvNetD2W32", 10)
        assert config.lr_img == idc.DIGITS_LR


def test_networks_see_a_small_data_set_at_most_four_times(named, make_dataset) -> None:
    """One batch where that is less; the published values for the published sets."""
    digits = named("digits", 8, 1)
    assert resolved(digits, ipc=1).n_data == 64
    hundred = make_dataset([50, 50], channels=1)
    assert resolved(hundred, ipc=1, inner_loop=1).n_data == 400
    assert resolved(hundred, ipc=1, inner_loop=4).n_data == 100
    assert resolved(digits, ipc=1, n_data=500).n_data == 500
    assert resolved(named("MNIST", 28, 1), ipc=1).n_data == 500


def test_iterations_follow_the_image_updates_of_each(named) -> None:
    assert resolved(named("CIFAR10", 32, 3), ipc=1, inner_loop=50).iterations == 4000
    assert resolved(named("CIFAR10", 32, 3), ipc=1, inner_loop=50, iterations=7).iterations == 7


def test_how_the_images_are_kept(named) -> None:
    dataset = named("CIFAR10", 32, 3)
    assert resolved(dataset, idc_i, ipc=1).decoder((32, 32)) is None
    expected = {"name": "multi_formation", "factor": 2, "kind": "single"}
    assert resolved(dataset, ipc=1).decoder((32, 32)) == expected
    assert idc.Config.space == idc_i.Config.space == "pixel"


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (idc, {"factor": 0}, "factor: got 0"),
        (idc, {"cutmix": 1.5}, "cutmix: got 1.5, expected a probability"),
        (idc, {"aug_type": "color_spin"}, "spin"),
        (idc, {"metric": "l2"}, "metric: got 'l2', expected 'mse' or 'l1' or 'cos'"),
        (idc, {"step": "each"}, "step: got 'each'"),
        (idc, {"init": "random"}, "init: got 'random', expected 'mix' or 'real' or 'noise'"),
        (idc, {"decode_type": "zoom"}, "decode_type: got 'zoom'"),
        (idc, {"batch_syn_max": 0}, "batch_syn_max: got 0"),
        (idc_i, {"factor": 2}, "factor: got 2, and idc_i is idc with factor 1"),
    ],
)
def test_bad_values_are_named(method, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        method.Config(ipc=1, **settings)
