"""A network that is small enough to be profiled in a test."""

import pytest
import torch
from torch import nn

from chipdeploy.graph.trace import trace

SHAPE = (3, 16, 16)


def norm_conv(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = norm_conv(width, width), norm_conv(width, width)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Tiny(nn.Module):
    """Two residual blocks, of 16 and of 32 channels."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem, self.one = norm_conv(3, 16), Block(16)
        self.down, self.two = norm_conv(16, 32, stride=2), Block(32)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        x = self.one(torch.relu(self.stem(x)))
        return self.head(self.two(torch.relu(self.down(x))).mean((2, 3)))


@pytest.fixture(scope="session")
def tiny():
    """The network in eval mode, and its channel graph: groups of 16, 16 (a branch), 32 and 32 (a branch)."""
    torch.manual_seed(0)
    model = Tiny().eval()
    return model, trace(model, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)))
