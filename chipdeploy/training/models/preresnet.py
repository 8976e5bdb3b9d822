"""Pre-activation bottleneck ResNet for small images, depth 9n + 2 (He et al. 2016, "Identity mappings")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from chipdeploy.training.models.layers import conv1x1, conv3x3, kaiming_init, pooled
from chipdeploy.training.models.registry import register

_EXPANSION = 4


class PreActBottleneck(nn.Module):
    """Norm and ReLU before each of the 1x1, 3x3 and 1x1 convolutions.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input; elsewhere it is the raw input.
    """

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * _EXPANSION
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv1x1(inputs, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, outputs)
        self.shortcut = conv1x1(inputs, outputs, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv1(active)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        branch: Tensor = out + (x if self.shortcut is None else self.shortcut(active))
        return branch


class PreResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 planes."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16 * _EXPANSION, 32, blocks, 2)
        self.layer3 = _stage(32 * _EXPANSION, 64, blocks, 2)
        self.bn = nn.BatchNorm2d(64 * _EXPANSION)
        self.linear = nn.Linear(64 * _EXPANSION, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to logits [B, num_classes]."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.linear(pooled(F.relu(self.bn(out))))
        return logits


def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    outputs = planes * _EXPANSION
    first = PreActBottleneck(inputs, planes, stride)
    return nn.Sequential(first, *(PreActBottleneck(outputs, planes, 1) for _ in range(blocks - 1)))


@register("preresnet164")
def preresnet164(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """PreResNet-164: 18 blocks a stage."""
    return PreResNet(18, num_classes, in_channels)
