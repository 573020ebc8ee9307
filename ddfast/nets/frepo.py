"""FRePo's ConvNet, whose blocks widen and begin with their normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from ddfast.nets.initialisation import LeCunConv2d, LeCunLinear
from ddfast.nets.network import Network, Size, margin, normalisation

# Flax's momentum of 0.1 is the share of the old value, torch's that of the new one.
MOMENTUM = 0.9


class FRePoNet(Network):
    """Blocks of 3x3 convolution, ReLU and 2x2 average pooling, each twice as wide as the last.

    Zhou, Nezhadarya and Ba, Dataset Distillation using Neural Feature Regression (FRePo), NeurIPS
    2022, section 4.1: 128, 256 and 512 channels, so that the features number as many as in wide
    networks while the large planes stay thin. Every block but the first begins with a
    normalisation. Weights are LeCun's normal, cut off at two standard deviations as Flax draws it,
    biases 0. Running statistics move by nine tenths at each batch. (Flax keeps the variance of the
    batch as it is, torch times n / (n - 1).)

    Args:
        channels: of the images.
        classes: number of logits.
        size: (H, W) of the images, in pixels.
        depth: number of blocks.
        width: channels of the first block.
        norm: `"batchnorm"`, `"instancenorm"`, `"layernorm"`, `"groupnorm"` or `"none"`.

    Raises:
        ValueError: an unknown normalisation; a depth that would pool the image away.
    """

    classifier: nn.Linear

    def __init__(
        self,
        channels: int,
        classes: int,
        size: Size,
        depth: int = 3,
        width: int = 128,
        norm: str = "batchnorm",
    ) -> None:
        super().__init__()
        extra = margin(channels, size)
        height, side = size[0] + 2 * extra, size[1] + 2 * extra
        deepest = min(height, side).bit_length() - 1
        if depth > deepest:
            raise ValueError(
                f"depth {depth} is too deep for images of {size[0]}x{size[1]}: each block halves "
                f"the plane, so the maximum depth is {deepest}"
            )
        layers: list[nn.Module] = []
        inputs, padding = channels, 1 + extra
        for block in range(depth):
            outputs = width << block
            before = normalisation(norm, (inputs, height, side)) if block else None
            if isinstance(before, nn.BatchNorm2d):
                before.momentum = MOMENTUM
            if before is not None:
                layers.append(before)
            layers += [
                LeCunConv2d(inputs, outputs, 3, padding=padding),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            inputs, padding = outputs, 1
            height, side = height // 2, side // 2
        self.features = nn.Sequential(*layers)
        self.classifier = LeCunLinear(inputs * height * side, classes)

    def embed(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(1)
