"""The most valuable widths whose cost stays under a budget.

Given the widths of a few *core* items (residual streams, every second layer of a chain) the rest, the leaves, do not
interact, and choosing their widths is a multiple-choice knapsack, solved exactly over a finely binned budget. The core
is found by Lagrangian coordinate ascent, then improved by hill climbing over the knapsack's own bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chipdeploy.chipnet.costs import Floats
from chipdeploy.chipnet.fill import fill
from chipdeploy.chipnet.knapsack import Hull, knapsack, relaxed
from chipdeploy.chipnet.space import Space
from chipdeploy.chipnet.value import Value
from chipdeploy.graph.labels import Ints

LONG = 16  # items in a core for which the ascent has done the work, and a single step of climbing must do


class Search:
    """One search: a fixed value, a fixed budget.

    Args:
        keep: share of the dense cost that may stay.
    """

    def __init__(self, space: Space, value: Value, keep: float) -> None:
        self._space, self._value, self._keep = space, value, keep
        self._values = [value.among(item.groups, item.choices) for item in space.items]
        self._seen: dict[tuple[int, bytes], _Leaf] = {}

    def run(self, start: Ints | None = None) -> Ints:
        """The widths [G] that were found. start: widths from which to go on instead of from the beginning."""
        widths = self._ascend() if start is None else self._space.nearest(start)
        widths = self._knapsack(self._climb(widths))
        return fill(self._space, self._value, self._keep, widths)

    def _ascend(self) -> Ints:
        """Coordinate ascent on value − λ · cost, λ bisected until the budget holds."""
        low, high = 0.0, None
        best = self._space.smallest_aligned
        multiplier = self._value.dense
        for _ in range(40):
            widths = self._sweep(multiplier)
            if self._space.share(widths) <= self._keep:
                best, high = widths, multiplier
            else:
                low = multiplier
            multiplier = multiplier * 2 if high is None else (low + high) / 2
            if high is not None and high - low < 1e-3 * high:
                break
        return best

    def _sweep(self, multiplier: float) -> Ints:
        widths = self._space.graph.sizes.copy()
        for _ in range(4):
            before = widths.copy()
            for item, value in zip(self._space.items, self._values, strict=True):
                chosen = int(np.argmax(value - multiplier * self._space.item_shares(item, widths)))
                widths[list(item.groups)] = item.choices[chosen]
            if np.array_equal(before, widths):
                break
        return widths

    def _climb(self, widths: Ints) -> Ints:
        """Move one core item at a time to a neighbouring choice while the knapsack's bound improves."""
        best = self._bound(widths)
        for _ in range(1 if len(self._space.core) > LONG else 64):
            moves = []
            for number in self._space.core:
                for moved in self._neighbours(number, widths):
                    moves.append((self._bound(moved), tuple(moved.tolist())))
            if not moves:
                break
            bound, winner = max(moves)
            if bound <= best + 1e-12:
                break
            best, widths = bound, np.array(winner, dtype=np.int64)
        return widths

    def _neighbours(self, number: int, widths: Ints) -> list[Ints]:
        item, now = self._space.items[number], self._choice(number, widths)
        moved = []
        for step in (-4, -1, 1, 4):
            if 0 <= now + step < len(item.choices):
                other = widths.copy()
                other[list(item.groups)] = item.choices[now + step]
                moved.append(other)
        return moved

    def _choice(self, number: int, widths: Ints) -> int:
        """Which of its choices an item has."""
        item = self._space.items[number]
        return int((item.choices == widths[list(item.groups)]).all(axis=1).argmax())

    def _bound(self, widths: Ints) -> float:
        """Value of the core as in `widths`, and of the leaves in the knapsack's relaxation."""
        leaves = self._leaves(widths)
        core = sum(self._values[number][self._choice(number, widths)] for number in self._space.core)
        return float(core + relaxed([leaf.hull for leaf in leaves], self._room(widths, leaves)))

    def _knapsack(self, widths: Ints) -> Ints:
        """The best choice for every leaf, the core as it is."""
        leaves = self._leaves(widths)
        values = [self._values[number] for number in self._space.leaves]
        room = self._room(widths, leaves)
        chosen = knapsack([leaf.costs for leaf in leaves], values, room) if room > 0 else None
        if chosen is None:
            return widths
        widths = widths.copy()
        for number, choice in zip(self._space.leaves, chosen, strict=True):
            item = self._space.items[number]
            widths[list(item.groups)] = item.choices[choice]
        return widths

    def _leaves(self, widths: Ints) -> list[_Leaf]:
        """The leaves between the core as in `widths`: a step of the climb changes what few of them cost."""
        found = []
        for number in self._space.leaves:
            key = number, widths[self._space.around[number]].tobytes()
            if key not in self._seen:
                costs = self._space.item_shares(self._space.items[number], widths)
                self._seen[key] = _Leaf(costs, Hull.of(costs, self._values[number]))
            found.append(self._seen[key])
        return found

    def _room(self, widths: Ints, leaves: list[_Leaf]) -> float:
        """What the core leaves of the budget, all terms of the leaves taken out."""
        spent = self._space.share(widths)
        for number, leaf in zip(self._space.leaves, leaves, strict=True):
            spent -= leaf.costs[self._choice(number, widths)]
        return float(self._keep - spent)


@dataclass(frozen=True, eq=False)
class _Leaf:
    """What an item costs at each of its choices, [K], between others of some widths."""

    costs: Floats
    hull: Hull
