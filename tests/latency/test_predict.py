"""The predictor on a device whose law is known: stairs of 8 channels, a jump off them, and overheads."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from chipdeploy.chipnet.project import Projector
from chipdeploy.errors import RunError
from chipdeploy.latency.predict import LEAST, Sample, fit
from chipdeploy.latency.shapes import LayerShapes
from chipdeploy.latency.variants import Variants

STEP = 8
BY_LAYER, CONSTANT, OFF = 2e5, 1e6, 1.4  # in MACs: of every layer, of the network; and the jump off the stairs


class Device:
    """Takes filled-up MACs, 1.4 times as much off the stairs, and something for every layer and network."""

    def __init__(self, graph):
        self.shapes = LayerShapes.of(graph)
        self.dense = self.layers(graph.sizes)
        self.dense_time = self.time(graph.sizes)

    def layers(self, widths):
        into, out, alive = (table[0] for table in self.shapes.at(np.asarray(widths)[None]))
        full_in = np.where(self.shapes.depthwise, 1, np.ceil(into / STEP) * STEP)
        off = (out % STEP != 0) | (into % STEP != 0)
        times = self.shapes.work * full_in * np.ceil(out / STEP) * STEP * np.where(off, OFF, 1.0) + BY_LAYER
        return {n: float(t) for n, t, left in zip(self.shapes.names, times, alive, strict=True) if left}

    def time(self, widths):
        return sum(self.layers(widths).values()) + CONSTANT

    def sample(self, widths, told=True):
        whole = sum(self.dense.values())
        layers = {name: time / whole for name, time in self.layers(widths).items()} if told else {}
        return Sample(np.asarray(widths), self.time(widths) / self.dense_time, layers)


@pytest.fixture(scope="module")
def device(tiny):
    return Device(tiny[1])


@pytest.fixture(scope="module")
def plans(tiny):
    """64 to learn from, then 24 others."""
    found = Variants(tiny[1], STEP).take(88)
    return found[:64], found[64:]


@pytest.fixture(scope="module")
def cost(tiny, device, plans):
    return fit(tiny[1], [device.sample(widths) for widths in plans[0]], STEP)


def aligned(graph, count=60):
    """Random plans on the stairs; branches may be gone."""
    draw = np.random.default_rng(5)
    return np.array(
        [
            [draw.integers(0 if group.may_vanish else 1, group.size // STEP + 1) * STEP for group in graph.groups]
            for _ in range(count)
        ]
    )


def test_a_known_law_is_found_again_on_plans_it_has_not_seen(tiny, device, plans, cost):
    on = aligned(tiny[1])
    truth = np.array([device.sample(widths).ratio for widths in on])
    assert np.abs(cost.counts(on) / truth - 1).max() < 0.03
    truth = np.array([device.sample(widths).ratio for widths in plans[1]])
    guess = cost.counts(np.array(plans[1]))
    assert spearmanr(guess, truth).statistic > 0.99
    assert np.median(np.abs(guess / truth - 1)) < 0.03


def test_one_channel_less_than_a_stair_is_slower(tiny, device, cost):
    """What FLOPs do not see."""
    _, graph = tiny
    assert cost.count(graph.sizes) == pytest.approx(1, abs=0.03)
    assert 1.15 < cost.count(graph.sizes - 1) == pytest.approx(device.sample(graph.sizes - 1).ratio, rel=0.03)


def test_the_interval_covers_what_was_not_seen(device, plans, cost):
    inside = 0
    for widths in plans[1]:
        low, high = cost.interval(widths)
        assert low <= cost.count(widths) <= high
        inside += low <= device.sample(widths).ratio <= high
    assert inside >= 0.85 * len(plans[1])


def test_noise_widens_the_interval(tiny, device, plans, cost):
    draw = np.random.default_rng(0)
    samples = [device.sample(widths) for widths in plans[0]]
    noisy = [replace(sample, ratio=sample.ratio * draw.lognormal(0, 0.1)) for sample in samples]
    assert fit(tiny[1], noisy, STEP).spread > max(0.1, cost.spread)


def test_the_slope_never_says_that_a_wider_layer_is_faster(tiny, device, plans):
    """Even where noise says so."""
    _, graph = tiny
    draw = np.random.default_rng(0)
    samples = [device.sample(widths) for widths in plans[0]]
    noisy = [replace(one, ratio=one.ratio * draw.lognormal(0, 0.2)) for one in samples]
    soft = fit(graph, noisy, STEP).soft("cpu")
    for _ in range(20):
        widths = torch.tensor(graph.sizes * draw.uniform(0.2, 0.99, len(graph.groups)), dtype=torch.float32)
        widths.requires_grad_()
        soft(widths, torch.ones(len(graph.branches))).backward()
        assert (widths.grad >= 0).all()


def test_whole_networks_teach_what_no_law_says(tiny, device, plans):
    """One width that the device dislikes: no law has a term for it, and no layer's own time is known."""
    _, graph = tiny

    def disliked(widths):
        _, out, alive = device.shapes.at(np.asarray(widths)[None])
        return 1 + 0.5 * float(((out == 2 * STEP) & alive).sum()) / len(device.shapes.kinds)

    def sample(widths):
        one = device.sample(widths, told=False)
        return replace(one, ratio=one.ratio * disliked(widths))

    found = fit(graph, [sample(widths) for widths in plans[0]], STEP)
    truth = np.array([sample(widths).ratio for widths in plans[1]])
    guess = found.counts(np.array(plans[1]))
    assert np.median(np.abs(guess / truth - 1)) < 0.05


