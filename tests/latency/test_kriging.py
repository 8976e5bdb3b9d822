"""What whole networks say about layers, against the plain formulas of Gaussian processes."""

import numpy as np
import pytest

from chipdeploy.latency import kriging
from chipdeploy.latency.kriging import FLOOR, Likeness, krige
from chipdeploy.latency.laws import corrected, laws_of_macs
from chipdeploy.latency.shapes import LayerShapes
from chipdeploy.latency.variants import Variants

STEP, REACH, KINSHIP, AMPLITUDE, NOISE = 8, 0.7, 0.75, 0.2, 0.01
MARKS = (4, 8, 16)


@pytest.fixture(autouse=True)
def one_choice(monkeypatch):
    """Nothing to choose: what is learnt follows from the formulas alone."""
    chosen = {"REACHES": (REACH,) * 2, "KINSHIPS": (KINSHIP,) * 2, "MARKS": ((1 / 2, 1, 2),)}
    for name, values in (chosen | {"AMPLITUDES": (AMPLITUDE,), "NOISES": (NOISE,)}).items():
        monkeypatch.setattr(kriging, name, values)


@pytest.fixture(scope="module")
def known(tiny):
    """Shapes, laws, the constant, 20 plans, and times that no law gives."""
    graph = tiny[1]
    shapes = LayerShapes.of(graph)
    widths = np.array(Variants(graph, STEP).take(20))
    draw = np.random.default_rng(0)
    ratios = np.array([row.sum() for row in widths]) / graph.sizes.sum() * draw.lognormal(0, 0.1, len(widths))
    laws, constant = corrected(shapes, laws_of_macs(shapes, STEP), widths, ratios, 0.1)
    return shapes, laws, constant, widths, ratios


def layers(shapes, widths):
    """(kind, input, output) of every living layer of one network."""
    into, out, alive = (table[0] for table in shapes.at(widths[None]))
    return [(shapes.kinds[n], into[n], out[n]) for n in range(len(alive)) if alive[n]]


def by_law(known, widths):
    shapes, laws, constant, *_ = known
    return constant + sum(float(laws[kind].at(np.array(i), np.array(o))) for kind, i, o in layers(shapes, widths))


def predicted(known, found, widths):
    shapes, laws, *_ = known
    extra = 0.0
    for kind, into, out in layers(shapes, widths):
        extra += float(found.extras[kind].over(np.array([into]), np.array([out]), laws[kind])[0, 0])
    return by_law(known, widths) + extra


def covariance(known, one, other):
    """Of two networks' times, pair of layers by pair of layers."""
    shapes, laws, _, widths, _ = known
    most = [0.0] * len(laws)
    for row in widths:
        for kind, i, o in layers(shapes, row):
            most[kind] = max(most[kind], float(laws[kind].at(np.array(i), np.array(o))))
    alike, total = Likeness(REACH, KINSHIP, MARKS, STEP), 0.0
    for kind, i, o in layers(shapes, one):
        for other_kind, i2, o2 in layers(shapes, other):
            if kind != other_kind:
                continue
            law = laws[kind]
            sizes = [float(law.at(np.array(a), np.array(b))) + FLOOR * most[kind] for a, b in ((i, o), (i2, o2))]
            value = alike.of(np.array([o]), np.array([o2]))[0, 0]
            if not law.deep:
                value *= alike.of(np.array([i]), np.array([i2]))[0, 0]
            total += sizes[0] * sizes[1] * value
    return AMPLITUDE**2 * total


def test_the_prediction_is_the_posterior_mean(tiny, known):
    *_, widths, ratios = known
    found = krige(*known, STEP)
    gram = np.array([[covariance(known, one, other) for other in widths] for one in widths])
    pull = np.linalg.solve(
        gram + np.diag((NOISE * ratios) ** 2), ratios - np.array([by_law(known, row) for row in widths])
    )
    for row in Variants(tiny[1], STEP, seed=1).take(4):
        mean = by_law(known, row) + sum(p * covariance(known, row, one) for p, one in zip(pull, widths, strict=True))
        assert predicted(known, found, row) == pytest.approx(mean, rel=1e-6)


def test_errors_are_those_of_predicting_each_by_all_others(known):
    shapes, laws, constant, widths, ratios = known
    whole, checked = krige(*known, STEP), 0
    for number in range(len(widths)):
        others = np.arange(len(widths)) != number
        rest = krige(shapes, laws, constant, widths[others], ratios[others], STEP)
        # What a deviation is relative to goes by the largest time that was seen: it must not change with one less.
        if all(one.cells.most == other.cells.most for one, other in zip(rest.extras, whole.extras, strict=True)):
            guess = predicted(known, rest, widths[number])
            assert whole.errors[number] == pytest.approx(np.log(guess / ratios[number]), abs=1e-6)
            checked += 1
    assert checked >= 3


def test_likeness_is_nearness_and_common_steps():
    alike = Likeness(REACH, KINSHIP, MARKS, STEP)
    base = np.array([16.0])
    near, far, stranger = (alike.of(base, np.array([width]))[0, 0] for width in (16.0, 32.0, 15.0))
    assert near == 1
    assert far < 1
    assert stranger < KINSHIP**3
    table = alike.of(np.arange(1.0, 65), np.arange(1.0, 65))
    assert table == pytest.approx(table.T)
    assert np.linalg.eigvalsh(table).min() > -1e-9
