"""What whole networks say about single layers: a Gaussian process over the widths of every kind of layer.

The time of a network is the sum of its layers' times, so that the measured sums tell about the summands (kriging with
block data; Rasmussen & Williams, Gaussian Processes for Machine Learning, chapters 2 and 5). A layer deviates from
its law as layers of its kind with similar widths do, and most alike are those that stand on the same stairs. How alike,
how much and how noisy the times are is chosen by the likelihood of what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from chipdeploy.chipnet.costs import Floats
from chipdeploy.graph.labels import Ints
from chipdeploy.latency.laws import Law
from chipdeploy.latency.shapes import LayerShapes

REACHES = (0.4, 0.7, 1.2)
KINSHIPS = (0.5, 0.75, 0.9)
MARKS = ((1 / 4, 1), (1 / 2, 1, 2), (1 / 4, 1 / 2, 1), (1 / 4, 1 / 2, 1, 2))  # in steps of the stairs
AMPLITUDES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # of the deviations, relative to the law
NOISES = (0.0025, 0.005, 0.01, 0.02, 0.04)  # of a measured ratio
FLOOR = 0.02  # of the kind's largest time, added to what a deviation is relative to


@dataclass(frozen=True)
class Likeness:
    """How alike the times of two widths are.

    Args:
        reach: over which widths are alike, in logarithms.
        kinship: what is left of it where one width is a multiple of a mark and the other is not, for each mark.
        marks: steps that the device may have besides the stairs that were found, and these.
    """

    reach: float
    kinship: float
    marks: tuple[int, ...]
    step: int

    def of(self, one: Floats, other: Floats) -> Floats:
        """Correlations [N, M] of widths [N] and [M] of one side."""
        apart = np.log1p(one / self.step)[:, None] - np.log1p(other / self.step)
        strange = sum(((one % mark == 0)[:, None] != (other % mark == 0)).astype(np.float64) for mark in self.marks)
        return np.asarray(np.exp(-0.5 * (apart / self.reach) ** 2) * self.kinship**strange)


@dataclass(frozen=True, eq=False)
class Cells:
    """The widths at which layers of one kind were seen.

    Args:
        into, out: [U].
        counts: how many layers of every network have them, [N, U].
        size: what a deviation is relative to, [U].
        most: the largest time of the law among them.
    """

    into: Floats
    out: Floats
    counts: Floats
    size: Floats
    most: float

    def alike(self, likeness: Likeness, deep: bool) -> Floats:
        """Covariance of what the networks' layers of this kind take, [N, N], for an amplitude of 1."""
        alike = likeness.of(self.out, self.out)
        if not deep:
            alike = alike * likeness.of(self.into, self.into)
        weighted = self.counts * self.size
        return np.asarray(weighted @ alike @ weighted.T)


@dataclass(frozen=True, eq=False)
class Extra:
    """What a kind of layer takes besides its law: a sum over the cells that were seen."""

    cells: Cells
    weights: Floats  # [U]
    likeness: Likeness

    def over(self, into: Floats, out: Floats, law: Law) -> Floats:
        """At all pairs of widths, [I] and [J] ▶ [I, J]."""
        times = law.at(*np.meshgrid(into, out, indexing="ij"))
        rows = np.ones((len(into), len(self.weights))) if law.deep else self.likeness.of(into, self.cells.into)
        found = (rows * self.weights) @ self.likeness.of(out, self.cells.out).T
        return np.asarray(found * (times + FLOOR * self.cells.most))


@dataclass(frozen=True, eq=False)
class Kriged:
    """The extras of every kind, and logarithms of predicted over measured for each network by all the others, [N]."""

    extras: tuple[Extra, ...]
    errors: Floats


@dataclass(frozen=True, eq=False)
class _Judged:
    """A likeness with the amplitude and the noise that suit it best."""

    likelihood: float
    likeness: Likeness
    amplitude: float
    spectrum: Floats
    vectors: Floats


def krige(
    shapes: LayerShapes, laws: tuple[Law, ...], constant: float, widths: Ints, ratios: Floats, step: int
) -> Kriged:
    """Learn from whole networks how layers deviate from their laws.

    Args:
        widths: [N, G].
        ratios: times over the dense one's, [N].
        step: channels from stair to stair.
    """
    cells = _cells(shapes, laws, widths)
    said = constant + sum((one.counts @ law.at(one.into, one.out) for one, law in zip(cells, laws, strict=True)))
    errors = (ratios - said) / ratios
    choices: dict[str, Sequence[Any]] = {"marks": _marks(step), "kinship": KINSHIPS, "reach": REACHES}
    best = _judged(cells, laws, Likeness(REACHES[1], KINSHIPS[1], choices["marks"][0], step), errors, ratios)
    # One after the other, twice: all combinations cost more than twice as much and gain nothing that was seen.
    for name, values in [*choices.items()] * 2:
        others = [replace(best.likeness, **{name: value}) for value in values]
        tried = [_judged(cells, laws, one, errors, ratios) for one in others if one != best.likeness]
        best = max([best, *tried], key=lambda one: one.likelihood)
    likeness, amplitude, spectrum, vectors = best.likeness, best.amplitude, best.spectrum, best.vectors
    inverse = (vectors / spectrum) @ vectors.T
    pull = inverse @ errors
    extras = tuple(Extra(one, amplitude**2 * one.size * (one.counts.T @ (pull / ratios)), likeness) for one in cells)
    # Each network predicted by all others, without fitting again: section 5.4.2 there.
    alone = pull / np.diag(inverse)
    return Kriged(extras, np.log((1 - alone).clip(min=0.05)))


def _judged(cells: list[Cells], laws: tuple[Law, ...], likeness: Likeness, errors: Floats, ratios: Floats) -> _Judged:
    """The likelihood of relative errors [N]; one decomposition serves all amplitudes and noises."""
    covariance = sum(one.alike(likeness, law.deep) for one, law in zip(cells, laws, strict=True))
    values, vectors = np.linalg.eigh(covariance / np.outer(ratios, ratios))
    turned, found = vectors.T @ errors, []
    for amplitude, noise in product(AMPLITUDES, NOISES):
        spectrum = amplitude**2 * values.clip(min=0.0) + noise**2
        likelihood = -0.5 * float((turned**2 / spectrum).sum() + np.log(spectrum).sum())
        found.append(_Judged(likelihood, likeness, amplitude, spectrum, vectors))
    return max(found, key=lambda one: one.likelihood)


def _marks(step: int) -> list[tuple[int, ...]]:
    """Channels of every set of marks; a mark of one channel tells nothing apart."""
    found = (tuple(sorted({int(mark * step) for mark in marks if mark * step >= 2})) for marks in MARKS)
    return sorted(set(found))


def _cells(shapes: LayerShapes, laws: tuple[Law, ...], widths: Ints) -> list[Cells]:
    into, out, alive = shapes.at(widths)
    kinds, found = np.array(shapes.kinds), []
    for kind, law in enumerate(laws):
        members = kinds == kind
        lives = alive[:, members]
        pairs = np.stack([into[:, members][lives], out[:, members][lives]], axis=1)
        unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
        counts = np.zeros((len(widths), len(unique)))
        np.add.at(counts, (np.nonzero(lives)[0], inverse.ravel()), 1.0)
        times = law.at(unique[:, 0], unique[:, 1])
        most = float(times.max(initial=0.0))
        found.append(Cells(unique[:, 0], unique[:, 1], counts, times + FLOOR * most, most))
    return found
