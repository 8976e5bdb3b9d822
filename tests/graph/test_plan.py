"""Plans: JSON there and back, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from chipdeploy.errors import InputError
from chipdeploy.graph.plan import PrunePlan, dead_branches, group_widths
from chipdeploy.graph.trace import trace

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a, self.b, self.c = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.c(self.b(self.a(x).relu()).relu())).mean((2, 3)))


@pytest.fixture(scope="module")
def graph():
    return trace(Net(), torch.zeros(1, 3, 2, 2))


def test_mask_and_plan_are_the_same_thing(graph):
    assert [(group.name, group.size) for group in graph.groups] == [("stem", 4), ("a", 3), ("b", 5)]
    plan = PrunePlan({"stem": (0, 3), "b": (1, 2)})
    mask = plan.mask(graph)
    assert mask.astype(int).tolist() == [1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0]
    assert PrunePlan.from_mask(graph, mask).kept == {"stem": (0, 3), "a": (0, 1, 2), "b": (1, 2)}
    assert group_widths(graph, mask).tolist() == [2, 3, 2]
    assert dead_branches(graph, np.array([2, 0, 0])) == [0]
    assert dead_branches(graph, np.array([2, 1, 1])) == []


def test_json_round_trip_keeps_the_digest():
    plan = PrunePlan({"stem": (0, 3), "b": ()})
    again = PrunePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest == plan.digest and len(plan.digest) == 64
    assert PrunePlan({"b": (), "stem": (0, 3)}).digest == plan.digest  # the order of groups does not matter
    assert PrunePlan({"stem": (0, 2), "b": ()}).digest != plan.digest
    assert plan.to_dict() == {"schema": 1, "kept": {"stem": [0, 3], "b": []}}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"body": (0,)}, "names the group 'body', which the model lacks"),
        ({"stem": (0, 4)}, "outside 0..3"),
        ({"stem": (-1,)}, "outside 0..3"),
        ({"stem": (1, 1)}, "twice"),
        ({"stem": ()}, "keeps nothing of stem"),
        ({"a": ()}, "in part"),
    ],
)
def test_plans_that_do_not_fit_are_refused(graph, kept, message):
    with pytest.raises(InputError, match=message) as caught:
        PrunePlan(kept).mask(graph)
    assert "\n" not in str(caught.value)


def test_a_whole_branch_may_go(graph):
    assert PrunePlan({"a": (), "b": ()}).mask(graph).sum() == 4


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        {},
        {"schema": 1},
        {"schema": 2, "kept": {}},
        {"schema": 1, "kept": []},
        {"schema": 1, "kept": {"a": 3}},
        {"schema": 1, "kept": {"a": ["x"]}},
    ],
)
def test_what_is_no_plan_is_refused(raw):
    with pytest.raises(InputError) as caught:
        PrunePlan.from_dict(raw)
    assert "\n" not in str(caught.value)
