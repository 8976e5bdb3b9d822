"""ImageNet-type ResNets (He et al. 2016, table 1; stride in the 3x3 convolution), with a stem that fits small images.

Names of parameters are torchvision's, so its checkpoints load (all but `conv1` where the stem is a small one).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from chipdeploy.training.models.layers import conv1x1, conv3x3, kaiming_init, pooled
from chipdeploy.training.models.registry import register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, four times as wide at the end."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Four stages of `blocks[i]` blocks, 64 to 512 planes.

    The stem divides the size of the image by 1 up to 32 pixels, by 2 up to 64, by 4 above (7x7 and max-pool).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        self.conv1, self.maxpool = _stem(in_channels, image_size)
        self.bn1 = nn.BatchNorm2d(64)
        wide = block.expansion
        self.layer1 = _stage(block, 64, 64, blocks[0], 1)
        self.layer2 = _stage(block, 64 * wide, 128, blocks[1], 2)
        self.layer3 = _stage(block, 128 * wide, 256, blocks[2], 2)
        self.layer4 = _stage(block, 256 * wide, 512, blocks[3], 2)
        self.fc = nn.Linear(512 * wide, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to logits [B, num_classes]."""
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(pooled(out))
        return logits


def _stem(in_channels: int, image_size: int) -> tuple[nn.Conv2d, nn.Module]:
    if image_size <= 64:
        return conv3x3(in_channels, 64, 1 if image_size <= 32 else 2), nn.Identity()
    return nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
    first = block(inputs, planes, stride, downsample)
    return nn.Sequential(first, *(block(outputs, planes, 1, None) for _ in range(blocks - 1)))


register("resnet18")(partial(ResNet, BasicBlock, (2, 2, 2, 2)))
register("resnet50")(partial(ResNet, Bottleneck, (3, 4, 6, 3)))
register("resnet101")(partial(ResNet, Bottleneck, (3, 4, 23, 3)))
