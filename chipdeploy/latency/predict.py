"""From widths to latency: what every layer takes at every width, learnt from whole networks on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

import numpy as np
import torch
from torch import Tensor

from chipdeploy.chipnet.costs import Floats
from chipdeploy.errors import RunError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.kriging import Extra, krige
from chipdeploy.latency.laws import Law, fitted_laws
from chipdeploy.latency.shapes import LayerShapes

COVERAGE = 0.95
LEAST = 12  # measured networks below which no predictor is made


@dataclass(frozen=True)
class Sample:
    """One measured network.

    Args:
        widths: [G].
        ratio: its time over the dense one's.
        layers: times of its layers over the sum of the dense network's layers; empty where the runtime does not tell.
    """

    widths: Ints
    ratio: float
    layers: Mapping[str, float]


@dataclass(frozen=True)
class Side:
    """The input or the output widths of a kind of layer.

    Args:
        unit: all are multiples of it: an input that was flattened from 7x7 has 49 for each channel.
        edge: from stair to stair, a multiple of the unit.
        largest: of the dense network, filled up to a whole stair.
    """

    unit: int
    edge: int
    largest: int

    @classmethod
    def of(cls, weights: Floats, full: Floats, step: int) -> Side:
        """From the weights [G + 1, L] of the layers of a kind; `full` are the widths [G + 1] of the dense network."""
        unit = gcd(*weights.astype(np.int64).ravel().tolist()) or 1
        edge = lcm(unit, step)
        return cls(unit, edge, int(np.ceil((full @ weights).max() / edge)) * edge)

    @property
    def widths(self) -> Floats:
        """All, from 0."""
        return np.arange(0.0, self.largest + 1, self.unit)

    def place(self, widths: Floats) -> Ints:
        """Where widths stand in `widths`."""
        return np.rint(widths / self.unit).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Table:
    """The time of a kind of layer at all its widths, in shares of the dense network's; [rows, columns]."""

    times: Floats
    into: Side
    out: Side

    @classmethod
    def of(cls, law: Law, extra: Extra, into: Side, out: Side) -> Table:
        """What the law says and the whole networks add."""
        rows, columns = np.meshgrid(into.widths, out.widths, indexing="ij")
        times = np.maximum(law.at(rows, columns) + extra.over(into.widths, out.widths, law), 0.0)
        # No channels, no time; a depthwise layer has no input of its own.
        times[:, 0] = 0.0
        if into.largest:
            times[0] = 0.0
        return cls(times, into, out)

    def at(self, into: Floats, out: Floats) -> Floats:
        """Times at widths of one shape."""
        return np.asarray(self.times[self.into.place(into), self.out.place(out)])


