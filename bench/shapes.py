"""The BatchNorm layers of ResNet-50, derived from the architecture.

He et al., "Deep Residual Learning for Image Recognition" (2015), table 1, with the stride in the 3x3 convolution, as
torchvision and most others build it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_PLANES = (64, 128, 256, 512)
_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4
_IMAGE = 224


@dataclass(frozen=True)
class LayerShape:
    """A BatchNorm2d input shape without the batch, and the number of layers with it."""

    channels: int
    height: int
    width: int
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.channels, self.height, self.width)


def resnet50() -> tuple[LayerShape, ...]:
    """The 12 distinct shapes of ResNet-50's 53 BatchNorm layers at 224x224, in network order."""
    size = _IMAGE // 2  # the first convolution has stride 2
    layers = [(64, size)]
    size //= 2  # the max pooling
    for stage, (planes, blocks) in enumerate(zip(_PLANES, _BLOCKS)):
        stride = 1 if stage == 0 else 2
        for block in range(blocks):
            layers.append((planes, size))  # after the first 1x1 convolution, which keeps the size
            if block == 0:
                size //= stride
            layers.append((planes, size))  # after the 3x3 convolution, which has the stride
            layers.append((planes * _EXPANSION, size))  # after the second 1x1 convolution
            if block == 0:
                layers.append((planes * _EXPANSION, size))  # the projection of the shortcut
    return tuple(LayerShape(channels, side, side, count) for (channels, side), count in Counter(layers).items())


def quick() -> tuple[LayerShape, ...]:
    """Four different shapes: the largest, one with wide rows, a medium one, and the smallest, with odd 7x7 rows."""
    chosen = {"64x112x112", "256x56x56", "256x14x14", "2048x7x7"}
    return tuple(shape for shape in resnet50() if shape.name in chosen)


def tiny() -> tuple[LayerShape, ...]:
    """An input so small that Python, dispatch and the launch dominate."""
    return (LayerShape(8, 2, 2),)


SHAPE_SETS = {"resnet50": resnet50, "quick": quick, "tiny": tiny}
