"""The search for the plan that meets a goal, on a stand-in for the device whose times are a known law."""

import math

import numpy as np
import pytest

from chipdeploy.chipnet.costs import CostModel
from chipdeploy.chipnet.project import Projector
from chipdeploy.engines.target import Target
from chipdeploy.errors import RunError
from chipdeploy.graph.plan import group_widths
from chipdeploy.graph.proof import random_mask
from chipdeploy.latency.apart import time_apart
from chipdeploy.latency.environment import environment
from chipdeploy.latency.measure import Comparison
from chipdeploy.latency.meet import OPENINGS, meet
from chipdeploy.latency.predict import Sample, fit
from chipdeploy.latency.rig import Rig, Setting


class Device:
    """Stands in for a device: the time of a plan is its MACs and a tenth; `noise` is multiplied by, in turn.

    The dense network takes `dense_s` seconds.
    """

    def __init__(self, graph, factor=1.0, noise=(), dense_s=1.0):
        self.graph, self.factor, self.noise, self.dense_s = graph, factor, iter(noise), dense_s
        self.macs = CostModel.of(graph, "macs")
        self.asked = []

    def ratio(self, widths):
        return 0.1 + 0.9 * self.macs.count(widths) / self.macs.dense

    def engine(self, mask):
        return mask

    def forget(self):
        pass

    def time(self, engines, **_):
        (mask,) = engines
        ratio = self.factor * self.ratio(group_widths(self.graph, mask)) * next(self.noise, 1.0)
        self.asked.append((mask.tobytes(), ratio))
        dense, pruned = ((self.dense_s,),) * 4, ((ratio * self.dense_s,),) * 4
        return [Comparison(1, dense, pruned, dense, {})]

    def time_anew(self, mask, openings, **_):
        return [found for _ in range(openings) for found in self.time([mask])]


@pytest.fixture(scope="module")
def cost(tiny):
    _, graph = tiny
    device = Device(graph)
    widths = [group_widths(graph, random_mask(graph, seed, 0.2)) for seed in range(60)]
    return fit(graph, [Sample(w, device.ratio(w), {}) for w in widths], 1)


@pytest.fixture(scope="module")
def proposer(tiny, cost):
    """Plans in steps of `align` channels for one fixed ranking."""
    _, graph = tiny

    def make(align=1):
        projector = Projector(graph, cost, align)
        scores = np.random.default_rng(0).lognormal(0, 1, graph.channels)

        def propose(keep):
            return projector.project(scores, min(0.9999, max(keep, projector.smallest)))

        return propose

    return make


@pytest.mark.parametrize("goal", [0.35, 0.5, 0.7])
def test_fine_plans_hit_the_goal_from_below(tiny, cost, proposer, goal):
    device = Device(tiny[1])
    met = meet(device, cost, proposer(), goal)
    assert met.met and met.near
    assert 0.97 * goal <= met.comparison.ratio <= goal
    assert met.comparison.ratio == pytest.approx(device.ratio(group_widths(tiny[1], met.mask)))
    # What passes is measured twice: the second time is what is reported.
    assert [mask for mask, _ in device.asked].count(met.mask.tobytes()) == 1 + OPENINGS


def test_a_plan_at_the_lower_end_is_kept_only_while_no_nearer_one_is_found(tiny, cost, proposer):
    """The first plan takes 0.975 of the goal: the next process could measure less than the tolerance allows."""
    quiet = Device(tiny[1])
    first = quiet.ratio(group_widths(tiny[1], meet(quiet, cost, proposer(), 0.7).tries[0].mask))
    device = Device(tiny[1], factor=0.975 * 0.7 / first)
    met = meet(device, cost, proposer(), 0.7)
    assert met.tries[0].ratio == pytest.approx(0.975 * 0.7)
    assert 0.98 * 0.7 <= met.comparison.ratio <= 0.7


