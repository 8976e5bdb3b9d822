"""Pieces that several families share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1; no bias, since a norm follows."""
    return nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False)


def pooled(x: Tensor) -> Tensor:
    """Mean over space: [B, C, H, W] to [B, C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def kaiming_init(model: nn.Module) -> None:
    """Initialise in place: normal weights of variance 2 / fan-out (He et al. 2015, eq. 14), norms 1 and 0, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            # Fan-in: the outputs of a classifier are few, and must not start large.
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            nn.init.zeros_(module.bias)