@dataclass(frozen=True, eq=False)
class LatencyCost:
    """Latency as a cost of group widths, in units of the dense network's time. Implements `chipnet.costs.Cost`.

    Args:
        tables: of every kind of layer.
        constant: what every network takes, whatever its widths.
        spread: relative half-width of the 95 % interval, from every network's prediction by all others.
        span: smallest and largest measured ratio; outside nothing is known.
        scale: by which all is multiplied, so that the prediction meets a measurement near by.
    """

    shapes: LayerShapes
    tables: tuple[Table, ...]
    constant: float
    spread: float = 0.0
    span: tuple[float, float] = (0.0, 1.0)
    scale: float = 1.0

    @property
    def dense(self) -> float:
        """The unit: 1, the time of the dense network."""
        return 1.0

    def count(self, widths: Ints) -> float:
        """Time over the dense one's at widths [G]."""
        return float(self.counts(np.asarray(widths)[None])[0])

    def counts(self, widths: Ints) -> Floats:
        """[K, G] ▶ [K]."""
        return self.scale * self.constant + self.partial(widths, np.arange(len(self.shapes.kinds)))

    def touching(self, groups: tuple[int, ...]) -> Ints:
        """Layers whose time depends on any of the groups."""
        return np.flatnonzero(self.shapes.touched[list(groups)].any(axis=0))

    def partial(self, widths: Ints, terms: Ints) -> Floats:
        """What some layers take, [K, G] ▶ [K]."""
        into, out, alive = self.shapes.at(widths, terms)
        kinds = np.array(self.shapes.kinds)[terms]
        total = np.zeros(len(widths))
        for kind in np.unique(kinds):
            members = kinds == kind
            times = self.tables[kind].at(into[:, members], out[:, members])
            total += (times * alive[:, members]).sum(axis=1)
        return self.scale * total

    def soft(self, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """Time over the dense one's at soft widths [G] and soft presence of branches [B], straight between stairs."""
        return SoftLatency(self, device)

    def scaled(self, factor: float) -> LatencyCost:
        """The same tables, all times multiplied."""
        return replace(self, scale=self.scale * factor)

    def interval(self, widths: Ints) -> tuple[float, float]:
        """95 % interval of the ratio at widths [G]."""
        ratio = self.count(widths)
        return ratio / (1 + self.spread), ratio * (1 + self.spread)

    def knows(self, widths: Ints) -> bool:
        """Whether the ratio at widths [G] lies in the span of what was measured, or a tenth beside it."""
        low, high = self.span
        return 0.9 * low <= self.count(widths) <= 1.1 * high


class SoftLatency:
    """The tables, bilinear between the edges of the stairs of every layer."""

    def __init__(self, cost: LatencyCost, device: torch.device | str) -> None:
        shapes = cost.shapes
        self._constant = cost.constant * cost.scale
        self._into, self._out = (torch.from_numpy(table).float().to(device) for table in (shapes.into, shapes.out))
        self._branch = torch.from_numpy(shapes.branch).to(device)
        together: dict[tuple[int, Stairs, Stairs], list[int]] = {}
        for layer, kind in enumerate(shapes.kinds):
            table = cost.tables[kind]
            sides = ((shapes.into, table.into.edge), (shapes.out, table.out.edge))
            rows, columns = (Stairs.of(weights[:, layer], shapes.full, edge) for weights, edge in sides)
            together.setdefault((kind, rows, columns), []).append(layer)
        self._parts = []
        for (kind, rows, columns), layers in together.items():
            times = cost.tables[kind].at(*np.meshgrid(rows.edges, columns.edges, indexing="ij")) * cost.scale
            # A wider layer on the stairs is never faster, whatever noise says: the slope must not mislead.
            times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
            members = torch.tensor(layers, device=device)
            self._parts.append((torch.from_numpy(times).float().to(device), members, rows, columns))

    def __call__(self, widths: Tensor, alive: Tensor) -> Tensor:
        one = widths.new_ones(1)
        extended, present = torch.cat([widths, one]), torch.cat([alive, one])
        into, out = extended @ self._into, extended @ self._out
        total = widths.new_tensor(self._constant)
        for times, members, rows, columns in self._parts:
            found = _between(times, rows.place(into[members]), columns.place(out[members]))
            total = total + (found * present[self._branch[members]]).sum()
        return total


@dataclass(frozen=True)
class Stairs:
    """One side of a layer.

    Args:
        edges: the widest of every stair, from 0 to the dense width, which may lie inside a stair; of a side that no
            group moves its one width.
        edge: from stair to stair.
    """

    edges: tuple[float, ...]
    edge: int

    @classmethod
    def of(cls, weights: Floats, full: Floats, edge: int) -> Stairs:
        """From the weights [G + 1] of one layer; `full` are the widths [G + 1] of the dense network."""
        widest = float(full @ weights)
        return cls((*np.arange(0.0, widest, edge).tolist(), widest) if weights[:-1].any() else (widest,), edge)

    def place(self, widths: Tensor) -> Tensor:
        """Where real widths stand among the edges: 1.5 is half way from the second to the third."""
        if len(self.edges) == 1:
            return torch.zeros_like(widths)
        last = len(self.edges) - 2
        stairs = widths / self.edge
        return torch.where(stairs < last, stairs, last + (stairs - last) / (self.edges[-1] / self.edge - last))


def _between(table: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Bilinear values of a table [I, J] at real places [N]."""
    corners, shares = [], []
    for place, size in ((row, table.shape[0]), (column, table.shape[1])):
        low = place.detach().floor().clamp(0, max(0, size - 2)).long()
        corners.append((low, (low + 1).clamp(max=size - 1)))
        shares.append(place - low)
    (top, bottom), (left, right), (down, over) = corners[0], corners[1], shares
    above = table[top, left] * (1 - over) + table[top, right] * over
    below = table[bottom, left] * (1 - over) + table[bottom, right] * over
    return above * (1 - down) + below * down


def fit(graph: ChannelGraph, samples: Sequence[Sample], step: int) -> LatencyCost:
    """The predictor of one network on one target, from measured cuts of it.

    Args:
        step: channels from stair to stair.

    Raises:
        RunError: fewer than `LEAST` samples.
    """
    if len(samples) < LEAST:
        raise RunError(
            f"{len(samples)} measured networks are too few to predict from, {LEAST} or more are needed; "
            "measure on with 'chipdeploy profile'"
        )
    shapes = LayerShapes.of(graph)
    widths, ratios = np.stack([sample.widths for sample in samples]), np.array([sample.ratio for sample in samples])
    laws, constant = fitted_laws(shapes, [sample.layers for sample in samples], widths, ratios, step)
    found = krige(shapes, laws, constant, widths, ratios, step)
    kinds, tables = np.array(shapes.kinds), []
    for kind, (law, extra) in enumerate(zip(laws, found.extras, strict=True)):
        into, out = (Side.of(side[:, kinds == kind], shapes.full, step) for side in (shapes.into, shapes.out))
        tables.append(Table.of(law, extra, into, out))
    spread = float(np.expm1(np.quantile(np.abs(found.errors), COVERAGE)))
    return LatencyCost(shapes, tuple(tables), constant, spread, (float(ratios.min()), float(ratios.max())))
