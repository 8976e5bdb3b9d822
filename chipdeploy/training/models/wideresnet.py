"""Wide pre-activation ResNet for small images (Zagoruyko and Komodakis 2016), without dropout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from chipdeploy.training.models.layers import conv1x1, conv3x3, kaiming_init, pooled
from chipdeploy.training.models.registry import register


class WideBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input; elsewhere it is the raw input.
    """

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.shortcut = conv1x1(inputs, planes, stride) if stride != 1 or inputs != planes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv1(active)
        out = self.conv2(F.relu(self.bn2(out)))
        branch: Tensor = out + (x if self.shortcut is None else self.shortcut(active))
        return branch


class WideResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 times `widen` channels."""

    def __init__(self, blocks: int, widen: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.layer1 = _stage(16, 16 * widen, blocks, 1)
        self.layer2 = _stage(16 * widen, 32 * widen, blocks, 2)
        self.layer3 = _stage(32 * widen, 64 * widen, blocks, 2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.linear = nn.Linear(64 * widen, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to logits [B, num_classes]."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.linear(pooled(F.relu(self.bn(out))))
        return logits


def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = WideBlock(inputs, planes, stride)
    return nn.Sequential(first, *(WideBlock(planes, planes, 1) for _ in range(blocks - 1)))


@register("wideresnet26-12")
def wideresnet26_12(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """WideResNet-26-12: 26 = stem + 3 stages of 4 blocks of 2 convolutions + classifier, 12 times as wide."""
    return WideResNet(4, 12, num_classes, in_channels)
