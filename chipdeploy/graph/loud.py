"""Weights that hide nothing: with those of a fresh network, a wrong cut may leave no trace in the output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GAIN = 1.4  # √2 keeps magnitudes through layers with ReLUs


def randomize(model: nn.Module, gain: float = GAIN, seed: int = 0, *, positive: bool = False) -> nn.Module:
    """Weights of which nothing is zero, small or alike, in place; returns the model.

    Weights of layers get a standard deviation of gain / √fan_in. Biases, norms' affines, layer scales and gains are
    0.3 ± 0.5, so are buffers of zeros, statistics of norms random, tables of positions and tokens ± 0.5.

    positive: none of the 0.3 ± 0.5 below zero, for networks that put some of them through a ReLU.
    """
    draw = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen and parameter.is_floating_point():
                    seen.add(id(parameter))
                    values = _values(module, name, parameter, gain, draw)
                    parameter.copy_(values.abs_() if positive and _flat(parameter) else values)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(_normal(buffer, draw) * 0.3)
                elif name == "running_var":
                    buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
                elif buffer.is_floating_point() and not buffer.any():  # a factor that grows in training
                    buffer.copy_(_normal(buffer, draw) * 0.5 + 0.3)
    return model


def _values(module: nn.Module, name: str, parameter: Tensor, gain: float, draw: torch.Generator) -> Tensor:
    noise = _normal(parameter, draw)
    if _flat(parameter):
        return noise.mul_(0.5).add_(0.3)
    if isinstance(module, nn.Linear | nn.RNNBase | nn.modules.conv._ConvNd) or "weight" in name:
        return noise.mul_(gain / math.sqrt(max(1, math.prod(parameter.shape[1:]))))
    return noise.mul_(0.5)


def _flat(parameter: Tensor) -> bool:
    """Whether it is a list of numbers, or one: a bias, scales, a gain."""
    return parameter.numel() == max(parameter.shape, default=1)


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    """In float32 whatever the type, so that a seed means the same weights in all types."""
    return torch.randn(like.shape, generator=draw, dtype=torch.float32)
