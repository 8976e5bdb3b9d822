"""Budgets that give a latency, by the rules under which a run would prune."""

import numpy as np
import pytest
import torch

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.graph.trace import trace
from chipdeploy.latency.calibrate import check_reach, curves
from chipdeploy.latency.goal import Goal
from chipdeploy.latency.profile import LatencyProfile
from chipdeploy.latency.store import by_name
from chipdeploy.latency.store import shipped as known
from chipdeploy.meeting import Meeting
from chipdeploy.training.models import build_model

SHARE = 0.6


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """ResNet-20's graph, and its latency by the shipped profile."""
    graph = trace(build_model("resnet20", num_classes=10, in_channels=3, image_size=32), torch.randn(2, 3, 32, 32))
    name = "resnet20-3x32x32-ort-cpu-b1-t1-amd-epyc-avx-512-vnni-2-cores-no-gpu-f501ac"
    return graph, by_name(name, tmp_path_factory.mktemp("profiles")).cost(graph)


@pytest.mark.parametrize("rules", [{"align": 16}, {"align": 1, "power": 0.5}, {"align": 16, "blocks": True}])
def test_a_plan_under_the_budget_takes_the_time(shipped, rules):
    graph, cost = shipped
    projector = Projector(graph, cost, **rules)
    (curve,) = curves(projector, cost, kinds=("flops",))
    keep, least, most = curve.at(SHARE)
    assert least <= keep <= most
    under = projector.under(CostModel.of(graph, "macs"))
    widths = under.widths(np.ones(graph.channels), keep)
    assert cost.count(widths) == pytest.approx(SHARE, abs=0.08)
    if rules.get("blocks"):
        assert set((widths / graph.sizes).tolist()) <= {0.0, 1.0}


def test_the_rules_of_the_run_move_the_budget(shipped):
    graph, cost = shipped
    found = {
        blocks: curves(Projector(graph, cost, 1, blocks=blocks), cost, kinds=("flops",))[0].at(SHARE)[0]
        for blocks in (False, True)
    }
    assert found[True] > found[False] + 0.05  # whole blocks leave nothing off the kernels' steps


def test_no_budget_is_said_for_a_time_that_it_does_not_reach(shipped):
    graph, cost = shipped
    (curve,) = curves(Projector(graph, cost, 16), cost, kinds=("params",))
    least = float(curve.ratio[0])
    assert curve.at(least * 0.9) is None
    keep, _, _ = curve.at(least * 1.001)
    under = Projector(graph, cost, 16).under(CostModel.of(graph, "params"))
    assert keep == pytest.approx(under.smallest, rel=0.05)
    assert cost.count(under.widths(np.ones(graph.channels), keep)) <= least * 1.05


@pytest.mark.parametrize("via", ["latency", "flops"])
def test_a_goal_that_may_be_within_reach_is_a_budget_that_is(shipped, via):
    """A little below what the smallest network is predicted to take: refused before a training, or not at all."""
    graph, cost = shipped
    name = "resnet20-3x32x32-ort-cpu-b1-t1-amd-epyc-avx-512-vnni-2-cores-no-gpu-f501ac"
    profile, projector = LatencyProfile.load(known()[name]), Projector(graph, cost, 16)
    share = projector.smallest / (1 + cost.spread / 2)
    check_reach(projector, cost, share, profile.dense_ms)
    budget = Meeting(Goal("ratio", share), profile, via).budget(projector)
    under = projector if via == "latency" else projector.under(CostModel.of(graph, "macs"))
    under.check(budget.keep)
