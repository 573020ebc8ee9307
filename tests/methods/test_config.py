"""Published settings, the rules where there are none, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ddfast import methods
from ddfast.data import Dataset, generated
from ddfast.methods import dc, dm, dsa


@pytest.fixture
def named(make_dataset):
    def make(name: str, size: int = 8) -> Dataset:
        return dataclasses.replace(make_dataset([3, 3], size=(size, size)), name=name)

    return make


@pytest.mark.parametrize(
    ("ipc", "loops"),
    [
        *dc.LOOPS.items(),
        *((2, (2, 250)), (5, (5, 100)), (100, (100, 5)), (600, (600, 1))),
    ],
)
@pytest.mark.parametrize("method", [dc, dsa])
def test_loops(named, method, ipc, loops) -> None:
    config = methods.resolve(method.Config(ipc=ipc), named("CIFAR10"))
    assert (config.outer_loop, config.inner_loop) == loops


def test_the_rule_for_loops_meets_the_published_ones_where_it_can() -> None:
    for ipc in (10, 20, 50):
        assert dc.LOOPS[ipc] == (ipc, 500 // ipc)


@pytest.mark.parametrize(
    ("name", "ipc", "lr_img", "strategy"),
    [
        ("CIFAR10", 1, 1.0, "color_crop_cutout_flip_scale_rotate"),
        ("CIFAR10", 50, 1.0, "color_crop_cutout_flip_scale_rotate"),
        ("CIFAR10", 100, 10.0, "color_crop_cutout_flip_scale_rotate"),
        ("CIFAR100", 125, 1.0, "color_crop_cutout_flip_scale_rotate"),
        ("MNIST", 10, 1.0, "color_crop_cutout_scale_rotate"),
        ("SVHN", 10, 1.0, "color_crop_cutout_scale_rotate"),
        ("FashionMNIST", 10, 1.0, "color_crop_cutout_flip_scale_rotate"),
    ],
)
def test_published_settings_of_dm(named, name, ipc, lr_img, strategy) -> None:
    config = methods.resolve(dm.Config(ipc=ipc), named(name, 32))
    assert (config.iterations, config.init, config.batch_real) == (20001, "real", 256)
    assert (config.momentum, config.lr_img, config.dsa_strategy) == (0.5, lr_img, strategy)
    assert config.model == "ConvNet"


def test_published_settings_of_dc_and_dsa(named) -> None:
    plain = methods.resolve(dc.Config(ipc=10), named("MNIST", 28))
    assert (plain.iterations, plain.init, plain.lr_img, plain.momentum) == (1001, "noise", 0.1, 0.5)
    assert (plain.lr_net, plain.batch_train, plain.batch_real) == (0.01, 256, 256)
    assert (plain.dis_metric, plain.model) == ("ours", "ConvNet")
    assert not hasattr(plain, "dsa_strategy")
    assert methods.resolve(dc.Config(ipc=1, model="MLP"), named("MNIST")).lr_img == 0.01
    augmented = methods.resolve(dsa.Config(ipc=10), named("MNIST", 28))
    assert augmented.dsa_strategy == "color_crop_cutout_scale_rotate"
    same = {"init": "real", "dsa_strategy": augmented.dsa_strategy}
    assert methods.as_json(augmented) == methods.as_json(plain) | same


@pytest.mark.parametrize(
    ("size", "model"),
    [(8, "ConvNetD1"), (16, "ConvNetD2"), (28, "ConvNet"), (32, "ConvNet"), (64, "ConvNetD4"),
     (128, "ConvNetD5"), (224, "ConvNetD5")],
)  # fmt: skip
def test_depth_of_the_network_follows_the_size(named, size, model) -> None:
    assert methods.resolve(dm.Config(ipc=1), named("own", size)).model == model


def test_what_is_given_stays(named) -> None:
    given = {"iterations": 7, "lr_img": 3, "model": "MLP", "init": "noise", "dsa_strategy": "crop"}
    config = methods.resolve(dm.Config(ipc=1, **given), named("CIFAR10"))
    assert {name: getattr(config, name) for name in given} == given
    assert isinstance(config.lr_img, float)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ipc": 0}, ValueError, "ipc: got 0, expected at least 1"),
        ({"ipc": 1.5}, TypeError, "ipc: got 1.5, expected an integer"),
        ({"ipc": True}, TypeError, "ipc: got True"),
        ({"ipc": None}, TypeError, "ipc: got None, expected an integer"),
        ({"seed": "x"}, TypeError, "seed: got 'x'"),
        ({"lr_img": 0}, ValueError, "lr_img: got 0.0, expected more than 0"),
        ({"lr_img": float("nan")}, ValueError, "lr_img: got nan, expected a finite number"),
        ({"momentum": 1}, ValueError, "momentum: got 1.0, expected less than 1"),
        ({"iterations": 0}, ValueError, "iterations: got 0"),
        ({"batch_real": -1}, ValueError, "batch_real: got -1"),
        ({"init": "zeros"}, ValueError, "init: got 'zeros', expected 'real' or 'noise'"),
        ({"data_options": [1]}, TypeError, "data_options: got"),
        ({"data_options": {"a": object()}}, TypeError, "data_options: got"),
        ({"dis_metric": "l7"}, ValueError, "dis_metric: got 'l7'"),
        ({"inner_loop": -1}, ValueError, "inner_loop: got -1"),
        ({"momentum": None}, TypeError, "momentum: got None, expected a number"),
    ],
)
def test_bad_values_are_named(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        dc.Config(**{"ipc": 1} | settings)


def test_a_config_for_another_data_set_is_refused() -> None:
    dataset = generated(classes=2, size=8, train_per_class=2, test_per_class=1)
    with pytest.raises(ValueError, match=r"dataset: the config says 'CIFAR10', .* 'generated'"):
        methods.resolve(dm.Config(dataset="CIFAR10", ipc=1), dataset)


def test_spelling_of_the_data_set_makes_no_difference(named) -> None:
    a = methods.resolve(dm.Config(dataset="cifar-10", ipc=1), named("CIFAR10"))
    b = methods.resolve(dm.Config(ipc=1, data_path="/elsewhere"), named("CIFAR10"))
    assert methods.as_json(a) == methods.as_json(b)
    assert json.loads(json.dumps(methods.as_json(a))) == methods.as_json(a)


def test_every_setting_has_a_line_of_help_and_a_name_of_its_own() -> None:
    for method in methods.methods().values():
        for field in dataclasses.fields(method.config):
            text = field.metadata["help"]
            assert 5 < len(text) < 90, field.name
            assert "\n" not in text


def test_methods_are_found_by_name() -> None:
    assert methods.find("DM") is not None
    assert methods.find("dsa").config is dsa.Config
    with pytest.raises(
        ValueError, match=r"got 'dmm' \(did you mean dm\?\), expected one of dm, cafe"
    ):
        methods.find("dmm")
