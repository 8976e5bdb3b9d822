"""What a plan is worth: a sum over groups, of the scores of the channels that stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chipdeploy.chipnet.costs import Floats
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints


class Value:
    """The value of plans by their widths, for fixed scores: a group keeps its best channels.

    Args:
        scores: of every channel, above 0, [channels].
        power: of the law, see `value_of_widths`; 1 for the plain sum of scores.
    """

    def __init__(self, graph: ChannelGraph, scores: Floats, power: float) -> None:
        self._tables = [
            value_of_widths(scores[graph.span(number)], power, branch=group.branch is not None)
            for number, group in enumerate(graph.groups)
        ]

    @property
    def dense(self) -> float:
        """The value of the whole network."""
        return float(sum(table[-1] for table in self._tables))

    def of(self, rows: Ints) -> Floats:
        """The values of many width vectors [K, G] ▶ [K]."""
        return self.among(range(len(self._tables)), rows)

    def among(self, groups: Sequence[int], rows: Ints) -> Floats:
        """The share of some groups in it, at their widths [K, len(groups)] ▶ [K]."""
        parts = [self._tables[group][rows[:, at]] for at, group in enumerate(groups)]
        return np.asarray(np.sum(parts, axis=0), dtype=np.float64)


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
