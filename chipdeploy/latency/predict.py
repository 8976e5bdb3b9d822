"""From widths to latency: a staircase for every kind of layer, learnt in place, and a correction for the whole network.

Layers are timed inside whole cut networks, by the runtime's own clock. Each kind of layer gets a table of times at the
edges of the stairs, and a law for widths off them. What whole networks took end to end then scales both, and adds what
belongs to no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, nnls  # type: ignore[import-untyped]
from torch import Tensor

from chipdeploy.chipnet.costs import Floats
from chipdeploy.errors import RunError
from chipdeploy.graph.channels import ChannelGraph
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.shapes import LayerShapes

FOLDS = 8  # of the cross-validation that gives the interval
COVERAGE = 0.95
TRUST = 1.0  # weight of one measured network against the belief that what layers took needs no scaling
BLIND_TRUST = 0.1  # the same where no runtime told the times of layers, and MACs stand in for them
PRIOR = 2.0  # measured layers that a level's own factor must outweigh
LEAST = 12  # measured networks below which no predictor is made
MOST_OVERHEAD = 0.8  # of the smallest layer's time that may be the profiler's own


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


@dataclass(frozen=True, eq=False)
class Stairs:
    """The time of a kind of layer, in shares of the dense network's.

    Args:
        table: at input and output widths of i and j whole steps, [I + 1, J + 1]; row and column 0 are 0 channels.
        law: coefficients of `leftovers`, for widths off the stairs, [LEFTOVERS].
        deep: the layer is depthwise, and its input no width of its own.
    """

    table: Floats
    law: Floats
    deep: bool

    def at(self, into: Floats, out: Floats, step: int) -> Floats:
        """Times at widths of one shape."""
        on = self.on(into, out, step)
        row, column = (np.minimum(np.ceil(n / step), size - 1).astype(np.int64) for n, size in self._sides(into, out))
        found = self.table[row, column]
        if on.all():
            return found
        return np.where(on, found, np.maximum(leftovers(into, out, step) @ self.law, 0.0))

    def on(self, into: Floats, out: Floats, step: int) -> NDArray[np.bool_]:
        """Whether both widths are whole steps."""
        return np.asarray((out % step == 0) & ((into % step == 0) | self.deep))

    def _sides(self, into: Floats, out: Floats) -> list[tuple[Floats, int]]:
        first = np.zeros_like(into) if self.deep else into
        return [(first, self.table.shape[0]), (out, self.table.shape[1])]


LEFTOVERS = 9


def leftovers(into: Floats, out: Floats, step: int) -> Floats:
    """What the time of a layer off the stairs is made of, [..., LEFTOVERS].

    1, n_in, n_out, n_in·n_out; the last three with the widths filled up to whole steps; and the product again where
    the input or the output is off, since some runtimes leave their fast kernels then.
    """
    full_in, full_out, both = np.ceil(into / step) * step, np.ceil(out / step) * step, into * out
    off = both * (full_in != into), both * (full_out != out)
    return np.stack([np.ones_like(into), into, out, both, full_in, full_out, full_in * full_out, *off], axis=-1)


@dataclass(frozen=True, eq=False)
class LatencyCost:
    """Latency as a cost of group widths, in units of the dense network's time. Implements `chipnet.costs.Cost`.

    Args:
        stairs: of every kind of layer.
        constant: what every network takes, whatever its widths.
        step: channels from stair to stair.
        spread: relative half-width of the 95 % interval, from cross-validation.
        span: smallest and largest measured ratio; outside nothing is known.
        scale: by which all is multiplied, so that the prediction meets a measurement near by.
    """

    shapes: LayerShapes
    stairs: tuple[Stairs, ...]
    constant: float
    step: int
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
            times = self.stairs[kind].at(into[:, members], out[:, members], self.step)
            total += (times * alive[:, members]).sum(axis=1)
        return self.scale * total

    def soft(self, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """Time over the dense one's at soft widths [G] and soft presence of branches [B], straight between stairs."""
        return SoftLatency(self, device)

    def scaled(self, factor: float) -> LatencyCost:
        """The same stairs, all times multiplied."""
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
    """The tables, bilinear between the stairs' edges; along a side that no group moves, at its one width."""

    def __init__(self, cost: LatencyCost, device: torch.device | str) -> None:
        shapes = cost.shapes
        self._constant, self._step = cost.constant * cost.scale, cost.step
        self._into, self._out = (torch.from_numpy(table).float().to(device) for table in (shapes.into, shapes.out))
        self._branch = torch.from_numpy(shapes.branch).to(device)
        together: dict[tuple[int, float | None, float | None], list[int]] = {}
        for layer, kind in enumerate(shapes.kinds):
            into = 0.0 if shapes.depthwise[layer] else _fixed(shapes.into[:, layer])
            together.setdefault((kind, into, _fixed(shapes.out[:, layer])), []).append(layer)
        self._parts = []
        for (kind, fixed_in, fixed_out), layers in together.items():
            stairs = cost.stairs[kind]
            sides = [
                np.arange(size) * float(cost.step) if fixed is None else np.array([fixed])
                for fixed, size in zip((fixed_in, fixed_out), stairs.table.shape, strict=True)
            ]
            into, out = np.meshgrid(*sides, indexing="ij")
            table = torch.from_numpy(stairs.at(into, out, cost.step) * cost.scale).float().to(device)
            members = torch.tensor(layers, device=device)
            self._parts.append((table, members, fixed_in is None, fixed_out is None))

    def __call__(self, widths: Tensor, alive: Tensor) -> Tensor:
        one = widths.new_ones(1)
        extended, present = torch.cat([widths, one]), torch.cat([alive, one])
        into, out = extended @ self._into / self._step, extended @ self._out / self._step
        total = widths.new_tensor(self._constant)
        for table, members, moves_in, moves_out in self._parts:
            rows, columns = into[members] * moves_in, out[members] * moves_out
            total = total + (_between(table, rows, columns) * present[self._branch[members]]).sum()
        return total


