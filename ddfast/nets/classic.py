"""MLP, LeNet and AlexNet as the DC family sizes them for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from ddfast.nets.network import Network, Size, at_least, margin


class MLP(Network):
    """Two hidden layers of 128 units. Parameters ``fc_1``, ``fc_2``, ``fc_3``.

    Args: as :class:`~ddfast.nets.convnet.ConvNet`.
    """

    def __init__(self, channels: int, classes: int, size: Size) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(channels * size[0] * size[1], 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, classes)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc_3

    def embed(self, images: Tensor) -> Tensor:
        return relu(self.fc_2(relu(self.fc_1(images.flatten(1)))))


class LeNet(Network):
    """Two 5x5 convolutions and three linear layers (LeCun et al. 1998), with ReLU and max pooling.

    Parameters ``features.0``, ``features.3``, ``fc_1``, ``fc_2``, ``fc_3``. ``embed`` is the 84
    units before ``fc_3`` (the official LeNet has no embed).

    Raises:
        ValueError: a side of ``size`` is under 16 pixels.
    """

    def __init__(self, channels: int, classes: int, size: Size) -> None:
        super().__init__()
        extra = margin(channels, size)
        at_least("LeNet", size, 16, extra)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=extra),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        height, width = (((side + 2 * extra - 4) // 2 - 4) // 2 for side in size)
        self.fc_1 = nn.Linear(16 * height * width, 120)
        self.fc_2 = nn.Linear(120, 84)
        self.fc_3 = nn.Linear(84, classes)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc_3

    def embed(self, images: Tensor) -> Tensor:
        return relu(self.fc_2(relu(self.fc_1(self.features(images).flatten(1)))))


class AlexNet(Network):
    """Five convolutions and one linear layer, ``fc``; no dropout. ``batchnorm``: the BN variant.

    Raises:
        ValueError: a side of ``size`` is under 8 pixels.
    """

    def __init__(self, channels: int, classes: int, size: Size, batchnorm: bool = False) -> None:
        super().__init__()
        extra = margin(channels, size)
        at_least("AlexNet", size, 8, extra)
        layers: list[nn.Module] = []
        inputs = channels
        # outputs, kernel, padding, and whether a 2x2 max pooling follows
        for outputs, kernel, padding, pooled in (
            (128, 5, 2 + extra, True),
            (192, 5, 2, True),
            (256, 3, 1, False),
            (192, 3, 1, False),
            (192, 3, 1, True),
        ):
            layers.append(nn.Conv2d(inputs, outputs, kernel, padding=padding))
            if batchnorm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU())
            if pooled:
                layers.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*layers)
        height, width = ((side + 2 * extra) // 8 for side in size)
        self.fc = nn.Linear(192 * height * width, classes)

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def embed(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(1)
