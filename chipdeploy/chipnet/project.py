"""From scores to a plan: the most valuable widths and branches whose cost stays under the budget.

ψ alone ranks the channels of a group; what is searched are the widths.
"""

from __future__ import annotations

import numpy as np

from chipdeploy.chipnet.costs import Cost, Floats
from chipdeploy.chipnet.search import Search
from chipdeploy.chipnet.space import Space
from chipdeploy.chipnet.value import Value
from chipdeploy.errors import BudgetError
from chipdeploy.graph.channels import ChannelGraph, Mask
from chipdeploy.graph.labels import Ints


class Projector:
    """Finds plans for one graph, one cost and one alignment.

    Args:
        align: channels by which widths go, where a group allows it.
        min_width: channels of which no group that stays has fewer, or all that it has.
        blocks: only whole branches go; all widths stay.
        power: of the value's law, see `value_of_widths`; 1 for the plain sum of scores.

    Raises:
        UsageError: an alignment or a least width below 1; blocks were to go, and none can.
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
        self.graph, self.cost = graph, cost
        self._align, self._min_width, self._blocks, self._power = align, min_width, blocks, power
        self._space = Space(graph, cost, align, min_width=min_width, blocks=blocks)

    @property
    def smallest_widths(self) -> Ints:
        """The widths [G] of the cheapest legal plan."""
        return self._space.smallest

    @property
    def smallest(self) -> float:
        """The least share of the cost that any legal plan keeps."""
        return self._space.share(self.smallest_widths)

    def under(self, cost: Cost) -> Projector:
        """For another cost of the same graph, in the same steps."""
        return Projector(
            self.graph, cost, self._align, min_width=self._min_width, blocks=self._blocks, power=self._power
        )

    def choices(self) -> list[tuple[tuple[int, ...], Ints]]:
        """Groups that are chosen together, and the widths among which they choose, [K, groups], the narrowest first."""
        return [(item.groups, item.choices) for item in self._space.items]

    def check(self, keep: float) -> None:
        """Raises BudgetError where no connected network is as cheap as keep · dense."""
        if keep >= self.smallest:
            return
        least = np.ceil(self.smallest * 1000) / 1000
        fix = f"ask for {least:g} or more"
        if least >= 1:
            fix = f"nothing can go: lower the least width (--min-width {self._min_width}), or exclude less"
        raise BudgetError(
            f"a budget of {keep:.2%} is out of reach: the smallest connected network keeps {self.smallest:.2%}; {fix}"
        )

    def project(self, scores: Floats, keep: float, *, start: Ints | None = None) -> Mask:
        """Keep the plan of the highest value with cost ≤ keep · dense.

        scores: positive value of every channel, [channels]. start: widths from which the search begins.

        Raises:
            BudgetError: not even the smallest connected network is that cheap.
        """
        return self.top(scores, self.widths(scores, keep, start=start))

    def value(self, scores: Floats, widths: Ints) -> float:
        """What a plan of widths [G] is worth to the search."""
        return float(Value(self.graph, scores, self._power).of(widths[None])[0])

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
        return Search(self._space, Value(self.graph, scores, self._power), keep).run(start)
