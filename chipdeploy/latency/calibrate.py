"""Which budget gives a latency: predicted over a whole range of budgets, with what is out of reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from chipdeploy.chipnet.costs import BUDGETS, CostModel, Floats
from chipdeploy.chipnet.project import Projector
from chipdeploy.errors import BudgetError
from chipdeploy.latency.predict import LatencyCost

POINTS = 10  # of a curve
DRAWS = 3  # of channel scores: what will be kept is not known before training, and moves the time a little
LEAST, LARGEST = 0.01, 0.98  # of a curve's points; one more where the smallest network is smaller
KINDS = tuple(BUDGETS)


@dataclass(frozen=True)
class Curve:
    """Time over the dense one's against the share of one budget.

    Args:
        keep: shares, ascending, [N].
        ratio: the median over draws of scores, [N].
        low, high: the 95 % interval of a prediction around the least and the greatest draw, [N].
    """

    kind: str
    keep: Floats
    ratio: Floats
    low: Floats
    high: Floats

    def at(self, share: float) -> tuple[float, float, float] | None:
        """The budget that gives a share of the dense time, and the interval in which it may lie.

        None where plans under the smallest budget of this kind still take more.
        """
        if share < self.ratio[0]:
            return None
        found = [self._inverse(side, share) for side in (self.ratio, self.high, self.low)]
        return found[0], found[1], found[2]

    def _inverse(self, ratios: Floats, share: float) -> float:
        rising = np.maximum.accumulate(ratios)
        return float(np.interp(share, np.append(rising, max(1.0, rising[-1])), np.append(self.keep, 1.0)))

    def to_dict(self) -> dict[str, Any]:
        sides = {"keep": self.keep, "ratio": self.ratio, "low": self.low, "high": self.high}
        return {name: [round(float(value), 5) for value in values] for name, values in sides.items()}


def curves(
    projector: Projector,
    cost: LatencyCost,
    *,
    kinds: tuple[str, ...] = KINDS,
    on_point: Callable[[int, int], None] | None = None,
) -> list[Curve]:
    """Latency against every kind of budget.

    Args:
        projector: by which plans are found; its steps and least widths hold under every budget.
    """
    graph = projector.graph
    draws = [np.ones(graph.channels)]
    draws += [np.random.default_rng(seed).lognormal(0.0, 1.0, graph.channels) for seed in range(1, DRAWS)]
    found, done = [], 0
    projectors = [projector.under(CostModel.of(graph, BUDGETS[kind])) for kind in kinds]
    shares = [_points(under.smallest * 1.02) for under in projectors]
    for kind, under, keeps in zip(kinds, projectors, shares, strict=True):
        ratios = np.empty((DRAWS, len(keeps)))
        for point, keep in enumerate(keeps):
            for number, scores in enumerate(draws):
                ratios[number, point] = cost.count(under.widths(scores, float(keep)))
            done += 1
            if on_point:
                on_point(done, sum(map(len, shares)))
        low, high = ratios.min(axis=0) / (1 + cost.spread), ratios.max(axis=0) * (1 + cost.spread)
        found.append(Curve(kind, keeps, np.median(ratios, axis=0), low, high))
    return found


def _points(smallest: float) -> Floats:
    """Budgets of a curve, from the smallest that can be kept."""
    found = np.geomspace(max(smallest, LEAST), LARGEST, POINTS)
    return found if smallest >= LEAST else np.append(smallest, found)


def check_reach(projector: Projector, cost: LatencyCost, share: float, dense_ms: float) -> None:
    """Refuse what no plan reaches.

    Args:
        projector: of the latency.
        share: wanted, of the dense time.

    Raises:
        BudgetError: the smallest connected network is slower, by the whole interval of its prediction.
    """
    least = float(cost.count(projector.smallest_widths))
    if share < least / (1 + cost.spread):
        raise BudgetError(
            f"{share * dense_ms:.3g} ms is out of reach: even at the smallest widths the network takes "
            f"{least * dense_ms:.3g} ms, {least:.2g} of the dense; ask for {least * dense_ms * 1.05:.3g} ms or more"
        )
