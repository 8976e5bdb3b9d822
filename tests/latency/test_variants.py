"""Plans that a profile measures: legal, never twice, the same for a seed, and spread."""

import numpy as np
import pytest
import torch

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.graph.plan import check_mask
from chipdeploy.graph.trace import trace
from chipdeploy.latency.profiling import _top
from chipdeploy.latency.variants import Variants, probes
from chipdeploy.training.models import build_model


def test_plans_are_legal_and_none_comes_twice(tiny):
    _, graph = tiny
    draws = Variants(graph, 8)
    plans = draws.take(40) + draws.take(40) + draws.proposed(40)
    assert len(plans) >= 100
    assert len({plan.tobytes() for plan in plans}) == len(plans)
    for plan in plans:
        check_mask(graph, _top(graph, plan))


def test_plans_of_depthwise_and_shared_groups_are_legal():
    torch.manual_seed(0)
    model = build_model("mobilenetv2", num_classes=10, in_channels=3, image_size=16)
    graph = trace(model, torch.randn(2, 3, 16, 16))
    plans = Variants(graph, 8).take(3)
    assert len({plan.tobytes() for plan in plans}) == 3
    for plan in [*plans, *probes(graph).values()]:
        check_mask(graph, _top(graph, plan))


def test_a_seed_gives_the_same_plans_however_they_are_taken(tiny):
    _, graph = tiny
    whole, parts = Variants(graph, 8, seed=3), Variants(graph, 8, seed=3)
    assert np.array_equal(whole.take(8), [*parts.take(3), *parts.take(5)])
    assert not np.array_equal(Variants(graph, 8, seed=3).take(8), Variants(graph, 8, seed=4).take(8))


def test_plans_spread_over_the_work_and_mostly_go_by_the_step(tiny):
    _, graph = tiny
    cost = CostModel.of(graph, "macs")
    plans = np.array(Variants(graph, 8).take(60))
    shares = cost.counts(plans) / cost.dense
    assert shares.min() < 0.15
    assert shares.max() > 0.7
    assert ((shares > 0.2) & (shares < 0.6)).mean() > 0.1
    free = np.array(Variants(graph, 1).take(60))
    assert (plans % 8 == 0).mean() > (free % 8 == 0).mean() + 0.15
    assert (plans == 0).any() and (plans[:, [0]] > 0).all()


def test_a_network_with_few_plans_gives_no_more_than_it_has():
    """One group of two channels, in whole steps of one: at most two plans, but for none at all."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(2, 2),
    ).eval()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    taken = Variants(graph, 1).take(9)
    assert sorted(plan.tolist() for plan in taken) in ([[1]], [[1], [2]])


def test_probes_lack_a_step_in_every_group_that_is_wide_enough(tiny):
    _, graph = tiny
    sizes = graph.sizes.tolist()
    assert sorted(sizes) == [16, 16, 32, 32]
    found = probes(graph)
    assert list(found) == [1, 2, 4, 8, 16]
    for step, widths in found.items():
        assert widths.tolist() == [size - step if size % (2 * step) == 0 else size for size in sizes]


@pytest.mark.parametrize("step", [1, 8])
def test_a_probe_counts_channels_not_gates(step):
    """A gate of a grouped convolution stands for a whole group of channels."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 1),
        torch.nn.Conv2d(32, 32, 3, groups=8),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 2),
    ).eval()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    unit = graph.groups[0].unit
    assert unit == 4
    assert probes(graph)[step].tolist() == [8 - max(1, step // unit)]
