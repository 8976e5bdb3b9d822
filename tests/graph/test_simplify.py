"""Leftovers of removed branches go, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chipdeploy.graph.rules.base import op_name
from chipdeploy.graph.simplify import remove_dead_branches

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


def simplified(operation):
    """Names of the ops that stay; the program's output is compared on the way."""
    images = torch.randn(2, 3, 4, 4)
    model = Net(operation)
    program = remove_dead_branches(torch.export.export(model, (images.clone(),)))
    assert torch.equal(program.module()(images.clone()), model(images.clone()))
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


def zeros(x, channels=3):
    return x.new_zeros((x.shape[0], channels, *x.shape[2:]))


@pytest.mark.parametrize(
    ("operation", "ops"),
    [
        (lambda x: (x * 2 + zeros(x)).exp(), ["mul", "exp"]),
        (lambda x: (zeros(x) + x * 2).exp(), ["mul", "exp"]),
        (lambda x: x * 2 + zeros(x).relu().contiguous(), ["mul"]),
        (lambda x: torch.cat([x * 2, zeros(x, 0)], 1).exp(), ["mul", "exp"]),
        (lambda x: torch.cat([x, zeros(x, 0), x], 1), ["cat"]),
        (lambda x: nn.functional.pad(x * 2, (0, 0, 0, 0)), ["mul"]),
        (lambda x: torch.add(x * 2, zeros(x), alpha=3), ["mul"]),
        (lambda x: nn.functional.relu6(zeros(x)) + x * 2, ["mul"]),
    ],
)
def test_leftovers_go(operation, ops):
    assert simplified(operation) == ops


def written_zeros(x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return x + y


def written_view(x):
    y = x * 2
    y[:, 1:].relu_()
    return y + zeros(x)


def written_after_the_sum(x):
    y = x * 2
    return torch.relu_(zeros(x) + y) + y


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.add(zeros(x), x * 2, alpha=3),
        lambda x: nn.functional.hardtanh(zeros(x), 0.5, 2.0) + x * 2,
        lambda x: zeros(x) + x.mean((2, 3), keepdim=True),
        lambda x: zeros(x).exp() + x,
        lambda x: zeros(x) + zeros(x) + 1.0 + x,
        written_zeros,
        written_view,
        written_after_the_sum,
    ],
)
def test_what_only_looks_like_a_leftover_stays(operation):
    assert simplified(operation)  # equal outputs are what matters
