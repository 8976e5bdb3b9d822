"""ResNets for small images: three stages of 16, 32 and 64 channels, depth 6n + 2 (He et al. 2016, section 4.2)."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from chipdeploy.training.models.layers import conv1x1, conv3x3, kaiming_init, pooled
from chipdeploy.training.models.registry import register

_DEPTHS = (20, 32, 44, 56, 110)


class PadShortcut(nn.Module):
    """Option-A shortcut, without weights: every `stride`-th pixel, then zero channels on both sides.

    The three numbers are attributes read at every call, so that surgery can change how many zero channels stay.
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, before + C + after, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, before={self.before}, after={self.after}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6 `blocks` + 2.

    Args:
        blocks: blocks in each of the three stages.
        num_classes: width of the classifier.
        in_channels: channels of the images.
        projected: option B, shortcuts that change shape are a 1x1 convolution and a norm; else option A, padding.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, projected)
        self.layer2 = _stage(16, 32, blocks, 2, projected)
        self.layer3 = _stage(32, 64, blocks, 2, projected)
        self.linear = nn.Linear(64, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to logits [B, num_classes]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(pooled(out))
        return logits


def _stage(inputs: int, planes: int, blocks: int, stride: int, projected: bool) -> nn.Sequential:
    first = BasicBlock(inputs, planes, stride, _shortcut(inputs, planes, stride, projected))
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, nn.Identity()) for _ in range(blocks - 1)))


def _shortcut(inputs: int, planes: int, stride: int, projected: bool) -> nn.Module:
    if stride == 1 and inputs == planes:
        return nn.Identity()
    if projected:
        return nn.Sequential(conv1x1(inputs, planes, stride), nn.BatchNorm2d(planes))
    # A stage doubles its channels: half of `planes` is new, a quarter on each side.
    return PadShortcut(stride, planes // 4, planes // 4)


def _build(depth: int, projected: bool, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return CifarResNet((depth - 2) // 6, num_classes, in_channels, projected)


for _depth in _DEPTHS:
    register(f"resnet{_depth}")(partial(_build, _depth, False))
    register(f"resnet{_depth}-b")(partial(_build, _depth, True))
