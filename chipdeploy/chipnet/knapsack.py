"""The multiple-choice knapsack: one choice of every item, the greatest value, costs within the room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chipdeploy.chipnet.costs import Floats
from chipdeploy.graph.labels import Ints

BINS = 4000  # the room is cut into this many steps; costs are rounded up, so it is never exceeded


def knapsack(costs: Sequence[Floats], values: Sequence[Floats], room: float) -> list[int] | None:
    """The number of the best choice of every item, exact over the binned room; None where nothing fits.

    Args:
        costs: of every item's choices, [K] each.
        values: likewise.
        room: what the choices may cost together, above 0.
    """
    steps = [np.ceil(cost / room * BINS - 1e-9).astype(np.int64) for cost in costs]
    reach = np.zeros(BINS + 1)
    taken = np.zeros((len(costs), BINS + 1), dtype=np.int64)
    for row, value in enumerate(values):
        best = np.full(BINS + 1, -np.inf)
        for choice in _undominated(steps[row], value).tolist():
            step = int(steps[row][choice])
            if step > BINS:
                continue
            through = reach[: BINS + 1 - step] + value[choice]
            better = through > best[step:]
            best[step:][better] = through[better]
            taken[row, step:][better] = choice
        reach = best
    return _trace_back(taken, steps) if np.isfinite(reach[BINS]) else None


def _trace_back(taken: Ints, steps: list[Ints]) -> list[int]:
    chosen, at = [], BINS
    for row in reversed(range(len(taken))):
        chosen.append(int(taken[row, at]))
        at -= int(steps[row][chosen[-1]])
    return chosen[::-1]


@dataclass(frozen=True, eq=False)
class Hull:
    """The upper concave hull of one item's choices: its cheapest corner, and the ways from corner to corner."""

    cost: float
    value: float
    steps: Floats
    gains: Floats

    @classmethod
    def of(cls, cost: Floats, value: Floats) -> Hull:
        """Of an item's choices, their costs and values [K]."""
        corners = _corners(cost, value)
        return cls(cost[corners[0]], value[corners[0]], np.diff(cost[corners]), np.diff(value[corners]))


def relaxed(hulls: Sequence[Hull], room: float) -> float:
    """An upper bound of the knapsack's value, by its linear relaxation; −∞ where nothing fits.

    Args:
        hulls: of every item.
        room: what the choices may cost together.
    """
    room -= sum(hull.cost for hull in hulls)
    if room < 0:
        return -np.inf
    total = sum(hull.value for hull in hulls)
    steps = np.concatenate([np.zeros(0), *(hull.steps for hull in hulls)])
    gains = np.concatenate([np.zeros(0), *(hull.gains for hull in hulls)])
    order = np.argsort(-gains / np.maximum(steps, 1e-15), kind="stable")
    spent = np.cumsum(steps[order])
    whole = int(np.searchsorted(spent, room, side="right"))
    total += gains[order[:whole]].sum()
    if whole < len(order):
        left = room - (spent[whole - 1] if whole else 0.0)
        total += gains[order[whole]] * left / max(steps[order[whole]], 1e-15)
    return float(total)


def _undominated(cost: Floats | Ints, value: Floats) -> Ints:
    """Choices that no cheaper one matches in value, cheapest first."""
    order = np.lexsort((-value, cost))
    before = np.concatenate([[-np.inf], np.maximum.accumulate(value[order])[:-1]])
    return np.asarray(order[value[order] > before])


def _corners(cost: Floats, value: Floats) -> Ints:
    """The choices at the corners of the hull, cheapest first."""
    corners = _undominated(cost, value)
    if len(corners) > 1:  # the steepest way from the cheapest point first: past an empty branch, most points go at once
        slopes = (value[corners[1:]] - value[corners[0]]) / (cost[corners[1:]] - cost[corners[0]])
        corners = np.delete(corners, np.s_[1 : 1 + int(slopes.argmax())])
    while True:
        step, gain = np.diff(cost[corners]), np.diff(value[corners])
        # A point on or below the line between its neighbours is no corner, whether or not the neighbours are.
        above = gain[:-1] * step[1:] > gain[1:] * step[:-1]
        if above.all():
            return corners
        corners = corners[np.concatenate([[True], above, [True]])]