def test_of_coarse_plans_the_nearest_below_is_kept(tiny, cost):
    """Two plans only: 0.30 and 0.80 of the dense time; asked for is 0.6."""
    _, graph = tiny
    device = Device(graph)
    plans = []
    for target in (0.3, 0.8):
        masks = [random_mask(graph, seed, 0.2) for seed in range(200)]
        plans.append(min(masks, key=lambda mask: abs(device.ratio(group_widths(graph, mask)) - target)))
    low, high = plans
    told = []
    met = meet(device, cost, lambda keep: high if keep > 0.6 else low, 0.6, on_try=told.append)
    assert met.met and not met.near
    assert np.array_equal(met.mask, low)
    assert tuple(told) == met.tries


def test_out_of_reach_is_said_and_the_fastest_plan_kept(tiny, cost, proposer):
    device = Device(tiny[1], factor=3.0)
    met = meet(device, cost, proposer(), 0.2)
    assert not met.met and not met.near
    assert met.comparison.ratio > 0.2
    assert met.comparison.ratio == pytest.approx(min(ratio for _, ratio in device.asked))


@pytest.mark.parametrize("dense_s", [1.8, 1.0, 0.8])
def test_milliseconds_are_met_by_a_device_that_is_not_as_it_was(tiny, cost, proposer, dense_s):
    """When it was profiled the dense network took a second, so half of its time was asked for."""
    met = meet(Device(tiny[1], dense_s=dense_s), cost, proposer(), 0.5, ms=500.0)
    assert met.met and met.near
    assert 485 <= met.comparison.pruned_ms <= 500
    facts = met.to_dict()
    assert facts["goal_ms"] == 500 and facts["goal"] == pytest.approx(0.5 / dense_s)
    assert facts["ratio"] <= facts["goal"]


def test_milliseconds_out_of_reach_are_said(tiny, cost, proposer):
    met = meet(Device(tiny[1], dense_s=9.0), cost, proposer(), 0.5, ms=500.0)
    assert not met.met and met.comparison.ratio < 0.5 and met.comparison.pruned_ms > 500


def test_one_lucky_measurement_does_not_end_the_search(tiny, cost, proposer):
    """The first measurement of a device that takes 1.2 times as long happens to hit."""
    quiet = Device(tiny[1])
    first = meet(quiet, cost, proposer(), 0.5)
    device = Device(tiny[1], factor=1.2, noise=[0.49 / 1.2 / quiet.ratio(group_widths(tiny[1], first.tries[0].mask))])
    met = meet(device, cost, proposer(), 0.5)
    assert device.asked[0][1] == pytest.approx(0.49)
    assert device.asked[1][0] == device.asked[0][0]
    assert device.asked[1][1] > 0.5
    assert met.met
    assert 1.2 * device.ratio(group_widths(tiny[1], met.mask)) <= 0.5


def test_a_plan_that_did_not_hold_is_not_measured_until_it_does(tiny, cost):
    """The only plan there is: lucky in its first try, and it would be lucky again in another confirmation."""
    mask = random_mask(tiny[1], 0, 0.0)
    ratio = Device(tiny[1]).ratio(group_widths(tiny[1], mask))
    device = Device(tiny[1], noise=[0.97, *[1.0] * OPENINGS, *[0.97] * 20])
    met = meet(device, cost, lambda share: mask, 0.99 * ratio)
    assert len(device.asked) == 1 + OPENINGS
    assert not met.met
    assert met.comparison.ratio == pytest.approx(ratio)
    assert [one["ratio"] for one in met.to_dict()["confirmations"]] == [pytest.approx(ratio)]


def test_facts_are_plain_values(tiny, cost, proposer):
    facts = meet(Device(tiny[1]), cost, proposer(), 0.5).to_dict()
    assert facts["ratio"] == pytest.approx(facts["pruned_ms"] / facts["dense_ms"])
    assert facts["confirmation"]["pruned_s"]
    assert {"share", "predicted", "ratio", "interval"} == facts["tries"][0].keys()