def test_times_under_names_that_nobody_knows_are_no_times_of_layers(tiny, device, plans):
    """A runtime may fuse all, or all layers of a kind, into kernels with names of its own."""
    _, graph = tiny
    kinds = dict(zip(device.shapes.names, device.shapes.kinds, strict=True))

    def hidden(widths, hides):
        one = device.sample(widths)
        layers = {name: time for name, time in one.layers.items() if not hides(kinds[name])}
        return replace(one, layers={"": sum(one.layers.values()) - sum(layers.values())} | layers)

    truth = np.array([device.sample(widths).ratio for widths in plans[1]])
    one = kinds["one.first.0"]
    for hides in (lambda kind: True, lambda kind: kind == one, lambda kind: kind != one):
        found = fit(graph, [hidden(widths, hides) for widths in plans[0]], STEP)
        guess = found.counts(np.array(plans[1]))
        assert np.median(np.abs(guess / truth - 1)) < 0.05


def test_a_change_of_a_group_changes_only_what_it_touches(tiny, cost):
    _, graph = tiny
    terms = np.arange(len(cost.shapes.names))
    draw = np.random.default_rng(1)
    for group in range(len(graph.groups)):
        touched = cost.touching((group,))
        others = np.setdiff1d(terms, touched)
        assert 0 < len(touched) < len(terms)
        base = graph.sizes.copy()
        rows = np.repeat(base[None], 5, axis=0)
        low = 0 if graph.groups[group].may_vanish else 1
        rows[:, group] = draw.integers(low, graph.sizes[group] + 1, 5)
        assert np.ptp(cost.partial(rows, others)) < 1e-12
        moved = cost.partial(rows, touched) - cost.partial(base[None], touched)
        assert moved == pytest.approx(cost.counts(rows) - cost.count(base))


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8])
def test_a_projection_never_exceeds_a_latency_budget(tiny, cost, keep):
    _, graph = tiny
    projector = Projector(graph, cost, STEP)
    for seed in range(3):
        widths = projector.widths(np.random.default_rng(seed).lognormal(0, 1, graph.channels), keep)
        assert 0.85 * keep < cost.count(widths) <= keep


