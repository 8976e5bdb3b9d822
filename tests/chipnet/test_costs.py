"""Costs by hand, and against PyTorch's own counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.chipnet.costs import BUDGETS, COSTS, CostModel, SoftCost
from chipdeploy.errors import UsageError
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model

torch.set_num_threads(1)


def costs(graph, *widths):
    return {name: CostModel.of(graph, name).count(np.array(widths or graph.sizes)) for name in COSTS}


def test_two_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    assert [group.size for group in graph.groups] == [8, 4]
    for a, b in ((8, 4), (5, 3), (1, 1)):
        assert costs(graph, a, b) == {
            "macs": 256 * 9 * 3 * a + 64 * 9 * a * b + 10 * b,
            "params": 9 * 3 * a + 2 * a + 9 * a * b + b + 10 * b + 10,
            "channels": a + b + 10,
            "volume": 256 * a + 64 * b + 10,
        }


def test_depthwise_is_linear_in_its_width():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    assert [group.size for group in graph.groups] == [6, 5]
    assert costs(graph, 4, 3) == {
        "macs": 16 * 3 * 4 + 16 * 9 * 4 + 16 * 4 * 3 + 3 * 2,
        "params": 3 * 4 + 9 * 4 + 4 * 3 + 3 + 3 * 2 + 2,
        "channels": 4 + 4 + 3 + 2,
        "volume": 16 * 4 + 16 * 4 + 16 * 3 + 2,
    }


def test_linear_after_flatten_reads_every_pixel_of_a_channel():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 7))
    graph = trace(model, torch.zeros(1, 1, 4, 4))  # 2x2 pixels after the convolution
    assert costs(graph, 5) == {
        "macs": 4 * 9 * 5 + 4 * 5 * 7,
        "params": 9 * 5 + 5 + 4 * 5 * 7 + 7,
        "channels": 5 + 7,
        "volume": 4 * 5 + 7,
    }


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.conv2(self.conv1(x).relu())).mean((2, 3)))


def test_a_dead_branch_costs_nothing():
    graph = trace(Residual(), torch.zeros(1, 3, 2, 2))
    assert costs(graph, 3, 5) == {
        "macs": 4 * 3 * 3 + 4 * 3 * 5 + 4 * 5 * 3 + 3 * 2,
        "params": 3 * 3 + (3 * 5 + 5) + (5 * 3 + 3) + (3 * 2 + 2),
        "channels": 3 + 5 + 3 + 2,
        "volume": 4 * (3 + 5 + 3) + 2,
    }
    assert costs(graph, 3, 0) == {
        "macs": 4 * 3 * 3 + 3 * 2,
        "params": 3 * 3 + 3 * 2 + 2,
        "channels": 3 + 2,
        "volume": 4 * 3 + 2,
    }


@pytest.mark.parametrize("name", ["resnet20", "preresnet164", "mobilenetv2"])
def test_soft_cost_at_integer_widths_is_the_exact_share(name):
    graph = trace(build_model(name, num_classes=10, in_channels=3, image_size=32), torch.zeros(1, 3, 16, 16))
    rng = np.random.default_rng(0)
    for kind in COSTS:
        exact = CostModel.of(graph, kind)
        soft = SoftCost(exact)
        for _ in range(5):
            widths = np.array([rng.integers(1, group.size + 1) for group in graph.groups])
            alive = rng.random(len(graph.branches)) < 0.7
            for number, branch in enumerate(graph.branches):
                if not alive[number]:
                    widths[list(branch.groups)] = 0
            share = soft(torch.from_numpy(widths).float(), torch.from_numpy(alive).float())
            assert float(share) == pytest.approx(exact.count(widths) / exact.dense, rel=1e-5)


def test_counts_many_widths_as_it_counts_one():
    graph = trace(Residual(), torch.zeros(1, 3, 2, 2))
    rows = np.array([[4, 6], [1, 0], [3, 2]])
    for kind in COSTS:
        model = CostModel.of(graph, kind)
        assert model.counts(rows).tolist() == [model.count(row) for row in rows]


def test_every_budget_limits_a_known_cost():
    assert set(BUDGETS.values()) == set(COSTS)
    with pytest.raises(UsageError, match="unknown cost 'weight'"):
        CostModel.of(trace(Residual(), torch.zeros(1, 3, 2, 2)), "weight")


class Sequences(nn.Module):
    """Rows of an image read by a recurrent layer."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.rows = kind(8 * 6, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        return self.head(self.rows(self.conv(self.stem(x)).permute(0, 2, 1, 3).flatten(2))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_stay_and_are_counted(kind):
    model, images = Sequences(kind).eval(), torch.zeros(2, 3, 5, 6)
    graph = trace(model, images)
    weights = sum(parameter.numel() for parameter in model.rows.parameters() if parameter.dim() == 2)
    assert costs(graph)["macs"] == 30 * (3 * 4 + 36 * 8) + 5 * weights + 20 * 4
