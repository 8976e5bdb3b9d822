"""What stands in for the modules of a branch that is gone: tensors with no channels, and zeros."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class NoChannels(nn.Module):
    """A layer whose outputs were all cut: [N, *, H, W] ▶ [N, 0, H', W'].

    One channel of zeros stands there where the branch runs on, to layers that are stubs as well: pools and views do not
    work on nothing.
    """

    def __init__(self, layer: nn.Module, channels: int = 0) -> None:
        super().__init__()
        self.geometry = Geometry.of(layer)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.geometry.shape(x.shape, self.channels))


class Still(nn.Module):
    """A module whose whole inside was cut, and whose output has its input's shape: zeros. The export drops the sum."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.paired = isinstance(module, nn.MultiheadAttention)  # which returns its weights, or None, as well

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.paired else zeros


class Zeros(nn.Module):
    """A layer whose inputs were all cut: [N, 0, H, W] ▶ zeros [N, channels, H', W']. The export drops the sum."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.geometry = Geometry.of(layer)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.geometry.shape(x.shape, self.channels))


class Geometry:
    """Output shape of a convolution, linear or norm layer, for a given input."""

    def __init__(self, windows: tuple[tuple[int, int, int, int], ...] | None, last: bool) -> None:
        self._windows = windows  # kernel, stride, padding before + after, dilation for each spatial dimension
        self._last = last  # channels along the last dimension

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        if isinstance(layer, nn.Linear):
            return cls(None, last=True)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return cls(None, last=False)
        padding = [2 * p for p in cast("tuple[int, ...]", layer.padding)] if layer.padding != "valid" else None
        if layer.padding == "same":
            padding = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = padding or [0] * len(layer.kernel_size)
        return cls(tuple(zip(layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)), last=False)

    def shape(self, before: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """Shape of the layer's output, with this many channels, for an input of the shape `before`."""
        if self._last:
            return (*before[:-1], channels)
        sizes = tuple(before[2:])
        if self._windows is not None:
            sizes = tuple(
                (size + p - d * (k - 1) - 1) // s + 1 for size, (k, s, p, d) in zip(sizes, self._windows, strict=True)
            )
        return (before[0], channels, *sizes)