def test_the_soft_latency_is_the_crisp_one_on_the_stairs_and_has_a_slope(tiny, cost):
    _, graph = tiny
    soft = cost.soft("cpu")
    for widths in aligned(graph, 10):
        alive = torch.tensor([float(widths[list(branch.groups)].any()) for branch in graph.branches])
        got = float(soft(torch.tensor(widths, dtype=torch.float32), alive))
        assert got == pytest.approx(cost.count(widths), rel=1e-4)
    widths = (torch.tensor(graph.sizes, dtype=torch.float32) - 3).requires_grad_()
    alive = torch.full((len(graph.branches),), 0.5, requires_grad=True)
    soft(widths, alive).backward()
    assert (widths.grad > 0).all()
    assert (alive.grad > 0).all()


@pytest.mark.parametrize("step", [32, 64])
def test_the_soft_latency_of_dense_groups_is_the_crisp_one_where_they_are_no_multiple_of_a_stair(tiny, device, step):
    _, graph = tiny
    cost = fit(graph, [device.sample(widths) for widths in Variants(graph, STEP).take(24)], step)
    soft = cost.soft("cpu")
    for gone in ([], [1], [3], [1, 3]):
        widths = np.array(graph.sizes)
        widths[gone] = 0
        alive = torch.tensor([float(widths[list(branch.groups)].any()) for branch in graph.branches])
        got = float(soft(torch.tensor(widths, dtype=torch.float32), alive))
        assert got == pytest.approx(cost.count(widths), rel=1e-2), gone


def test_a_scaled_predictor_scales_all(tiny, cost):
    _, graph = tiny
    twice, on = cost.scaled(2).scaled(1.5), aligned(graph, 5)
    assert twice.counts(on) == pytest.approx(3 * cost.counts(on))
    assert float(twice.soft("cpu")(torch.tensor(on[0]).float(), torch.ones(len(graph.branches)))) == pytest.approx(
        3 * float(cost.soft("cpu")(torch.tensor(on[0]).float(), torch.ones(len(graph.branches)))), rel=1e-5
    )


def test_it_knows_the_range_that_was_measured(tiny, device):
    _, graph = tiny
    samples = [sample for sample in map(device.sample, aligned(graph)) if sample.ratio > 0.5]
    cost = fit(graph, samples, STEP)
    assert cost.span == (min(s.ratio for s in samples), max(s.ratio for s in samples))
    assert cost.knows(samples[0].widths)
    smallest = np.where([group.may_vanish for group in graph.groups], 0, STEP)
    assert device.sample(smallest).ratio < 0.4
    assert not cost.knows(smallest)


def test_too_few_networks_are_refused_in_one_line(tiny, device, plans):
    _, graph = tiny
    samples = [device.sample(widths) for widths in plans[0][:LEAST]]
    assert fit(graph, samples, STEP).count(graph.sizes) > 0
    with pytest.raises(RunError, match=rf"{LEAST - 1} measured networks are too few .*{LEAST} or more") as caught:
        fit(graph, samples[1:], STEP)
    assert "\n" not in str(caught.value)


def test_without_times_of_layers_whole_networks_teach(tiny, device, plans):
    """As for torch, which tells none."""
    _, graph = tiny
    cost = fit(graph, [device.sample(widths, told=False) for widths in plans[0]], STEP)
    truth = np.array([device.sample(widths).ratio for widths in plans[1]])
    guess = cost.counts(np.array(plans[1]))
    assert spearmanr(guess, truth).statistic > 0.95
    assert np.median(np.abs(guess / truth - 1)) < 0.1


def test_the_same_samples_give_the_same_predictor(tiny, device, plans, cost):
    again = fit(tiny[1], [device.sample(widths) for widths in plans[0]], STEP)
    tables = [json.dumps([table.times.tolist() for table in one.tables]) for one in (cost, again)]
    assert tables[0] == tables[1]
    assert again.spread == cost.spread