def _fixed(weights: Floats) -> float | None:
    """The width of a side that no group moves, from its weights [G + 1]; None where one does."""
    return None if weights[:-1].any() else float(weights[-1])


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
    """The predictor of one network on one target, from measured cuts of it; the interval by cross-validation.

    Raises:
        RunError: fewer than `LEAST` samples.
    """
    if len(samples) < LEAST:
        raise RunError(f"{len(samples)} measured networks are too few to predict from; {LEAST} or more are needed")
    shapes = LayerShapes.of(graph)
    errors = []
    for fold in range(FOLDS):
        seen = [sample for number, sample in enumerate(samples) if number % FOLDS != fold]
        held = [sample for number, sample in enumerate(samples) if number % FOLDS == fold]
        guess = _fitted(shapes, seen, step).counts(np.stack([sample.widths for sample in held]))
        errors += np.abs(np.log(guess / [sample.ratio for sample in held])).tolist()
    return replace(_fitted(shapes, samples, step), spread=float(np.expm1(np.quantile(errors, COVERAGE))))


def _fitted(shapes: LayerShapes, samples: Sequence[Sample], step: int) -> LatencyCost:
    told = bool(samples[0].layers)
    stairs = learnt(shapes, samples, step) if told else _by_macs(shapes, step)
    ratios = np.array([sample.ratio for sample in samples])
    start = LatencyCost(shapes, stairs, 0.0, step, span=(float(ratios.min()), float(ratios.max())))
    return _corrected(start, np.stack([sample.widths for sample in samples]), ratios, TRUST if told else BLIND_TRUST)


def _levels(shapes: LayerShapes, kind: int, step: int) -> tuple[int, int, bool]:
    """Rows and columns of a kind's table, and whether it is depthwise."""
    layer = shapes.kinds.index(kind)
    deep = bool(shapes.depthwise[layer])
    into, out = (int(np.ceil(table[:, layer] @ shapes.full / step)) for table in (shapes.into, shapes.out))
    return 1 if deep else into + 1, out + 1, deep


def learnt(shapes: LayerShapes, samples: Sequence[Sample], step: int) -> tuple[Stairs, ...]:
    """Stairs of every kind from the times of single layers."""
    into, out, alive = shapes.at(np.stack([sample.widths for sample in samples]))
    times = np.array([[sample.layers.get(name, 0.0) for name in shapes.names] for sample in samples])
    kinds, found = np.array(shapes.kinds), []
    for kind in range(kinds.max() + 1):
        members = kinds == kind
        told = alive[:, members] & (times[:, members] > 0)
        found.append(
            _stairs(
                into[:, members][told],
                out[:, members][told],
                times[:, members][told],
                _levels(shapes, kind, step),
                step,
            )
        )
    return tuple(found)


def _stairs(into: Floats, out: Floats, times: Floats, levels: tuple[int, int, bool], step: int) -> Stairs:
    """One kind: laws of least relative error on and off the stairs, and a factor for every level that has its own."""
    rows, columns, deep = levels
    blank = Stairs(np.zeros((rows, columns)), np.zeros(LEFTOVERS), deep)
    if not len(times):
        return blank
    on = blank.on(into, out, step)
    beside = _law(leftovers(into, out, step)[~on], times[~on])
    plain = _law(_plain(into, out)[on], times[on])
    if not plain.any():  # as off the stairs, with nothing left over
        plain = beside[:4] + np.array([0.0, *beside[4:7]])
    if not beside.any():
        beside = np.array([plain[0], 0, 0, 0, *plain[1:], 0, 0])
    first = np.zeros(1) if deep else np.arange(rows) * float(step)
    table = _plain(first[:, None] + np.zeros(columns), np.arange(columns) * float(step) + np.zeros((rows, 1))) @ plain
    if on.any():
        row = np.zeros(on.sum(), dtype=np.int64) if deep else (into[on] / step).astype(np.int64)
        column = (out[on] / step).astype(np.int64)
        for places, axis in ((column, 1), (row, 0)):
            factor = _factors(places, times[on] / table[row, column].clip(min=1e-30), table.shape[axis])
            table *= factor if axis else factor[:, None]
    # A wider layer on the stairs is never faster.
    table = np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)
    return Stairs(table, beside, deep)


