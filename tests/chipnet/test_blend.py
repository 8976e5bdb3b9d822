"""Two costs as one."""

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.chipnet.blend import Blend
from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.graph.trace import trace

WEIGHTS = (0.25, 1.5)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3), nn.ReLU()]
    return trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 16, 4)).eval(), torch.randn(2, 3, 10, 10))


@pytest.fixture(scope="module")
def parts(graph):
    return CostModel.of(graph, "macs"), CostModel.of(graph, "params")


@pytest.fixture(scope="module")
def blend(graph, parts):
    return Blend.of(graph, parts, WEIGHTS)


def test_it_counts_the_weighted_shares(graph, parts, blend):
    draw = np.random.default_rng(0)
    plans = np.array([draw.integers(1, graph.sizes + 1) for _ in range(20)])
    shares = [part.counts(plans) / part.dense for part in parts]
    assert blend.counts(plans) == pytest.approx(WEIGHTS[0] * shares[0] + WEIGHTS[1] * shares[1])
    assert blend.count(graph.sizes) == pytest.approx(sum(WEIGHTS))


def test_a_change_of_a_group_is_in_the_terms_that_it_touches(graph, blend):
    for group in range(len(graph.groups)):
        rows = np.repeat(graph.sizes[None], 4, axis=0)
        rows[:, group] = [1, 2, 3, graph.sizes[group]]
        moved = blend.partial(rows, blend.touching((group,)))
        assert moved - moved[-1] == pytest.approx(blend.counts(rows) - blend.count(graph.sizes))


def test_a_projection_keeps_to_it_and_follows_the_weights(graph, parts):
    """The more the parameters weigh, the fewer of them stay."""
    scores, kept = np.random.default_rng(1).lognormal(0, 1, graph.channels), []
    for weight in (0.0, 0.5, 1.0):
        blend = Blend.of(graph, parts, (1 - weight, weight))
        widths = Projector(graph, parts[0], 1).under(blend).widths(scores, 0.4)
        assert blend.count(widths) <= 0.4
        kept.append(parts[1].count(widths) / parts[1].dense)
    assert kept[0] > kept[2]


def test_the_soft_share_is_the_crisp_one_where_gates_are_crisp(graph, blend):
    soft, widths = blend.soft("cpu"), torch.tensor(graph.sizes // 2, dtype=torch.float32, requires_grad=True)
    got = soft(widths, torch.ones(len(graph.branches)))
    assert got.item() == pytest.approx(blend.count(graph.sizes // 2), rel=1e-5)
    got.backward()
    assert (widths.grad > 0).all()