def test_a_real_rig_times_engines_that_give_what_the_cut_network_gives(tiny):
    model, graph = tiny
    mask = random_mask(graph, 0, 0.0)
    with Rig(model, graph, Setting(Target.parse("ort-cpu"), 1, (3, 16, 16))) as rig:
        assert rig.quick
        engine = rig.engine(mask)
        assert not np.allclose(engine.run(rig.images), rig.dense.run(rig.images))
        assert np.array_equal(rig.control.run(rig.images), rig.dense.run(rig.images))
        found = rig.time([engine], seconds=0.1, blocks=4)[0]
        assert math.isfinite(found.ratio) and found.ratio > 0
        assert found.target == "ort-cpu"
        layers = rig.layers(rig.dense, runs=2)
        assert {layer.name for layer in graph.layers} <= layers.keys()
        rig.forget()
        engine.run(rig.images)


@pytest.mark.parametrize("name", ["ort-cpu", "torch-cpu-fp32"])
def test_every_opening_of_a_real_rig_is_a_measurement_of_its_own(tiny, name):
    model, graph = tiny
    mask = random_mask(graph, 0, 0.0)
    with Rig(model, graph, Setting(Target.parse(name), 2, (3, 16, 16))) as rig:
        found = rig.time_anew(mask, 2, seconds=0.1, blocks=4)
    assert len(found) == 2
    for one in found:
        assert (one.batch, one.target, len(one.dense_s)) == (2, rig.setting.target.name, len(one.pruned_s))
        assert one.environment["machine"] == environment()["machine"]
        assert one.environment["engine"]
        assert one.environment["own_process"] == (name == "ort-cpu")
    assert found[0].pruned_s != found[1].pruned_s


def test_what_no_other_process_can_open_is_timed_in_this_one(tiny, monkeypatch):
    """As on a GPU that is lent to one process: here no process can be started at all."""
    model, graph = tiny
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Rig(model, graph, Setting(Target.parse("ort-cpu"), 1, (3, 16, 16))) as rig:
        found = rig.time_anew(random_mask(graph, 0, 0.0), 2, seconds=0.1, blocks=4)
        assert {path.name for path in rig._folder.iterdir()} == {path.name for path in rig._kept}
    assert [one.environment["own_process"] for one in found] == [False, False]


def test_a_process_that_cannot_time_says_why_in_one_line(tmp_path):
    bad, images = tmp_path / "bad.onnx", np.zeros((1, 3, 8, 8), np.float32)
    bad.write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"timing ort-cpu in a process of its own failed: .*bad\.onnx") as caught:
        time_apart(
            Target.parse("ort-cpu"),
            tmp_path / "bad.onnx",
            tmp_path / "bad.onnx",
            images,
            threads=1,
            seconds=0.1,
            blocks=4,
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [1.5, 1 / 1.5])
def test_a_predictor_that_is_off_is_corrected(tiny, cost, proposer, factor):
    met = meet(Device(tiny[1], factor), cost, proposer(), 0.5)
    assert met.met and met.near
    assert 0.97 * 0.5 <= met.comparison.ratio <= 0.5
    assert len(met.tries) > 1


def test_after_a_confirmation_that_failed_every_try_covers_several_openings(tiny, cost, proposer):
    """Where engines lie moves the times of this network; one opening a try would chase that."""
    quiet = Device(tiny[1])
    first = meet(quiet, cost, proposer(), 0.5)
    device = Device(tiny[1], factor=1.2, noise=[0.49 / 1.2 / quiet.ratio(group_widths(tiny[1], first.tries[0].mask))])
    met = meet(device, cost, proposer(), 0.5)
    later = [mask for mask, _ in device.asked[1 + OPENINGS :]]
    assert len(met.tries) > 1
    assert later == [mask for mask in later[::OPENINGS] for _ in range(OPENINGS)]