def _plain(into: Floats, out: Floats) -> Floats:
    """1, n_in, n_out, n_in·n_out."""
    return np.stack([np.ones_like(into), into, out, into * out], axis=-1)


def _law(table: Floats, times: Floats) -> Floats:
    """Non-negative coefficients of least relative error."""
    if not len(times):
        return np.zeros(table.shape[1])
    size = table.max(axis=0).clip(min=1e-12)
    found, _ = nnls(table / size / times[:, None], np.ones(len(times)))
    return np.asarray(found / size)


def _factors(places: Ints, errors: Floats, count: int) -> Floats:
    """By how much the levels of one side differ from the law, [count]; those that were not seen as their neighbours."""
    number = np.bincount(places, minlength=count)
    logs = np.bincount(places, weights=np.log(errors), minlength=count) / (number + PRIOR)
    seen = np.flatnonzero(number)
    return np.exp(np.interp(np.arange(count), seen, logs[seen]))


def _by_macs(shapes: LayerShapes, step: int) -> tuple[Stairs, ...]:
    """Where no runtime tells the times of layers: in proportion to the MACs of filled-up widths."""
    found = []
    for kind in range(max(shapes.kinds) + 1):
        rows, columns, deep = _levels(shapes, kind, step)
        work = float(shapes.work[shapes.kinds.index(kind)])
        first = np.full(1, 1.0) if deep else np.arange(rows) * float(step)
        law = np.zeros(LEFTOVERS)
        law[5 if deep else 6] = work
        found.append(Stairs(work * np.outer(first, np.arange(columns) * float(step)), law, deep))
    return tuple(found)


def _corrected(start: LatencyCost, widths: Ints, ratios: Floats, trust: float) -> LatencyCost:
    """Every kind scaled, on the stairs and off them; more for every output and layer; and the network's constant.

    Least squares of the relative error over whole networks; `trust` holds the scales near a common one. What the
    profiler itself took in every layer may be taken off.
    """
    shapes, step = start.shapes, start.step
    into, out, alive = shapes.at(widths)
    kinds, count = np.array(shapes.kinds), len(start.stairs)
    times, on = np.zeros_like(into), np.zeros_like(alive)
    for kind, stairs in enumerate(start.stairs):
        members = kinds == kind
        times[:, members] = stairs.at(into[:, members], out[:, members], step)
        on[:, members] = stairs.on(into[:, members], out[:, members], step)
    times, on = times * alive, on & alive
    by_kind = [(times * where)[:, kinds == kind].sum(axis=1) for where in (on, alive & ~on) for kind in range(count)]
    terms = np.stack(by_kind, axis=1)
    common = float(np.median(ratios / terms.sum(axis=1).clip(min=1e-30)))
    terms, times = terms * common, times * common
    volume, off = out * shapes.positions * alive, alive & ~on
    rest = [volume.sum(axis=1), (volume * off).sum(axis=1), off.sum(axis=1), np.ones(len(ratios)), alive.sum(axis=1)]
    sizes = np.array([column.max().clip(min=1e-30) for column in rest], dtype=np.float64)
    share = terms.mean(axis=0) / terms.mean(axis=0).sum()
    table = np.column_stack([terms, *(column / size for column, size in zip(rest, sizes, strict=True))])
    lowest = np.zeros(table.shape[1])
    lowest[-1] = -MOST_OVERHEAD * float(times[alive].min()) * sizes[-1]
    solved = lsq_linear(
        np.concatenate([table / ratios[:, None], np.diag(np.append(trust * share, np.zeros(len(rest))))]),
        np.concatenate([np.ones(len(ratios)), trust * share, np.zeros(len(rest))]),
        (lowest - 1e-12, np.inf),
    ).x
    scales, (by_output, by_off_output, by_off, constant, by_layer) = (
        solved[: 2 * count] * common,
        solved[2 * count :] / sizes,
    )
    made = []
    for kind, stairs in enumerate(start.stairs):
        positions = float(shapes.positions[shapes.kinds.index(kind)])
        columns = np.arange(stairs.table.shape[1]) * float(step)
        law = stairs.law * scales[count + kind]
        law[0] += by_layer + by_off
        law[2] += (by_output + by_off_output) * positions
        table = stairs.table * scales[kind] + by_layer + by_output * positions * columns
        made.append(Stairs(np.maximum(table, 0.0), law, stairs.deep))  # no layer gives time back
    return replace(start, stairs=tuple(made), constant=float(constant))
