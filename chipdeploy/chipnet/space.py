"""Which widths a plan may have: the choices of every group and branch, in the steps of one alignment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd

import numpy as np
from numpy.typing import NDArray

from chipdeploy.chipnet.costs import Cost, Floats
from chipdeploy.errors import UsageError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints

MAX_CHOICES = 1024  # of one item; more are thinned evenly, and the last fill puts the finest steps back


@dataclass(frozen=True, eq=False)
class Item:
    """Groups that are chosen together: one group, or all groups inside one branch."""

    groups: tuple[int, ...]
    choices: Ints  # [K, len(groups)], the cheapest first
    terms: Ints  # numbers of the cost terms in which the item occurs


class Space:
    """The legal widths of one graph, and their shares of the dense network's cost.

    `core` and `leaves` number the items: given the widths of the core, no two leaves have a term of the cost in common.
    `around` has, for every item, the groups with which it has one.

    Args:
        align: channels by which widths go, where a group allows it.
        min_width: channels of which no group that stays has fewer, or all that it has.
        blocks: only whole branches go; all widths stay.

    Raises:
        UsageError: an alignment or a least width below 1; blocks were to go, and none can.
    """

    def __init__(self, graph: ChannelGraph, cost: Cost, align: int, *, min_width: int, blocks: bool) -> None:
        if align < 1:
            raise UsageError(f"the alignment must be 1 or more, got {align}; 1 gives free widths")
        if min_width < 1:
            raise UsageError(f"the least width must be 1 or more, got {min_width}")
        if blocks and not graph.branches:
            raise UsageError("only blocks were to go, and no branch of this network can; prune widths instead")
        self.graph, self._cost, self._dense, self._blocks = graph, cost, cost.dense, blocks
        self._low = graph.sizes.copy() if blocks else _least(graph, min_width)
        self.units = np.array([gcd(g.size, max(1, align // g.unit)) for g in graph.groups], dtype=np.int64)
        self.items = self._make_items()
        meet = _meetings(self.items)
        self.core, self.leaves = _split(meet)
        self.around = [[group for other in np.flatnonzero(row) for group in self.items[other].groups] for row in meet]

    def share(self, widths: Ints) -> float:
        """The cost at widths [G]."""
        return self._cost.count(widths) / self._dense

    def shares(self, rows: Ints) -> Floats:
        """The costs of many width vectors [K, G] ▶ [K]."""
        return self._cost.counts(rows) / self._dense

    def item_shares(self, item: Item, widths: Ints) -> Floats:
        """What the item's terms cost at each of its choices, all else as in `widths`, [K]."""
        table = np.repeat(widths[None], len(item.choices), axis=0)
        table[:, list(item.groups)] = item.choices
        return self._cost.partial(table, item.terms) / self._dense

    @cached_property
    def smallest(self) -> Ints:
        """The widths [G] of the cheapest legal plan."""
        return np.where([self._may_vanish(group) for group in range(len(self.graph.groups))], 0, self._low)

    @property
    def smallest_aligned(self) -> Ints:
        """The widths [G] of the cheapest plan in steps of the alignment."""
        widths = np.zeros(len(self.graph.groups), dtype=np.int64)
        for item in self.items:
            widths[list(item.groups)] = item.choices[0]
        return widths

    def nearest(self, widths: Ints) -> Ints:
        """For every item the choice that is nearest to the widths [G] ▶ [G]."""
        widths = widths.copy()
        for item in self.items:
            distance = np.abs(item.choices - widths[list(item.groups)]).sum(axis=1)
            widths[list(item.groups)] = item.choices[int(distance.argmin())]
        return widths

    def narrower(self, widths: Ints) -> Ints:
        """All plans with one group narrower by a step of the alignment, or one item empty where that is legal."""
        rows = []
        for item in self.items:
            groups = list(item.groups)
            if not widths[groups].any():
                continue
            for group in groups:
                unit = int(self.units[group])
                narrower = (widths[group] - 1) // unit * unit
                if narrower >= max(1, self._low[group]):
                    rows.append(widths.copy())
                    rows[-1][group] = narrower
            if not item.choices[0].any():
                rows.append(widths.copy())
                rows[-1][groups] = 0
        return np.array(rows, dtype=np.int64).reshape(-1, len(widths))

    def wider(self, widths: Ints, units: Ints) -> Ints:
        """All plans with one group wider by any number of its units, or one empty branch at its least widths."""
        rows = []
        for item in self.items:
            groups = list(item.groups)
            if len(groups) > 1 and not widths[groups].any():
                rows.append(widths.copy())
                rows[-1][groups] = np.minimum(np.maximum(units, self._low), self.graph.sizes)[groups]
                continue
            for group in groups:
                unit, size = int(units[group]), int(self.graph.sizes[group])
                for width in range(int(widths[group] // unit + 1) * unit, size + 1, unit):
                    if width >= self._low[group]:
                        rows.append(widths.copy())
                        rows[-1][group] = width
        return np.array(rows, dtype=np.int64).reshape(-1, len(widths))

    def _make_items(self) -> list[Item]:
        inside = {group for branch in self.graph.branches for group in branch.groups}
        tuples = [branch.groups for branch in self.graph.branches]
        tuples += [(group,) for group in range(len(self.graph.groups)) if group not in inside]
        return [Item(groups, self._choices(groups), self._cost.touching(groups)) for groups in sorted(tuples)]

    def _choices(self, groups: tuple[int, ...]) -> Ints:
        limit = int(MAX_CHOICES ** (1 / len(groups)))
        levels = [self._levels(group) for group in groups]
        if limit >= 2 or all(len(steps) == 1 for steps in levels):
            choices = list(product(*(_thinned(steps, max(2, limit)) for steps in levels)))
        else:  # too many groups for all combinations: they grow together, and exchanges tell them apart
            most = max(len(steps) for steps in levels)
            even = [np.linspace(0, len(steps) - 1, most).round().astype(np.int64) for steps in levels]
            choices = list(zip(*(steps[at].tolist() for steps, at in zip(levels, even, strict=True)), strict=True))
        if all(self._may_vanish(group) for group in groups):
            choices.insert(0, (0,) * len(groups))
        return np.array(choices, dtype=np.int64)

    def _levels(self, group: int) -> Ints:
        """Widths of a group that stays."""
        size = self.graph.groups[group].size
        steps = np.arange(self.units[group], size + 1, self.units[group], dtype=np.int64)
        return np.asarray(steps[steps >= self._low[group]])

    def _may_vanish(self, group: int) -> bool:
        found = self.graph.groups[group]
        return found.may_vanish and not (self._blocks and found.branch is None)


def _least(graph: ChannelGraph, channels: int) -> Ints:
    """The gates of every group that make at least this many channels, or all of them, int64 [G]."""
    return np.array([min(group.size, -(-channels // group.unit)) for group in graph.groups], dtype=np.int64)


def _thinned(steps: Ints, limit: int) -> list[int]:
    """At most `limit` of the steps, evenly, the first and the last among them."""
    if len(steps) > limit:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, limit).round().astype(np.int64))]
    chosen: list[int] = steps.tolist()
    return chosen


def _meetings(items: list[Item]) -> NDArray[np.bool_]:
    """Whether two items have a term of the cost in common, [items, items]."""
    count = 1 + max((int(item.terms.max(initial=0)) for item in items), default=0)
    touching = np.zeros((len(items), count), dtype=np.int64)
    for number, item in enumerate(items):
        touching[number, item.terms] = 1
    meet = touching @ touching.T > 0
    np.fill_diagonal(meet, False)
    return meet


def _split(meet: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """A greedy vertex cover of the items' meetings, and the items that are left."""
    meet, core = meet.copy(), []
    while meet.any():
        busiest = int(meet.sum(axis=1).argmax())
        core.append(busiest)
        meet[busiest], meet[:, busiest] = False, False
    return sorted(core), [number for number in range(len(meet)) if number not in core]
