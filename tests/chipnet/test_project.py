"""What a plan may look like: steps, least widths, whole blocks, and units of several channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.chipnet.value import value_of_widths
from chipdeploy.errors import BudgetError, UsageError
from chipdeploy.graph.plan import check_mask, group_widths
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model


@pytest.fixture(scope="module")
def resnet():
    return trace(build_model("resnet20", num_classes=4, in_channels=3, image_size=16), torch.randn(2, 3, 16, 16))


def widths_of(graph, keep, scores=None, **options):
    cost = CostModel.of(graph, "macs")
    draw = np.random.default_rng(0)
    mask = Projector(graph, cost, **options).project(draw.random(graph.channels) if scores is None else scores, keep)
    check_mask(graph, mask)
    widths = group_widths(graph, mask)
    assert cost.count(widths) <= keep * cost.dense
    return widths


@pytest.mark.parametrize("align", [1, 16])
def test_no_group_that_stays_is_narrower_than_the_least_width(resnet, align):
    widths = widths_of(resnet, 0.4, align=align, min_width=12)
    assert widths.min() < resnet.sizes.max()
    assert all(width == 0 or width >= min(12, size) for width, size in zip(widths, resnet.sizes, strict=True))


def test_a_least_width_beyond_a_group_keeps_it_whole(resnet):
    widths = widths_of(resnet, 0.6, min_width=32)
    assert all(width in (0, size) or width >= 32 for width, size in zip(widths, resnet.sizes, strict=True))


def test_a_least_width_may_put_a_budget_out_of_reach(resnet):
    with pytest.raises(BudgetError, match="out of reach"):
        widths_of(resnet, 0.01, min_width=16)
    with pytest.raises(UsageError, match="least width must be 1 or more, got 0"):
        widths_of(resnet, 0.5, min_width=0)


def test_blocks_go_whole_or_not_at_all(resnet):
    widths = widths_of(resnet, 0.5, blocks=True)
    inside = np.array([group.branch is not None for group in resnet.groups])
    assert (widths[~inside] == resnet.sizes[~inside]).all()
    assert set((widths[inside] / resnet.sizes[inside]).tolist()) == {0.0, 1.0}
    # The best blocks stay: with all the value in two of them, these two.
    scores = np.full(resnet.channels, 1e-6)
    favoured = [number for number, group in enumerate(resnet.groups) if group.branch in (1, 7)]
    for number in favoured:
        scores[resnet.span(number)] = 1.0
    widths = widths_of(resnet, 0.5, scores, blocks=True)
    assert all(widths[number] == resnet.sizes[number] for number in favoured)


class Grouped(nn.Module):
    """A branch in which a gate stands for eight channels, on a stream of 16."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=8), nn.Conv2d(64, 16, 1))
            for _ in range(3)
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.fc(x.mean((2, 3)))


def test_whole_blocks_stay_whole_where_a_gate_stands_for_many_channels():
    graph = trace(Grouped(), torch.randn(2, 3, 8, 8))
    assert max(group.unit for group in graph.groups) == 8
    for keep in (0.3, 0.5, 0.9):
        widths = widths_of(graph, keep, blocks=True)
        assert set((widths / graph.sizes).tolist()) == {0.0, 1.0}


class Heads(nn.Module):
    """A grouped convolution with eight groups of four, so that a gate stands for four channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=8)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.grouped(self.stem(x).relu()).mean((2, 3)))


def test_alignment_and_least_width_count_channels_not_gates():
    graph = trace(Heads(), torch.randn(2, 3, 8, 8))
    (group,) = graph.groups
    assert (group.size, group.unit) == (8, 4)
    ((_, choices),) = Projector(graph, CostModel.of(graph, "macs"), 16).choices()
    assert choices.ravel().tolist() == [4, 8]  # 16 and 32 channels
    assert Projector(graph, CostModel.of(graph, "macs"), 1, min_width=9).smallest == pytest.approx(3 / 8, rel=0.01)


class Many(nn.Module):
    """A residual branch of fourteen layers: far too many combinations of widths to list."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inside = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(14)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.inside(x)).mean((2, 3)))


def test_where_nothing_can_go_no_larger_budget_is_asked_for():
    graph = trace(Heads(), torch.zeros(2, 3, 8, 8))
    projector = Projector(graph, CostModel.of(graph, "macs"), min_width=1000)
    with pytest.raises(
        BudgetError, match=r"keeps 100\.00%; nothing can go: lower the least width \(--min-width 1000\)"
    ):
        projector.check(0.5)


def test_a_branch_of_many_groups():
    graph = trace(Many(), torch.randn(2, 3, 8, 8))
    assert max(len(branch.groups) for branch in graph.branches) == 13
    cost = CostModel.of(graph, "macs")
    for keep in (0.7, 0.3):
        assert cost.count(widths_of(graph, keep, align=4)) >= 0.9 * keep * cost.dense


def test_where_the_alignment_fits_no_budget_finer_steps_do():
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    graph = trace(nn.Sequential(*layers), torch.randn(2, 3, 8, 8))
    widths = widths_of(graph, 0.3, align=16)
    assert CostModel.of(graph, "macs").count(widths) >= 0.25 * CostModel.of(graph, "macs").dense


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_the_value_of_a_group(power):
    scores = np.random.default_rng(3).lognormal(size=400)
    values, whole = value_of_widths(scores, power, branch=False), scores.sum()
    assert len(values) == 401
    assert values[-1] == pytest.approx(whole)
    assert values[0] == pytest.approx(whole * (1 - 1 / power))
    assert (np.diff(values, n=2) < 0).all()  # the better channels first, so each adds less than the one before
    assert values[-1] - values[-2] == pytest.approx(scores.min(), rel=0.01)  # the first that goes costs its score
    passed = value_of_widths(scores, power, branch=True)
    assert passed[0] == 0
    assert (passed[1:] == values[1:]).all()


def test_no_stream_is_cut_to_a_thread_where_the_last_channels_are_worth_more(resnet):
    streams = [number for number, group in enumerate(resnet.groups) if group.branch is None]
    # Six times as much for a channel of a stream, since many layers read it; a trained network shows more.
    scores = np.concatenate([np.full(group.size, 1.0 if group.branch is not None else 6.0) for group in resnet.groups])
    least = {}
    for power in (0.25, 1.0):
        widths = widths_of(resnet, 0.15, scores, align=1, power=power)
        least[power] = (widths[streams] / resnet.sizes[streams]).min()
    assert least[1.0] < 0.1 < 0.5 < least[0.25]
