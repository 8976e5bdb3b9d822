"""No plan costs more than its budget, counted on the network that was built, and little of the budget stays unused."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from chipdeploy.chipnet.costs import BUDGETS, CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.errors import BudgetError, InputError
from chipdeploy.graph.plan import PrunePlan, group_widths
from chipdeploy.graph.stubs import NoChannels, Zeros
from chipdeploy.graph.surgery import hard_prune
from chipdeploy.graph.trace import trace
from chipdeploy.training.models import build_model

torch.set_num_threads(1)

KEEPS = (0.5, 0.3, 0.1)


@lru_cache
def traced(name):
    model = build_model(name, num_classes=10, in_channels=3, image_size=32).eval()
    return model, trace(model, torch.zeros(1, 3, 32, 32))


@lru_cache
def projector(name, budget, align):
    graph = traced(name)[1]
    return Projector(graph, CostModel.of(graph, BUDGETS[budget]), align)


def scores(graph, kind, seed=1):
    rng = np.random.default_rng(seed)
    if kind == "heavy":
        return np.exp(2 * rng.standard_normal(graph.channels))
    return rng.random(graph.channels) + 0.01


def counted(model):
    """All four costs of a network for one image, without the code under test."""
    totals = {"params": sum(parameter.numel() for parameter in model.parameters()), "channels": 0, "volume": 0}

    def add(module, inputs, output):
        totals["channels"] += output.shape[1]
        totals["volume"] += output[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert not any(isinstance(layer, NoChannels | Zeros) for layer in layers)
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return totals | {"flops": counter.get_total_flops()}


@lru_cache
def dense(name):
    return counted(traced(name)[0])


@pytest.mark.parametrize("align", [16, 1])
@pytest.mark.parametrize("kind", ["uniform", "heavy"])
@pytest.mark.parametrize("budget", list(BUDGETS))
@pytest.mark.parametrize("name", ["resnet56", "preresnet164"])
def test_the_built_network_uses_its_budget_and_no_more(name, budget, kind, align):
    model, graph = traced(name)
    for keep in KEEPS:
        mask = projector(name, budget, align).project(scores(graph, kind), keep)
        small = hard_prune(model, graph, PrunePlan.from_mask(graph, mask))
        share = counted(small)[budget] / dense(name)[budget]
        assert 0.98 * keep <= share <= keep, f"{share / keep:.4f} of the budget {keep}"


@pytest.mark.parametrize("align", [1, 4, 8, 16])
def test_never_over_the_budget(align):
    model, graph = traced("resnet20")
    rng = np.random.default_rng(align)
    for draw in range(50):
        budget = list(BUDGETS)[draw % 4]
        search = projector("resnet20", budget, align)
        keep = float(rng.uniform(search.smallest + 0.1, 0.95))
        values = scores(graph, "heavy" if draw % 2 else "uniform", seed=1000 * align + draw)
        mask = search.project(values, keep)
        plan = PrunePlan.from_mask(graph, mask)
        assert np.array_equal(plan.mask(graph), mask)  # legal
        widths = group_widths(graph, mask)
        assert search.cost.count(widths) <= keep * search.cost.dense
        if draw < 4:  # one of each budget is built and counted
            assert counted(hard_prune(model, graph, plan))[budget] <= keep * dense("resnet20")[budget]
        for number, width in enumerate(widths):
            inside = np.sort(values[graph.span(number)])[::-1]
            kept = np.sort(values[graph.span(number)][mask[graph.span(number)]])[::-1]
            assert np.array_equal(kept, inside[:width])


def test_equal_scores_give_one_plan_with_the_lower_channels():
    graph = traced("resnet20")[1]
    values = np.ones(graph.channels)
    masks = [Projector(graph, CostModel.of(graph, "macs"), 4).project(values.copy(), 0.4) for _ in range(3)]
    assert np.array_equal(masks[0], masks[1]) and np.array_equal(masks[0], masks[2])
    for number in range(len(graph.groups)):
        inside = masks[0][graph.span(number)]
        assert not np.any(inside[1:] & ~inside[:-1])  # a run of kept channels from the first


def test_too_small_a_budget_names_the_smallest_share():
    model, graph = traced("resnet20")
    search = projector("resnet20", "params", 16)
    widths = np.array([0 if group.may_vanish else 1 for group in graph.groups])
    small = hard_prune(model, graph, PrunePlan.from_mask(graph, search.top(np.ones(graph.channels), widths)))
    share = counted(small)["params"] / dense("resnet20")["params"]
    assert share == pytest.approx(search.smallest, abs=1e-12)
    with pytest.raises(BudgetError, match=f"keeps {share:.2%}; ask for ") as caught:
        search.project(np.ones(graph.channels), share / 2)
    asked = float(str(caught.value).rpartition("ask for ")[2].split()[0])
    assert share <= asked < share + 0.001
    assert projector("resnet20", "params", 1).project(np.ones(graph.channels), asked).any()


def test_cuts_that_break_the_network_are_refused():
    graph = traced("preresnet164")[1]
    must = next(group for group in graph.groups if not group.may_vanish)
    with pytest.raises(InputError, match=f"keeps nothing of {must.name}"):
        PrunePlan({must.name: ()}).mask(graph)
    branch = next(branch for branch in graph.branches if len(branch.groups) > 1)
    with pytest.raises(InputError, match=f"empties the branch {branch.name} in part"):
        PrunePlan({graph.groups[branch.groups[0]].name: ()}).mask(graph)


class Tiny(nn.Module):
    """A stream of 6 channels, two branches of 4 and 5, and a last convolution of 4."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.b = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 1))
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.a(x)
        x = x + self.b(x)
        return self.fc(self.last(x).relu().mean((2, 3)))


def chain():
    """Three convolutions in a row: neighbouring widths multiply."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(7, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize("build", [Tiny, chain])
def test_plans_are_nearly_as_good_as_brute_force(build):
    graph = trace(build(), torch.zeros(1, 3, 8, 8))
    choices = [range(0 if group.may_vanish else 1, group.size + 1) for group in graph.groups]
    table = np.array(list(product(*choices)))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cost = CostModel.of(graph, ["macs", "params"][seed % 2])
        keep = float(rng.uniform(0.2, 0.7))
        values = np.exp(rng.standard_normal(graph.channels))
        prefix = [
            np.concatenate([[0.0], np.cumsum(np.sort(values[graph.span(g)])[::-1])]) for g in range(len(graph.groups))
        ]
        worth = sum(prefix[g][table[:, g]] for g in range(len(graph.groups)))
        best = worth[cost.counts(table) <= keep * cost.dense].max()
        mask = Projector(graph, cost, align=1).project(values, keep)
        assert values[mask].sum() >= 0.97 * best, f"seed {seed}: {values[mask].sum() / best:.4f}"
