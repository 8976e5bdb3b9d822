"""MobileNetV2 (Sandler et al. 2018, table 2), with strides that fit small images.

Names of parameters are torchvision's, so its checkpoints load.
"""

from __future__ import annotations

from torch import Tensor, nn

from chipdeploy.training.models.layers import conv1x1, kaiming_init, pooled
from chipdeploy.training.models.registry import register

# Rows of table 2: expansion t, channels c, repeats n, stride s.
_ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_LAST = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 projection; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        steps: list[nn.Module] = [] if expansion == 1 else [_conv_norm(inputs, hidden, kernel=1)]
        steps += [
            _conv_norm(hidden, hidden, stride=stride, groups=hidden),
            conv1x1(hidden, outputs),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*steps)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Divides the size of the image by 8 up to 32 pixels, by 16 up to 64, by 32 above."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv_norm(in_channels, 32, stride=1 if image_size <= 32 else 2)]
        inputs = 32
        for expansion, channels, repeats, table_stride in _ROWS:
            stride = 1 if channels == 24 and image_size <= 64 else table_stride
            for index in range(repeats):
                features.append(InvertedResidual(inputs, channels, stride if index == 0 else 1, expansion))
                inputs = channels
        features.append(_conv_norm(inputs, _LAST, kernel=1))
        self.features = nn.Sequential(*features)
        # Dropout as in the ImageNet recipe; the usual ones for small images have none.
        self.classifier = nn.Sequential(nn.Dropout(0.2 if image_size > 64 else 0.0), nn.Linear(_LAST, num_classes))
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] to logits [B, num_classes]."""
        logits: Tensor = self.classifier(pooled(self.features(x)))
        return logits


def _conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


register("mobilenetv2")(MobileNetV2)
