"""Networks and their training as the official DC and MTT scripts have them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from ddfast import nets
from ddfast.evaluate import dc_augmentation

__all__ = ["TensorDataset", "augment", "get_daparam", "get_network", "get_time"]

#: The parameters of `augment`: fixed in the official script, and here.
PUBLISHED = {
    "crop": dc_augmentation.CROP,
    "scale": dc_augmentation.SCALE,
    "rotate": dc_augmentation.ROTATE,
    "noise": dc_augmentation.NOISE,
}

Augment = Callable[[Tensor], Tensor]


class TensorDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images, as float32, and their labels.

    Args:
        images: (N, channels, H, W), of any dtype.
        labels: (N,), of any dtype.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.detach().float()
        self.labels = labels.detach()

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __len__(self) -> int:
        return len(self.images)


def get_network(
    model: str, channel: int, num_classes: int, im_size: tuple[int, int] = (32, 32)
) -> nets.Network:
    """A network by its official name, on the GPU if there is one.

    Its weights are the ones that the official constructor would draw from torch's global generator.
    Unlike the official function it does not reseed that generator from the clock before.

    Args:
        model: any name that `ddfast.nets.build` knows.
        channel: of the images.
        num_classes: number of logits.
        im_size: (H, W) of the images in pixels.

    Raises:
        TypeError, ValueError: as `ddfast.nets.build` (the official script exits).
    """
    net = nets.build(model, channel, num_classes, im_size, torch.default_generator)
    return net.to("cuda" if torch.cuda.is_available() else "cpu")


def get_time() -> str:
    """The time of day as the scripts print it, [2026-01-31 23:59:59]."""
    return time.strftime("[%Y-%m-%d %H:%M:%S]", time.localtime())


def get_daparam(dataset: str, model: str, model_eval: str, ipc: int) -> dict[str, Any]:
    """The parameters of `augment` for an evaluation.

    Args:
        dataset: "MNIST" gets crops, scales and rotations, any other the strategy "none".
        model: of no effect.
        model_eval: "ConvNetBN" gets crops and noise, whatever the data set.
        ipc: of no effect.
    """
    strategy = "crop_scale_rotate" if dataset == "MNIST" else "none"
    if model_eval == "ConvNetBN":
        strategy = "crop_noise"
    return {**PUBLISHED, "strategy": strategy}


def augment(images: Tensor, dc_aug_param: dict[str, Any] | None, device: Any) -> Tensor:
    """DC's augmentation of training images, an operation for each image.

    Its numbers come from torch's global generator (the official ones from NumPy's). It returns new
    images and leaves those given as they are, which the official function overwrites.

    Args:
        images: (N, channels, H, W), floating point.
        dc_aug_param: as `get_daparam` returns it, or None for none.
        device: of the result.

    Returns:
        (N, channels, H, W); the images themselves where there is nothing to do.

    Raises:
        ValueError: an unknown operation; parameters other than the published ones.
    """
    if dc_aug_param is None or dc_aug_param["strategy"] == "none":
        return images
    for name, value in PUBLISHED.items():
        if dc_aug_param.get(name, value) != value:
            raise ValueError(
                f"dc_aug_param[{name!r}]: got {dc_aug_param[name]}, expected {value}, which is "
                "fixed here"
            )
    strategy = dc_aug_param["strategy"]
    return dc_augmentation.dc_augment(images, strategy, torch.default_generator).to(device)


def augmented(args: Any, aug: bool, diff_augment: Callable[..., Tensor]) -> Augment | None:
    """What `epoch` does to images, by the official flags."""
    if not aug:
        return None
    if args.dsa:
        return lambda images: diff_augment(images, args.dsa_strategy, param=args.dsa_param)
    return lambda images: augment(images, args.dc_aug_param, args.device)


def epoch(
    mode: str,
    dataloader: Iterable[Sequence[Tensor]],
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    args: Any,
    augment: Augment | None,
) -> tuple[float, float]:
    """One pass over a loader, see `ddfast.compat.dc.epoch`."""
    training = mode == "train"
    net = net.to(args.device).train(training)
    criterion = criterion.to(args.device)
    total = torch.zeros(2, dtype=torch.float64, device=args.device)
    count = 0
    with torch.set_grad_enabled(training):
        for images, labels, *_ in dataloader:
            images, labels = images.float().to(args.device), labels.long().to(args.device)
            logits = net(images if augment is None else augment(images))
            loss = criterion(logits, labels)
            right = (logits.detach().argmax(1) == labels).sum()
            # One transfer from the device at the end, not two a batch.
            total += torch.stack([loss.detach() * len(labels), right]).double()
            count += len(labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    loss_avg, acc_avg = (total / count).tolist()
    return loss_avg, acc_avg


class History(NamedTuple):
    """What a training came to: one number an epoch, and the test."""

    train_losses: list[float]
    train_accuracies: list[float]
    test_loss: float
    test_accuracy: float


def train_and_test(
    it_eval: int,
    net: nn.Module,
    images_train: Tensor,
    labels_train: Tensor,
    testloader: Iterable[Sequence[Tensor]],
    args: Any,
    augment: Augment | None,
) -> History:
    """The work of `ddfast.compat.dc.evaluate_synset`."""
    lr, epochs = float(args.lr_net), int(args.epoch_eval_train)
    net, criterion = net.to(args.device), nn.CrossEntropyLoss()
    images, labels = images_train.to(args.device), labels_train.to(args.device)
    dataset = TensorDataset(images, labels)
    # Whole batches are taken from the tensors: the order is that of DataLoader(shuffle=True), its
    # collecting of single images is not needed.
    batches = BatchSampler(RandomSampler(dataset), int(args.batch_train), drop_last=False)
    loader: Any = DataLoader(dataset, sampler=batches, batch_size=None)

    def optimiser() -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)

    began, current = time.time(), optimiser()
    losses, accuracies = list[float](), list[float]()
    for index in range(epochs + 1):
        loss, accuracy = epoch("train", loader, net, current, criterion, args, augment)
        losses.append(loss)
        accuracies.append(accuracy)
        if index == epochs // 2 + 1:
            lr *= 0.1
            current = optimiser()
    seconds = time.time() - began
    test = epoch("test", testloader, net, current, criterion, args, None)
    print(
        f"{get_time()} Evaluate_{it_eval:02d}: epoch = {epochs:04d} train time = {seconds:.0f} s "
        f"train loss = {losses[-1]:.6f} train acc = {accuracies[-1]:.4f}, test acc = {test[1]:.4f}"
    )
    return History(losses, accuracies, *test)
