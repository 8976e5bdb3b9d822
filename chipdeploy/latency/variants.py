"""Which cut networks a profile measures: probes of the device's stairs, then plans that spread over widths and time."""

from __future__ import annotations

from collections import Counter

import numpy as np

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.shapes import LayerShapes

STEPS = (1, 2, 4, 8, 16, 32)  # channels: what the stairs of a device may be
CANDIDATES = 8  # plans that are drawn for each that is taken
FREE_SHARE = 0.15  # of the plans with widths off the stairs
PROPOSED_SHARE = 0.5  # of the plans such as a projection proposes: what will be asked for later
BINS = 12  # of the share of the MACs
Cell = tuple[int, int, int]


def probes(graph: ChannelGraph) -> dict[int, Ints]:
    """For every step a: the widths [G] with a channels less in every group that is a multiple of 2a wide.

    Where a is a step of the device's stairs, or several, these networks are faster by about the MACs that they lack;
    where it is less, they take the time of the dense one, or more.
    """
    found = {}
    for step in STEPS:
        units = np.array([max(1, step // group.unit) for group in graph.groups])
        fits = graph.sizes % (2 * units) == 0
        if fits.any():
            found[step] = np.where(fits, graph.sizes - units, graph.sizes)
    return found


class Variants:
    """Draws plans, never one twice.

    Args:
        align: channels; widths go by it, but for `FREE_SHARE` of the plans.
    """

    def __init__(self, graph: ChannelGraph, align: int, seed: int = 0) -> None:
        self._graph = graph
        self._shapes = LayerShapes.of(graph)
        self._draw = np.random.default_rng(seed)
        self._cost = CostModel.of(graph, "macs")
        self._on, self._off = (Projector(graph, self._cost, step) for step in (align, 1))
        self._cells: Counter[Cell] = Counter()
        self._bins: Counter[int] = Counter()
        self._seen: set[bytes] = set()

    def take(self, count: int) -> list[Ints]:
        """Up to `count` new plans, widths [G] each: fewer where the network has no more."""
        taken: list[Ints] = []
        for _ in range(count):
            # On the stairs or off them is drawn first: off them all is new, and would always be taken.
            projector = self._off if self._draw.random() < FREE_SHARE else self._on
            drawn = [self._one(projector) for _ in range(CANDIDATES)]
            candidates = [widths for widths in drawn if widths.tobytes() not in self._seen]
            if not candidates:
                break
            best = max(candidates, key=self._worth)
            self._seen.add(best.tobytes())
            self._cells.update(self._in_cells(best))
            self._bins[self._bin(best)] += 1
            taken.append(best)
        return taken

    def proposed(self, count: int, *, free: bool = False) -> list[Ints]:
        """New plans such as a projection proposes, by the step or with free widths: for tests of a predictor."""
        taken: list[Ints] = []
        for _ in range(CANDIDATES * count):
            if len(taken) == count:
                break
            widths = self._proposal(self._off if free else self._on)
            if widths.tobytes() not in self._seen:
                self._seen.add(widths.tobytes())
                taken.append(widths)
        return taken

    def _one(self, projector: Projector) -> Ints:
        return self._proposal(projector) if self._draw.random() < PROPOSED_SHARE else self._spread(projector)

    def _proposal(self, projector: Projector) -> Ints:
        """The plan for random scores and a random budget; whole groups are worth more or less than others."""
        graph, draw = self._graph, self._draw
        scores = draw.lognormal(0.0, 1.0, graph.channels) * draw.lognormal(0.0, 0.5, len(graph.groups))[graph.group_of]
        keep = float(np.exp(draw.uniform(np.log(max(projector.smallest * 1.05, 0.02)), np.log(0.95))))
        return projector.widths(scores, keep)

    def _spread(self, projector: Projector) -> Ints:
        """Widths drawn around a share that differs from plan to plan; some branches gone."""
        draw, middle, gone = self._draw, self._draw.uniform(0.15, 1.0), self._draw.uniform(0.0, 0.7)
        widths = self._graph.sizes.copy()
        for groups, choices in projector.choices():
            living = choices[choices.any(axis=1)]
            if not choices[0].any() and draw.random() < gone:
                widths[list(groups)] = 0
                continue
            for place, group in enumerate(groups):
                levels = np.unique(living[:, place])
                share = draw.beta(4 * middle + 0.1, 4 * (1 - middle) + 0.1)
                widths[group] = levels[min(len(levels) - 1, int(share * len(levels)))]
        return widths

    def _worth(self, widths: Ints) -> float:
        """How much of a plan has not been seen yet."""
        cells = self._in_cells(widths)
        new = float(np.mean([1.0 / (1 + self._cells[cell]) for cell in cells])) if cells else 0.0
        return new / (1 + self._bins[self._bin(widths)])

    def _bin(self, widths: Ints) -> int:
        return int(np.log(self._cost.count(widths) / self._cost.dense + 1e-9) * BINS / 3)

    def _in_cells(self, widths: Ints) -> list[Cell]:
        """Kind of layer, input and output width of every layer that lives."""
        into, out, alive = (table[0] for table in self._shapes.at(widths[None]))
        return [(kind, int(into[n]), int(out[n])) for n, kind in enumerate(self._shapes.kinds) if alive[n]]
