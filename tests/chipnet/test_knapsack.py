"""The knapsack against all combinations, and its bound against both."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipdeploy.chipnet.knapsack import BINS, Hull, knapsack, relaxed

NUMBER = st.floats(0, 1, width=32)
ITEM = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5)


def arrays(items):
    return [np.array([cost for cost, _ in item]) for item in items], [
        np.array([value for _, value in item]) for item in items
    ]


def best_of_all(costs, values, room):
    """The greatest value over every combination that fits; None where none does."""
    fitting = [
        sum(value[k] for value, k in zip(values, chosen, strict=True))
        for chosen in product(*(range(len(cost)) for cost in costs))
        if sum(cost[k] for cost, k in zip(costs, chosen, strict=True)) <= room
    ]
    return max(fitting, default=None)


@settings(deadline=None, max_examples=200)
@given(st.lists(ITEM, min_size=1, max_size=4), st.floats(0.05, 3))
def test_the_choices_fit_and_nothing_is_better_but_for_the_bins(items, room):
    costs, values = arrays(items)
    chosen = knapsack(costs, values, room)
    tight = best_of_all(costs, values, room * (1 - len(items) / BINS))
    if chosen is None:
        assert tight is None
        return
    assert sum(cost[k] for cost, k in zip(costs, chosen, strict=True)) <= room * (1 + 1e-8)
    worth = sum(value[k] for value, k in zip(values, chosen, strict=True))
    assert tight is None or worth >= tight - 1e-12


@settings(deadline=None, max_examples=200)
@given(st.lists(ITEM, min_size=1, max_size=4), st.floats(0.05, 3))
def test_the_relaxation_is_never_below_the_best(items, room):
    costs, values = arrays(items)
    bound = relaxed([Hull.of(cost, value) for cost, value in zip(costs, values, strict=True)], room)
    best = best_of_all(costs, values, room)
    if best is not None:
        assert bound >= best - 1e-9
    assert bound <= sum(value.max() for value in values) + 1e-9


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=40))
def test_no_choice_lies_above_the_hull_and_its_corners_bend_down(points):
    cost, value = np.array(points, dtype=np.float64).T
    hull = Hull.of(cost, value)
    assert (hull.cost, hull.value) == (cost.min(), value[cost == cost.min()].max())
    assert (hull.steps > 0).all() and (hull.gains > 0).all()
    slopes = hull.gains / hull.steps
    assert (np.diff(slopes) < 0).all()
    x, y = hull.cost + np.cumsum([0, *hull.steps]), hull.value + np.cumsum([0, *hull.gains])
    assert (value <= np.interp(cost, x, y) + 1e-9).all()
    assert {*zip(x, y, strict=True)} <= {*zip(cost, value, strict=True)}


def test_an_item_that_is_dearer_than_the_room_leaves_nothing():
    assert knapsack([np.array([2.0])], [np.array([1.0])], 1.0) is None
    assert relaxed([Hull.of(np.array([2.0]), np.array([1.0]))], 1.0) == -np.inf


def test_no_items_are_worth_nothing():
    assert knapsack([], [], 1.0) == []
    assert relaxed([], 1.0) == pytest.approx(0.0)
