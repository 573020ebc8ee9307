"""What official scripts import beside the losses: networks, loops, data, one pass, the evaluation.

The official behaviour is written out here with torch's own means.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ddfast import nets
from ddfast.compat import dc, mtt
from ddfast.data import load
from ddfast.testing import unchanged


def flags(**changes) -> SimpleNamespace:
    found = {
        "device": "cpu",
        "lr_net": 0.05,
        "epoch_eval_train": 3,
        "batch_train": 4,
        "dsa": False,
        "dc_aug_param": None,
        "dsa_strategy": "color_crop_cutout_scale_rotate",
        "dsa_param": dc.ParamDiffAug(),
    }
    return SimpleNamespace(**found | changes)


def labelled(count: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=random)
    return torch.randn(count, 2, 8, 8, generator=random), labels


def network() -> nn.Module:
    return nets.build("ConvNetD1W4", 2, 3, 8)


def test_loops_are_the_published_ones_and_defined_everywhere() -> None:
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: dc.get_loops(ipc) for ipc in published} == published
    assert (dc.get_loops(5), dc.get_loops(1000)) == ((5, 100), (1000, 1))
    with pytest.raises(ValueError, match="ipc: got 0"):
        dc.get_loops(0)


def test_pools_of_networks() -> None:
    assert dc.get_eval_pool("S", "ConvNetBN", "MLP") == ["ConvNet"]
    assert dc.get_eval_pool("SS", "ConvNetBN", "MLP") == ["ConvNetBN"]
    assert dc.get_eval_pool("other", "ConvNet", "MLP") == ["MLP"]
    assert mtt.get_eval_pool("S", "ConvNetD4", "MLP") == ["ConvNetD4"]
    assert mtt.get_eval_pool("C", "MLP", "AlexNet") == ["MLP", "ConvNet"]
    assert mtt.get_eval_pool("SS", "ConvNet", "MLP") == ["MLP"]
    assert mtt.get_eval_pool("W", "ConvNet", "MLP") == dc.get_eval_pool("W", "ConvNet", "MLP")
    for pool in (dc.EVALUATED, mtt.EVALUATED):
        for name in (name for names in pool.values() for name in names):
            assert nets.build(name, 3, 10, 32)


@pytest.mark.uses_global_random_state
def test_networks_begin_as_those_of_torch_do_and_follow_from_the_seed() -> None:
    torch.manual_seed(3)
    ours = [dc.get_network("MLP", 3, 10), mtt.get_network("MLP", 3, 10, (32, 32), dist=False)]
    torch.manual_seed(3)
    for net in ours:
        layers = [nn.Linear(3072, 128), nn.Linear(128, 128), nn.Linear(128, 10)]
        for found, layer in zip(net.children(), layers, strict=True):
            assert torch.equal(found.weight.cpu(), layer.weight)
            assert torch.equal(found.bias.cpu(), layer.bias)
    with pytest.raises(ValueError, match="unknown network 'ConvMet'"):
        dc.get_network("ConvMet", 3, 10)


def test_time_is_printed_as_the_scripts_print_it() -> None:
    assert len(dc.get_time()) == len("[2026-01-31 23:59:59]")


def test_a_tensor_dataset_is_detached_and_float32() -> None:
    images, labels = labelled()
    dataset = dc.TensorDataset(images.double().requires_grad_(), labels)
    assert len(dataset) == 10 and dataset.images.dtype == torch.float32
    image, label = dataset[3]
    assert not image.requires_grad and torch.equal(image, images[3]) and label == labels[3]


@pytest.mark.uses_global_random_state  # a loader draws a seed for its workers
def test_data_comes_as_the_scripts_take_it() -> None:
    expected = load("digits")
    channel, im_size, num_classes, names, mean, std, train, test, loader = dc.get_dataset(
        "digits", "nowhere"
    )
    assert (channel, im_size, num_classes, names[3]) == (1, (8, 8), 10, "3")
    assert (tuple(mean), tuple(std)) == (expected.mean, expected.std)
    assert (len(train), len(test)) == (len(expected.train_labels), len(expected.test_labels))
    image, label = train[5]
    assert label == int(expected.train_labels[5]) and isinstance(label, int)
    assert torch.equal(image, expected.normalised(expected.train_images[5:6])[0])
    images = torch.cat([batch for batch, _ in loader])
    assert torch.equal(images, expected.normalised(expected.test_images))
    with pytest.raises(ValueError, match="unknown data set 'Digit'"):
        dc.get_dataset("Digit", "nowhere")


# --- DC's augmentation ----------------------------------------------------------------------------


def test_daparam() -> None:
    published = {"crop": 4, "scale": 0.2, "rotate": 45, "noise": 0.001}
    assert dc.get_daparam("CIFAR10", "ConvNet", "ConvNet", 1) == published | {"strategy": "none"}
    assert dc.get_daparam("MNIST", "MLP", "MLP", 1)["strategy"] == "crop_scale_rotate"
    assert dc.get_daparam("MNIST", "MLP", "ConvNetBN", 1)["strategy"] == "crop_noise"


@pytest.mark.uses_global_random_state
def test_augment_leaves_its_input_alone_and_refuses_other_settings() -> None:
    images, _ = labelled()
    parameters = dc.get_daparam("MNIST", "MLP", "MLP", 1)
    torch.manual_seed(1)
    with unchanged(images):
        first = dc.augment(images, parameters, device="cpu")
    torch.manual_seed(1)
    assert torch.equal(first, dc.augment(images, parameters, device="cpu"))
    assert not torch.equal(first, images)
    for none in (None, parameters | {"strategy": "none"}):
        assert dc.augment(images, none, device="cpu") is images
    with pytest.raises(ValueError, match=r"dc_aug_param\['crop'\]: got 8, expected 4"):
        dc.augment(images, parameters | {"crop": 8}, device="cpu")


# --- one pass, and the evaluation -----------------------------------------------------------------


def literal_pass(loader, net, optimiser=None, augment=None) -> tuple[float, float]:
    total = right = count = 0
    for images, labels in loader:
        logits = net(images if augment is None else augment(images))
        loss = nn.functional.cross_entropy(logits, labels)
        total, count = total + loss.item() * len(labels), count + len(labels)
        right += int((logits.argmax(1) == labels).sum())
        if optimiser is not None:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return total / count, right / count


@pytest.mark.uses_global_random_state
@pytest.mark.parametrize("scripts", [dc, mtt])
@pytest.mark.parametrize("dsa", [False, True])
def test_an_epoch_trains_or_tests(scripts, dsa) -> None:
    loader = DataLoader(dc.TensorDataset(*labelled()), batch_size=4)
    args, nets_of, results = flags(dsa=dsa), [], []
    augment = None
    if dsa:
        strategy, param = args.dsa_strategy, args.dsa_param
        augment = lambda x: scripts.DiffAugment(x, strategy, param=param)  # noqa: E731
    for ours in (True, False):
        torch.manual_seed(7)
        net = network()
        optimiser = torch.optim.SGD(net.parameters(), 0.1)
        if ours:
            criterion = nn.CrossEntropyLoss()
            results.append(
                scripts.epoch("train", loader, net, optimiser, criterion, args, aug=True)
            )
            assert net.training
            results.append(scripts.epoch("test", loader, net, optimiser, criterion, args, False))
            assert not net.training
        else:
            results.append(literal_pass(loader, net, optimiser, augment))
            results.append(literal_pass(loader, net))
        nets_of.append(net)
    assert results[:2] == [pytest.approx(each, rel=1e-6) for each in results[2:]]
    for a, b in zip(*(net.parameters() for net in nets_of), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.uses_global_random_state
@pytest.mark.parametrize("epochs", [0, 3, 4])
def test_the_evaluation_follows_the_official_schedule(capsys, epochs) -> None:
    """One epoch more than it says; the momentum forgotten when the rate falls; the same draws."""
    images, labels = labelled()
    args = flags(epoch_eval_train=epochs)
    testloader = DataLoader(dc.TensorDataset(*labelled(7, seed=1)), batch_size=4)
    torch.manual_seed(5)
    net, train, test = dc.evaluate_synset(3, network(), images, labels, testloader, args)
    after = torch.random.get_rng_state()

    torch.manual_seed(5)
    expected, lr, history = network(), args.lr_net, []
    rule = {"momentum": 0.9, "weight_decay": 0.0005}
    optimiser = torch.optim.SGD(expected.parameters(), lr, **rule)
    loader = DataLoader(dc.TensorDataset(images, labels), batch_size=4, shuffle=True)
    for index in range(epochs + 1):
        history.append(literal_pass(loader, expected, optimiser))
        if index == epochs // 2 + 1:
            lr *= 0.1
            optimiser = torch.optim.SGD(expected.parameters(), lr, **rule)
    tested = literal_pass(testloader, expected)
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (train, test) == (pytest.approx(history[-1][1]), pytest.approx(tested[1]))
    assert torch.equal(after, torch.random.get_rng_state())
    assert f"Evaluate_03: epoch = {epochs:04d}" in capsys.readouterr().out

    torch.manual_seed(5)
    _, accuracies, _, losses, loss = mtt.evaluate_synset(
        0, network(), images, labels, testloader, args, return_loss=True
    )
    assert losses == pytest.approx([each for each, _ in history], rel=1e-5)
    assert accuracies == pytest.approx([each for _, each in history])
    assert math.isclose(loss, tested[0], rel_tol=1e-5)


def test_textures_are_refused() -> None:
    for function, arguments in ((mtt.epoch, [None] * 7), (mtt.evaluate_synset, [None] * 6)):
        with pytest.raises(ValueError, match="texture: got True"):
            function(*arguments, texture=True)
