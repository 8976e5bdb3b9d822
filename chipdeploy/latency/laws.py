"""A first guess of what a kind of layer takes: laws of its widths, from the times of single layers or from MACs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear, nnls  # type: ignore[import-untyped]

from chipdeploy.chipnet.costs import Floats
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.shapes import LayerShapes

TRUST = 1.0  # weight of one measured network against the belief that what layers took needs no scaling
BLIND_TRUST = 0.1  # the same where no runtime told the times of layers, and MACs stand in for them
MOST_OVERHEAD = 0.8  # of the smallest layer's time that may be the profiler's own
LEAST_TOLD = 0.5  # of a network's time that must bear names of its layers for the runtime to have told it
ON, OFF = 4, 9  # coefficients of a law on the stairs and off them


@dataclass(frozen=True, eq=False)
class Law:
    """The time of a kind of layer, in shares of the dense network's.

    Args:
        on: coefficients of `plain`, [ON], where both widths are whole steps.
        off: of `leftovers`, [OFF], elsewhere.
        deep: the layer is depthwise, and its input no width of its own.
    """

    on: Floats
    off: Floats
    deep: bool
    step: int

    def at(self, into: Floats, out: Floats) -> Floats:
        """Times at widths of one shape."""
        beside = leftovers(into, out, self.step) @ self.off
        return np.maximum(np.where(self.whole(into, out), plain(into, out) @ self.on, beside), 0.0)

    def whole(self, into: Floats, out: Floats) -> NDArray[np.bool_]:
        """Whether both widths are whole steps."""
        return np.asarray((out % self.step == 0) & ((into % self.step == 0) | self.deep))


def plain(into: Floats, out: Floats) -> Floats:
    """1, n_in, n_out, n_in·n_out; [..., ON]."""
    return np.stack([np.ones_like(into), into, out, into * out], axis=-1)


def leftovers(into: Floats, out: Floats, step: int) -> Floats:
    """What the time of a layer off the stairs is made of, [..., OFF].

    1, n_in, n_out, n_in·n_out; the last three with the widths filled up to whole steps; and the product again where
    the input or the output is off, since some runtimes leave their fast kernels then.
    """
    full_in, full_out, both = np.ceil(into / step) * step, np.ceil(out / step) * step, into * out
    off = both * (full_in != into), both * (full_out != out)
    return np.stack([np.ones_like(into), into, out, both, full_in, full_out, full_in * full_out, *off], axis=-1)


def fitted_laws(
    shapes: LayerShapes, layers: Sequence[Mapping[str, float]], widths: Ints, ratios: Floats, step: int
) -> tuple[tuple[Law, ...], float]:
    """The law of every kind, and what every network takes besides.

    Args:
        layers: of every network the times of its layers over the sum of the dense network's; empty where unknown.
        widths: [N, G].
        ratios: times of whole networks over the dense one's, [N].
    """
    if _told(shapes, layers) >= LEAST_TOLD:
        return corrected(shapes, laws_of_layers(shapes, layers, widths, step), widths, ratios, TRUST)
    return corrected(shapes, laws_of_macs(shapes, step), widths, ratios, BLIND_TRUST)


def _told(shapes: LayerShapes, layers: Sequence[Mapping[str, float]]) -> float:
    """Share of the networks' time that bears names of layers; a runtime may fuse them under names of its own."""
    named = sum(row.get(name, 0.0) for row in layers for name in shapes.names)
    whole = sum(sum(row.values()) for row in layers)
    return named / whole if whole else 0.0


def laws_of_layers(
    shapes: LayerShapes, layers: Sequence[Mapping[str, float]], widths: Ints, step: int
) -> tuple[Law, ...]:
    """From the times of single layers, each in its network; by MACs for a kind of which nothing was told."""
    into, out, alive = shapes.at(widths)
    times = np.array([[row.get(name, 0.0) for name in shapes.names] for row in layers])
    kinds, found, untold = np.array(shapes.kinds), [], laws_of_macs(shapes, step)
    seconds, work = 0.0, 0.0
    for kind in range(kinds.max() + 1):
        members = kinds == kind
        told = alive[:, members] & (times[:, members] > 0)
        one, other, seen = (table[:, members][told] for table in (into, out, times))
        seconds, work = seconds + seen.sum(), work + untold[kind].at(one, other).sum()
        found.append(_law(one, other, seen, _deep(shapes, kind), step) if told.any() else None)
    rate = seconds / work
    scaled = (replace(law, on=law.on * rate, off=law.off * rate) for law in untold)
    return tuple(law or other for law, other in zip(found, scaled, strict=True))


def laws_of_macs(shapes: LayerShapes, step: int) -> tuple[Law, ...]:
    """In proportion to the MACs of filled-up widths."""
    found = []
    for kind in range(max(shapes.kinds) + 1):
        deep, work = _deep(shapes, kind), float(shapes.work[shapes.kinds.index(kind)])
        on, off = np.zeros(ON), np.zeros(OFF)
        on[2 if deep else 3] = off[5 if deep else 6] = work
        found.append(Law(on, off, deep, step))
    return tuple(found)


def _deep(shapes: LayerShapes, kind: int) -> bool:
    return bool(shapes.depthwise[shapes.kinds.index(kind)])


def _law(into: Floats, out: Floats, times: Floats, deep: bool, step: int) -> Law:
    """One kind; where only one of its sides was seen, the other is as that."""
    whole = Law(np.zeros(ON), np.zeros(OFF), deep, step).whole(into, out)
    on = _least(plain(into, out)[whole], times[whole])
    off = _least(leftovers(into, out, step)[~whole], times[~whole])
    if not on.any():
        on = off[:4] + np.array([0.0, *off[4:7]])
    if not off.any():
        off = np.array([on[0], 0, 0, 0, *on[1:], 0, 0])
    return Law(on, off, deep, step)


def _least(table: Floats, times: Floats) -> Floats:
    """Non-negative coefficients of least relative error."""
    if not len(times):
        return np.zeros(table.shape[1])
    size = table.max(axis=0).clip(min=1e-12)
    found, _ = nnls(table / size / times[:, None], np.ones(len(times)))
    return np.asarray(found / size)


def corrected(
    shapes: LayerShapes, laws: tuple[Law, ...], widths: Ints, ratios: Floats, trust: float
) -> tuple[tuple[Law, ...], float]:
    """Every law scaled, on the stairs and off them; more for every output and layer; and the network's constant.

    Least squares of the relative error over whole networks; `trust` holds the scales near a common one. What the
    profiler itself took in every layer may be taken off.
    """
    into, out, alive = shapes.at(widths)
    kinds, count = np.array(shapes.kinds), len(laws)
    times, on = np.zeros_like(into), np.zeros_like(alive)
    for kind, law in enumerate(laws):
        members = kinds == kind
        times[:, members] = law.at(into[:, members], out[:, members])
        on[:, members] = law.whole(into[:, members], out[:, members])
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
    for kind, law in enumerate(laws):
        positions = float(shapes.positions[shapes.kinds.index(kind)])
        here = law.on * scales[kind] + np.array([by_layer, 0.0, by_output * positions, 0.0])
        there = law.off * scales[count + kind]
        there[0] += by_layer + by_off
        there[2] += (by_output + by_off_output) * positions
        made.append(Law(here, there, law.deep, law.step))
    return tuple(made), float(constant)
