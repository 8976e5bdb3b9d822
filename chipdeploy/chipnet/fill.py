"""The last step of a projection: what a plan leaves of its budget is spent."""

from __future__ import annotations

import numpy as np

from chipdeploy.chipnet.space import Space
from chipdeploy.chipnet.value import Value
from chipdeploy.graph.labels import Ints

SLACK = 0.02  # share of the budget that may stay unused before exchanges, then finer steps than the alignment are tried
MAX_EXCHANGES = 8
MAX_PAIRS = 20000  # of a narrower and a wider item in one exchange


def fill(space: Space, value: Value, keep: float, widths: Ints) -> Ints:
    """Spend what widths [G] leave of the budget, on the alignment first, in finer steps only where too much is left.

    Widths over the budget give way to the smallest that there are.
    """
    units = space.units
    if space.share(widths) > keep:
        widths = space.smallest_aligned
    if space.share(widths) > keep:
        widths, units = space.smallest, np.ones_like(units)
    enough = keep * (1 - SLACK)
    widths = _exchange(space, value, keep, _raise(space, value, keep, widths, units))
    while units.max() > 1 and space.share(widths) < enough:
        units = np.maximum(units // 2, 1)
        widths = _widen_one(space, keep, widths, units)
    if space.share(widths) < enough:
        widths = _raise(space, value, keep, widths, units)
    return widths


def _raise(space: Space, value: Value, keep: float, widths: Ints, units: Ints) -> Ints:
    """Widen the group that gives the most value and still fits, as long as there is one."""
    while len(fitting := _fitting(space, keep, widths, units)):
        widths = fitting[int(np.argmax(value.of(fitting)))]
    return widths


def _widen_one(space: Space, keep: float, widths: Ints, units: Ints) -> Ints:
    """Widen a single group, that which fills the budget best."""
    fitting = _fitting(space, keep, widths, units)
    return np.asarray(fitting[int(space.shares(fitting).argmax())]) if len(fitting) else widths


def _fitting(space: Space, keep: float, widths: Ints, units: Ints) -> Ints:
    wider = space.wider(widths, units)
    return np.asarray(wider[space.shares(wider) <= keep])


def _exchange(space: Space, value: Value, keep: float, widths: Ints) -> Ints:
    """Narrow one item and widen another while too much stays unused and no more than SLACK of the value is lost."""
    least = float(value.of(widths[None])[0])
    least -= SLACK * abs(least)  # thin streams may be worth less than nothing
    for _ in range(MAX_EXCHANGES):
        now = space.share(widths)
        if now >= keep * (1 - SLACK):
            break
        rows = _exchanged(space, widths)
        costs, worth = space.shares(rows), value.of(rows)
        better = np.flatnonzero((costs <= keep) & (costs > now) & (worth >= least))
        if not len(better):
            break
        near = better[costs[better] >= keep * (1 - SLACK)]
        widths = rows[near[worth[near].argmax()] if len(near) else better[costs[better].argmax()]]
    return widths


def _exchanged(space: Space, widths: Ints) -> Ints:
    """Plans with one item narrower and another one wider, at most MAX_PAIRS of them, [K, G]."""
    down = space.narrower(widths) - widths
    up = space.wider(widths, space.units) - widths
    up = up[:: max(1, -(-len(down) * len(up) // MAX_PAIRS))]
    first, second = np.divmod(np.arange(len(down) * len(up)), max(1, len(up)))
    apart = ~((down[first] != 0) & (up[second] != 0)).any(axis=1)
    return np.asarray(widths + down[first[apart]] + up[second[apart]])
