"""ResNet-18 for small images, with strided convolutions or with average pooling (AP)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from ddfast.nets.network import Network, Size, at_least, normalisation


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016); ``stride`` 2 halves the plane.

    With ``average`` the convolutions keep stride 1, and average pooling does the halving: after
    the first ReLU, and after the convolution of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, average: bool) -> None:
        super().__init__()
        convolution_stride, pool = (1, stride) if average else (stride, 1)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, convolution_stride, padding=1, bias=False)
        self.bn1 = _norm(norm, outputs)
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _norm(norm, outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, convolution_stride, bias=False))
            if average:  # kept where it does nothing, so that the normalisation stays number 2
                self.shortcut.append(nn.AvgPool2d(pool))
            self.shortcut.append(_norm(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.pool(relu(self.bn1(self.conv1(x))))
        return relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(Network):
    """Four stages of two blocks, 64 to 512 channels, after one 3x3 convolution (no max pooling).

    Parameters ``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``layer2.0.shortcut.0``, ...,
    ``classifier``; ``bn`` also names instance normalisations, as in the official code.

    The features are pooled by 4x4 averages (``average`` True: not pooled), so that 28x28 and 32x32
    images give 512 of them; larger images give more, and the classifier grows.

    Small images: a stage halves its planes only as long as both sides keep two pixels. Up to 8
    pixels (15 with ``average``) the last planes would be single pixels, of which an instance
    normalisation leaves nothing: the official network would answer alike for every image. Larger
    images meet the official network exactly; parameter shapes are always the official ones.

    Args: as :class:`~ddfast.nets.convnet.ConvNet`; ``norm`` is ``"instancenorm"`` or
    ``"batchnorm"``; ``average`` for the AP variant.

    Raises:
        ValueError: a side of ``size`` is under 2 pixels.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    classifier: nn.Linear

    def __init__(
        self,
        channels: int,
        classes: int,
        size: Size,
        norm: str = "instancenorm",
        average: bool = False,
    ) -> None:
        super().__init__()
        at_least("ResNet18", size, 2)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = _norm(norm, 64)
        inputs, plane = 64, size
        for stage, outputs in enumerate((64, 128, 256, 512)):
            smaller = _halved(plane, average)
            stride = 2 if stage > 0 and min(smaller) >= 2 else 1
            if stride == 2:
                plane = smaller
            first = Block(inputs, outputs, stride, norm, average)
            second = Block(outputs, outputs, 1, norm, average)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, second))
            inputs = outputs
        self.pool = (1, 1) if average else (min(4, plane[0]), min(4, plane[1]))
        features = inputs * (plane[0] // self.pool[0]) * (plane[1] // self.pool[1])
        self.classifier = nn.Linear(features, classes)

    def embed(self, images: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        if self.pool != (1, 1):
            x = avg_pool2d(x, self.pool)
        return x.flatten(1)


def _halved(plane: Size, average: bool) -> Size:
    # A strided convolution with padding 1 rounds up, a pooling rounds down.
    up = 0 if average else 1
    return (plane[0] + up) // 2, (plane[1] + up) // 2


def _norm(kind: str, channels: int) -> nn.Module:
    layer = normalisation(kind, (channels, 1, 1)) if kind in ("instancenorm", "batchnorm") else None
    if layer is None:
        raise ValueError(f"norm must be 'instancenorm' or 'batchnorm', got {kind!r}")
    return layer
