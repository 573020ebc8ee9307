"""VGG11 with instance or batch normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from ddfast.nets.network import Network, Size, at_least, margin, normalisation

# Channels of each 3x3 convolution; None is a 2x2 max pooling. Configuration A of the paper.
_VGG11 = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)


class VGG11(Network):
    """Simonyan and Zisserman 2015, configuration A, with one linear layer, for small images.

    Args: as :class:`~ddfast.nets.convnet.ConvNet`; ``norm`` is ``"instancenorm"`` or
    ``"batchnorm"``. Parameters ``features.<i>``, ``classifier``. The official classifier takes 512
    features, one plane of a 32x32 image; for larger images it grows here.

    Raises:
        ValueError: a side of ``size`` is under 32 pixels (grey 28x28 is padded to 32x32).
    """

    classifier: nn.Linear

    def __init__(self, channels: int, classes: int, size: Size, norm: str = "instancenorm") -> None:
        super().__init__()
        extra = margin(channels, size)
        at_least("VGG11", size, 32, extra)
        height, width = (side + 2 * extra for side in size)
        layers: list[nn.Module] = []
        inputs, padding = channels, 1 + extra
        for outputs in _VGG11:
            if outputs is None:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
                continue
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=padding))
            norm_layer = normalisation(norm, (outputs, height, width))
            if norm_layer is not None:
                layers.append(norm_layer)
            layers.append(nn.ReLU())
            inputs, padding = outputs, 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * height * width, classes)

    def embed(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(1)
