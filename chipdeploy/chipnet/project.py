"""From scores to a plan: the most valuable widths and branches whose cost stays under the budget.

A group's value at width w rises with the sum of its w best scores, so ψ alone ranks; what is searched are the widths.
Given the widths of a few *core* items (residual streams, every second layer of a chain) the rest do not interact, and
choosing their widths is a multiple-choice knapsack, solved exactly over a finely binned budget. The core is found by
Lagrangian coordinate ascent, then improved by hill climbing over the knapsack's own bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd

import numpy as np

from chipdeploy.chipnet.costs import Cost, Floats
from chipdeploy.errors import BudgetError, UsageError
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.labels import Ints

BINS = 4000  # the knapsack's budget is cut into this many steps; costs are rounded up, so it is never exceeded
MAX_CHOICES = 1024  # of one item; more are thinned evenly, and the last fill puts the finest steps back
SLACK = 0.02  # share of the budget that may stay unused before exchanges, then finer steps than the alignment are tried
MAX_EXCHANGES = 8
MAX_PAIRS = 20000  # of a narrower and a wider item in one exchange


@dataclass(frozen=True, eq=False)
class Item:
    """Groups that are chosen together: one group, or all groups inside one branch."""

    groups: tuple[int, ...]
    choices: Ints  # [K, len(groups)], the cheapest first
    terms: Ints  # numbers of the cost terms in which the item occurs


class Projector:
    """Finds plans for one graph, one cost and one alignment.

    Args:
        align: channels by which widths go, where a group allows it.
        min_width: channels of which no group that stays has fewer, or all that it has.
        blocks: only whole branches go; all widths stay.
        power: of the value's law, see `value_of_widths`; 1 for the plain sum of scores.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        cost: Cost,
        align: int = 16,
        *,
        min_width: int = 1,
        blocks: bool = False,
        power: float = 1.0,
    ) -> None:
        if align < 1:
            raise UsageError(f"the alignment must be 1 or more, got {align}; 1 gives free widths")
        if min_width < 1:
            raise UsageError(f"the least width must be 1 or more, got {min_width}")
        if blocks and not graph.branches:
            raise UsageError("only blocks were to go, and no branch of this network can; prune widths instead")
        self._align, self._min_width, self._blocks, self._power = align, min_width, blocks, power
        self._low = _least(graph, graph.sizes.max() * min_width if blocks else min_width)
        self.graph, self.cost = graph, cost
        self._units = np.array([gcd(g.size, max(1, align // g.unit)) for g in graph.groups], dtype=np.int64)
        self._strict = align > 1
        self._items = self._make_items(self._units)
        self._core, self._leaves = self._split()

    @cached_property
    def smallest_widths(self) -> Ints:
        """The widths [G] of the cheapest legal plan."""
        return np.where([self._may_vanish(group) for group in range(len(self.graph.groups))], 0, self._low)

    @property
    def smallest(self) -> float:
        """The least share of the cost that any legal plan keeps."""
        return self.cost.count(self.smallest_widths) / self.cost.dense

    def under(self, cost: Cost) -> Projector:
        """For another cost of the same graph, in the same steps."""
        return Projector(
            self.graph, cost, self._align, min_width=self._min_width, blocks=self._blocks, power=self._power
        )

    def choices(self) -> list[tuple[tuple[int, ...], Ints]]:
        """Groups that are chosen together, and the widths among which they choose, [K, groups], the narrowest first."""
        return [(item.groups, item.choices) for item in self._items]

    def check(self, keep: float) -> None:
        """Raises BudgetError where no connected network is as cheap as keep · dense."""
        if keep < self.smallest:
            raise BudgetError(
                f"a budget of {keep:.2%} is out of reach: the smallest connected network keeps {self.smallest:.2%}; "
                f"ask for {np.ceil(self.smallest * 1000) / 1000:g} or more"
            )

    def project(self, scores: Floats, keep: float, *, start: Ints | None = None) -> Mask:
        """Keep the plan of the highest value with cost ≤ keep · dense.

        scores: positive value of every channel, [channels]. start: widths from which the search begins.

        Raises:
            BudgetError: not even the smallest connected network is that cheap.
        """
        widths = self.widths(scores, keep, start=start)
        return self.top(scores, widths)

    def top(self, scores: Floats, widths: Ints) -> Mask:
        """The best-scored channels of every group; equal scores fall to the lower channel number."""
        mask = np.zeros(self.graph.channels, dtype=np.bool_)
        for group, width in enumerate(widths.tolist()):
            span = self.graph.span(group)
            order = np.argsort(-scores[span], kind="stable")
            mask[span.start + order[:width]] = True
        return mask

    def widths(self, scores: Floats, keep: float, *, start: Ints | None = None) -> Ints:
        """The widths [G] of the best plan; see `project`."""
        self.check(keep)
        search = _Search(self, scores, keep)
        return search.run(start)

    def _make_items(self, units: Ints) -> list[Item]:
        inside = {group for branch in self.graph.branches for group in branch.groups}
        tuples = [branch.groups for branch in self.graph.branches]
        tuples += [(group,) for group in range(len(self.graph.groups)) if group not in inside]
        return [Item(groups, self._choices(groups, units), self.cost.touching(groups)) for groups in sorted(tuples)]

    def _choices(self, groups: tuple[int, ...], units: Ints) -> Ints:
        limit = int(MAX_CHOICES ** (1 / len(groups)))
        levels = [self._levels(group, units) for group in groups]
        if limit >= 2 or all(len(steps) == 1 for steps in levels):
            choices = list(product(*(_thinned(steps, max(2, limit)) for steps in levels)))
        else:  # too many groups for all combinations: they grow together, and exchanges tell them apart
            most = max(len(steps) for steps in levels)
            even = [np.linspace(0, len(steps) - 1, most).round().astype(np.int64) for steps in levels]
            choices = list(zip(*(steps[at].tolist() for steps, at in zip(levels, even, strict=True)), strict=True))
        if all(self._may_vanish(group) for group in groups):
            choices.insert(0, (0,) * len(groups))
        return np.array(choices, dtype=np.int64)

    def _levels(self, group: int, units: Ints) -> Ints:
        """Widths of a group that stays."""
        size = self.graph.groups[group].size
        steps = np.arange(units[group], size + 1, units[group], dtype=np.int64)
        return np.asarray(steps[steps >= self._low[group]])

    def _may_vanish(self, group: int) -> bool:
        found = self.graph.groups[group]
        return found.may_vanish and not (self._blocks and found.branch is None)

    def _split(self) -> tuple[list[int], list[int]]:
        """A greedy vertex cover of the items' interactions, and the items that are left."""
        count = 1 + max((int(item.terms.max(initial=0)) for item in self._items), default=0)
        touching = np.zeros((len(self._items), count), dtype=np.bool_)
        for number, item in enumerate(self._items):
            touching[number, item.terms] = True
        meet = touching.astype(np.int64) @ touching.T.astype(np.int64)
        np.fill_diagonal(meet, 0)
        core: list[int] = []
        while meet.any():
            busiest = int((meet > 0).sum(axis=1).argmax())
            core.append(busiest)
            meet[busiest], meet[:, busiest] = 0, 0
        return sorted(core), [number for number in range(len(self._items)) if number not in core]


def value_of_widths(scores: Floats, power: float, *, branch: bool) -> Floats:
    """Value of a group's best w channels, for w from 0 to all: [W] ▶ [W + 1].

    Where a share s of the whole score S stays, S · (1 − s^p) / p is lost. A score is a gradient's: it tells what the
    first few channels that go cost, and near s = 1 the loss is S · (1 − s) for every p. What the last few cost it
    cannot tell; p < 1 lets it rise, so that no stream that many layers need is cut to a thread. A group inside a branch
    that goes as a whole loses S: the branch is passed by, and nothing that is left suffers.

    Args:
        scores: above 0.
        power: p, above 0.
        branch: whether the group is inside a branch.
    """
    sums = np.concatenate([[0.0], np.cumsum(-np.sort(-scores, kind="stable"))])
    if power == 1.0:
        return sums
    whole = sums[-1]
    values: Floats = whole - whole / power * (1.0 - (sums / whole) ** power)
    if branch:
        values[0] = 0.0
    return values


class _Search:
    """One search: fixed scores, fixed budget."""

    def __init__(self, projector: Projector, scores: Floats, keep: float) -> None:
        self._p = projector
        self._keep = keep
        graph = projector.graph
        self._tables = [
            value_of_widths(scores[graph.span(number)], projector._power, branch=group.branch is not None)
            for number, group in enumerate(graph.groups)
        ]
        self._values = [self._value(item) for item in projector._items]

    def run(self, start: Ints | None) -> Ints:
        widths = self._ascend() if start is None else self._repair(start.copy())
        widths = self._climb(widths)
        widths = self._knapsack(widths)
        return self._fill(widths)

    def _value(self, item: Item) -> Floats:
        parts = [self._tables[g][item.choices[:, k]] for k, g in enumerate(item.groups)]
        return np.asarray(np.sum(parts, axis=0), dtype=np.float64)

    def _cost(self, widths: Ints) -> float:
        return self._p.cost.count(widths) / self._p.cost.dense

    def _item_costs(self, item: Item, widths: Ints) -> Floats:
        """Share of the dense cost that the item's terms take at each of its choices, all else as in `widths`."""
        table = np.repeat(widths[None], len(item.choices), axis=0)
        table[:, list(item.groups)] = item.choices
        return self._p.cost.partial(table, item.terms) / self._p.cost.dense

    def _ascend(self) -> Ints:
        """Coordinate ascent on value − λ · cost, λ bisected until the budget holds."""
        low, high = 0.0, None
        best = self._smallest_choice()
        multiplier = float(sum(table[-1] for table in self._tables))
        for _ in range(40):
            widths = self._sweep(multiplier)
            if self._cost(widths) <= self._keep:
                best, high = widths, multiplier
            else:
                low = multiplier
            multiplier = multiplier * 2 if high is None else (low + high) / 2
            if high is not None and high - low < 1e-3 * high:
                break
        return best

    def _sweep(self, multiplier: float) -> Ints:
        widths = self._p.graph.sizes.copy()
        for _ in range(4):
            before = widths.copy()
            for item, value in zip(self._p._items, self._values, strict=True):
                chosen = int(np.argmax(value - multiplier * self._item_costs(item, widths)))
                widths[list(item.groups)] = item.choices[chosen]
            if np.array_equal(before, widths):
                break
        return widths

    def _smallest_choice(self) -> Ints:
        widths = np.zeros(len(self._p.graph.groups), dtype=np.int64)
        for item in self._p._items:
            widths[list(item.groups)] = item.choices[0]
        return widths

    def _repair(self, widths: Ints) -> Ints:
        """Widths from an earlier search, as a start for this one: only legal choices."""
        for item in self._p._items:
            distance = np.abs(item.choices - widths[list(item.groups)]).sum(axis=1)
            widths[list(item.groups)] = item.choices[int(distance.argmin())]
        return widths

    def _climb(self, widths: Ints) -> Ints:
        """Move one core item at a time to a neighbouring choice while the knapsack's bound improves."""
        best = self._bound(widths)
        for _ in range(64):
            moves = []
            for number in self._p._core:
                for moved in self._neighbours(number, widths):
                    moves.append((self._bound(moved), tuple(moved.tolist())))
            if not moves:
                break
            bound, winner = max(moves)
            if bound <= best + 1e-12:
                break
            best, widths = bound, np.array(winner, dtype=np.int64)
            if len(self._p._core) > 16:  # long chains: the ascent has done the work, a few steps must do
                break
        return widths

    def _neighbours(self, number: int, widths: Ints) -> list[Ints]:
        item = self._p._items[number]
        now = int((item.choices == widths[list(item.groups)]).all(axis=1).argmax())
        moved = []
        for step in (-4, -1, 1, 4):
            if 0 <= now + step < len(item.choices):
                other = widths.copy()
                other[list(item.groups)] = item.choices[now + step]
                moved.append(other)
        return moved

    def _bound(self, widths: Ints) -> float:
        """Value of the linear relaxation over the leaves, the core as in `widths`; −∞ where the core costs too much."""
        room = self._room(widths)
        total = sum(self._tables[g][widths[g]] for n in self._p._core for g in self._p._items[n].groups)
        gains: list[Floats] = []
        costs: list[Floats] = []
        for number in self._p._leaves:
            item, value = self._p._items[number], self._values[number]
            cost = self._item_costs(item, widths)
            corners = _hull(cost, value)
            room -= cost[corners[0]]
            total += value[corners[0]]
            gains.append(np.diff(value[corners]))
            costs.append(np.diff(cost[corners]))
        if room < 0:
            return -np.inf
        if not gains:
            return float(total)
        gain, cost = np.concatenate(gains), np.concatenate(costs)
        order = np.argsort(-gain / np.maximum(cost, 1e-15), kind="stable")
        spent = np.cumsum(cost[order])
        whole = int(np.searchsorted(spent, room, side="right"))
        total += gain[order[:whole]].sum()
        if whole < len(order):
            left = room - (spent[whole - 1] if whole else 0.0)
            total += gain[order[whole]] * left / max(cost[order[whole]], 1e-15)
        return float(total)

    def _room(self, widths: Ints) -> float:
        """What the core leaves of the budget, all terms of the leaves taken out."""
        spent = self._cost(widths)
        for number in self._p._leaves:
            item = self._p._items[number]
            now = (item.choices == widths[list(item.groups)]).all(axis=1).argmax()
            spent -= self._item_costs(item, widths)[now]
        return self._keep - spent

    def _knapsack(self, widths: Ints) -> Ints:
        """Exact choice for every leaf over a binned budget, the core as it is."""
        leaves = [self._p._items[number] for number in self._p._leaves]
        room = self._room(widths)
        if not leaves or room <= 0:
            return widths
        reach = np.zeros(BINS + 1)
        taken = np.zeros((len(leaves), BINS + 1), dtype=np.int64)
        for row, (number, item) in enumerate(zip(self._p._leaves, leaves, strict=True)):
            cost, value = self._item_costs(item, widths), self._values[number]
            steps = np.ceil(cost / room * BINS - 1e-9).astype(np.int64)
            best = np.full(BINS + 1, -np.inf)
            for choice in _undominated(steps, value):
                step = int(steps[choice])
                if step > BINS:
                    continue
                through = reach[: BINS + 1 - step] + value[choice]
                better = through > best[step:]
                best[step:][better] = through[better]
                taken[row, step:][better] = choice
            reach = best
        if not np.isfinite(reach[BINS]):
            return widths
        return self._trace_back(widths, leaves, taken, room)

    def _trace_back(self, widths: Ints, leaves: list[Item], taken: Ints, room: float) -> Ints:
        widths, at = widths.copy(), BINS
        for row in reversed(range(len(leaves))):
            item, choice = leaves[row], int(taken[row, at])
            cost = self._item_costs(item, widths)[choice]
            widths[list(item.groups)] = item.choices[choice]
            at -= int(np.ceil(cost / room * BINS - 1e-9))
        return widths

    def _fill(self, widths: Ints) -> Ints:
        """Spend what is left of the budget, on the alignment first, in finer steps only where too much stays unused."""
        units = self._p._units
        if self._cost(widths) > self._keep:
            widths = self._smallest_choice()
        if self._cost(widths) > self._keep:  # not in steps of the alignment
            widths, units = self._p.smallest_widths, np.ones_like(units)
        widths = self._exchange(self._raise(widths, units))
        while units.max() > 1 and self._cost(widths) < self._keep * (1 - SLACK):
            units = np.maximum(units // 2, 1)
            widths = self._raise(widths, units, once=True)
        if self._cost(widths) < self._keep * (1 - SLACK):
            widths = self._raise(widths, units)
        return widths

    def _raise(self, widths: Ints, units: Ints, *, once: bool = False) -> Ints:
        """Widen the group that gives the most value and still fits; `once`: a single group, as far as it goes."""
        widths = widths.copy()
        while True:
            candidates = self._wider(widths, units)
            if not len(candidates):
                return widths
            costs = self._p.cost.counts(candidates) / self._p.cost.dense
            fitting = candidates[costs <= self._keep]
            if not len(fitting):
                return widths
            if once:
                return np.asarray(fitting[int(costs[costs <= self._keep].argmax())])
            gains = [sum(self._tables[g][w] for g, w in enumerate(row)) for row in fitting.tolist()]
            widths = np.asarray(fitting[int(np.argmax(gains))])

    def _exchange(self, widths: Ints) -> Ints:
        """Narrow one item and widen another while too much stays unused and no more than SLACK of the value is lost."""
        least = self._worth(widths[None])[0]
        least -= SLACK * abs(least)  # thin streams may be worth less than nothing
        for _ in range(MAX_EXCHANGES):
            now = self._cost(widths)
            if now >= self._keep * (1 - SLACK):
                break
            down = self._narrower(widths) - widths
            up = self._wider(widths, self._p._units) - widths
            if not len(down) or not len(up):
                break
            up = up[:: -(-len(down) * len(up) // MAX_PAIRS)]
            first, second = np.divmod(np.arange(len(down) * len(up)), len(up))
            apart = ~((down[first] != 0) & (up[second] != 0)).any(axis=1)
            rows = widths + down[first[apart]] + up[second[apart]]
            costs, worth = self._p.cost.counts(rows) / self._p.cost.dense, self._worth(rows)
            better = np.flatnonzero((costs <= self._keep) & (costs > now) & (worth >= least))
            if not len(better):
                break
            near = better[costs[better] >= self._keep * (1 - SLACK)]
            widths = rows[near[worth[near].argmax()] if len(near) else better[costs[better].argmax()]]
        return widths

    def _worth(self, rows: Ints) -> Floats:
        """Value of many width vectors [K, G] ▶ [K]."""
        parts = [table[rows[:, group]] for group, table in enumerate(self._tables)]
        return np.asarray(np.sum(parts, axis=0), dtype=np.float64)

    def _narrower(self, widths: Ints) -> Ints:
        """All plans with one group narrower by a step of the alignment, or one item empty where that is legal."""
        rows = []
        for item in self._p._items:
            groups = list(item.groups)
            if not widths[groups].any():
                continue
            for group in groups:
                unit = int(self._p._units[group])
                narrower = (widths[group] - 1) // unit * unit
                if narrower >= max(1, self._p._low[group]):
                    rows.append(widths.copy())
                    rows[-1][group] = narrower
            if not item.choices[0].any():
                rows.append(widths.copy())
                rows[-1][groups] = 0
        return np.array(rows, dtype=np.int64).reshape(-1, len(widths))

    def _wider(self, widths: Ints, units: Ints) -> Ints:
        """All plans with one group, or one empty branch, at any larger width."""
        rows = []
        for item in self._p._items:
            now = widths[list(item.groups)]
            if len(item.groups) > 1 and not now.any():
                least = np.maximum(units, self._p._low)
                choices = np.minimum(least, self._p.graph.sizes)[list(item.groups)][None]
                steps = [(item.groups, choice) for choice in choices]
            else:
                steps = [
                    ((group,), np.array([width]))
                    for group in item.groups
                    for width in range(
                        int(widths[group] // units[group] + 1) * int(units[group]),
                        int(self._p.graph.sizes[group]) + 1,
                        int(units[group]),
                    )
                    if width >= self._p._low[group]
                ]
            for groups, choice in steps:
                row = widths.copy()
                row[list(groups)] = choice
                rows.append(row)
        return np.array(rows, dtype=np.int64).reshape(-1, len(widths))


def _least(graph: ChannelGraph, channels: int) -> Ints:
    """The gates of every group that make at least this many channels, or all of them, int64 [G]."""
    return np.array([min(group.size, -(-int(channels) // group.unit)) for group in graph.groups], dtype=np.int64)


def _thinned(steps: Ints, limit: int) -> list[int]:
    """At most `limit` of the steps, evenly, the first and the last among them."""
    if len(steps) > limit:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, limit).round().astype(np.int64))]
    chosen: list[int] = steps.tolist()
    return chosen


def _undominated(cost: Floats | Ints, value: Floats) -> list[int]:
    """Choices that no cheaper one matches in value, cheapest first."""
    kept: list[int] = []
    best = -np.inf
    for choice in np.lexsort((-value, cost)).tolist():
        if value[choice] > best:
            kept.append(choice)
            best = value[choice]
    return kept


def _hull(cost: Floats, value: Floats) -> list[int]:
    """Corners of the upper concave hull of (cost, value), cheapest first."""
    corners: list[int] = []
    for choice in _undominated(cost, value):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (value[b] - value[a]) * (cost[choice] - cost[a]) > (value[choice] - value[a]) * (cost[b] - cost[a]):
                break
            corners.pop()
        corners.append(choice)
    return corners
