"""The statistics of a comparison, by arithmetic: the clock is a counter that the two networks wind forward."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from chipdeploy.errors import NoisyError, RunError, UsageError
from chipdeploy.latency.environment import environment
from chipdeploy.latency.measure import Comparison, bootstrap_interval, compare, headline


class Clock:
    """Time passes only while a network runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def network(self, name, *seconds):
        """A network that takes these seconds in turn."""
        turn = iter(())

        def run():
            nonlocal turn
            step = next(turn, None)
            if step is None:
                turn = iter(seconds)
                step = next(turn)
            self.now += step
            self.calls.append(name)

        return run


def made(dense, pruned, control=None, batch=1, **kwargs):
    """A comparison from the milliseconds of each block, one inference a block."""
    control = dense if control is None else control
    blocks = [tuple((ms / 1e3,) for ms in times) for times in (dense, pruned, control)]
    return Comparison(batch, *blocks, environment=kwargs.pop("environment", {}), **kwargs)


def test_the_ratio_of_two_exact_networks():
    clock = Clock()
    comparison = compare(
        clock.network("d", 0.004), clock.network("p", 0.001), batch=8, min_blocks=4, seconds=0.01, clock=clock
    )
    assert comparison.ratio == pytest.approx(0.001 / 0.004)
    assert comparison.ratio_interval == pytest.approx((0.25, 0.25))
    assert comparison.control_ratio == pytest.approx(1)
    assert comparison.control_spread == pytest.approx(0)
    assert (comparison.dense_ms, comparison.pruned_ms) == pytest.approx((4, 1))
    assert comparison.faster and not comparison.noisy
    assert headline(comparison) == "pruned is 4.00x faster (0.25 of the dense time, 95 % 0.25-0.25, batch 8)"


def test_the_order_is_a_palindrome_in_every_block():
    clock = Clock()
    compare(clock.network("d", 0.3), clock.network("p", 0.3), batch=1, min_blocks=2, seconds=0.1, clock=clock)
    # Warm-up: at least three of each. Then A B C C B A twice, A and C dense.
    assert "".join(clock.calls) == "ddd" + "ppp" + "dpddpd" * 2


def test_a_fast_network_settles_untimed_in_every_position():
    clock = Clock()
    dense, pruned = clock.network("d", 0.001), clock.network("p", 0.002)
    comparison = compare(dense, pruned, batch=1, min_blocks=2, seconds=0.001, clock=clock)
    # One untimed each, then 2 · 1 ms and 1 · 2 ms.
    assert "".join(clock.calls).endswith(("ddd" + "pp" + "ddd" + "ddd" + "pp" + "ddd") * 2)
    assert [len(times) for times in (*comparison.dense_s, *comparison.pruned_s)] == [4, 4, 2, 2]


def test_the_cold_start_after_another_network_is_not_charged():
    """Two equal networks, each 1 ms slower whenever the other one ran before."""
    clock, last = Clock(), [""]

    def network(name):
        def run():
            clock.now += 0.003 if last[0] == name else 0.004
            last[0] = name

        return run

    comparison = compare(network("d"), network("p"), batch=1, min_blocks=4, seconds=0.01, clock=clock)
    assert comparison.ratios == pytest.approx(np.ones(4))
    assert comparison.control_ratios == pytest.approx(np.ones(4))


def test_a_second_dense_network_can_be_the_control():
    clock = Clock()
    networks = [clock.network(name, seconds) for name, seconds in (("d", 0.3), ("p", 0.15), ("c", 0.33))]
    comparison = compare(*networks[:2], control=networks[2], batch=1, min_blocks=2, seconds=0.1, clock=clock)
    assert "".join(clock.calls) == "ddd" + "ppp" + "ccc" + "dpccpd" + "cpddpc"
    assert comparison.control_ratio == pytest.approx(1.1)
    assert comparison.ratio == pytest.approx(0.5)


def test_a_drift_cancels():
    """Every inference takes one millisecond more than the one before: A B C C B A all have the same sum."""
    clock = Clock()
    state = {"ms": 100.0}

    def run():
        state["ms"] += 1
        clock.now += state["ms"] / 1e3

    comparison = compare(run, run, batch=1, min_blocks=2, seconds=0.01, clock=clock)
    assert comparison.ratios == pytest.approx(np.ones(2))
    assert comparison.control_ratios == pytest.approx(np.ones(2))


def test_a_and_c_take_turns():
    """A dense network whose first of four runs in a block is slow: A has it, then C, which took A's role."""
    clock = Clock()
    warm_up, block = [0.3] * 3, [0.6, 0.3, 0.3, 0.3]
    slow_first = clock.network("d", *warm_up, *block, *block)
    comparison = compare(slow_first, clock.network("p", 0.3), batch=1, min_blocks=2, seconds=0.01, clock=clock)
    assert comparison.control_ratios == pytest.approx([0.6 / 0.9, 0.9 / 0.6])


def test_a_fast_network_is_repeated_until_two_milliseconds_are_full():
    clock = Clock()
    comparison = compare(
        clock.network("d", 0.0005), clock.network("p", 0.003), batch=1, min_blocks=2, seconds=0.001, clock=clock
    )
    assert [len(times) for times in comparison.dense_s] == [8, 8]  # two positions of 2 ms / 0.5 ms
    assert [len(times) for times in comparison.control_s] == [8, 8]
    assert [len(times) for times in comparison.pruned_s] == [2, 2]
    assert comparison.dense_s[0] == pytest.approx([0.0005] * 8)


def test_blocks_fill_the_seconds_and_are_told():
    clock, told = Clock(), []
    comparison = compare(
        clock.network("d", 0.004),
        clock.network("p", 0.002),
        batch=1,
        min_blocks=3,
        seconds=0.2,
        clock=clock,
        on_block=lambda done, blocks: told.append((done, blocks)),
    )
    # A position is one untimed and one timed inference: 4 · 8 ms + 2 · 4 ms = 40 ms a block, 5 fill 0.2 s; made even.
    assert told == [(number, 6) for number in range(1, 7)]
    assert len(comparison.dense_s) == 6


def test_min_blocks_holds_however_slow():
    clock = Clock()
    slow = clock.network("d", 10)
    assert len(compare(slow, slow, batch=1, min_blocks=3, seconds=0.1, clock=clock).ratios) == 4


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"min_blocks": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_refuses_bad_settings(wrong):
    with pytest.raises(UsageError, match="must be positive"):
        compare(lambda: None, lambda: None, **{"batch": 1, **wrong})


def test_a_slower_network_is_not_faster():
    comparison = made([1.0] * 30, [1.25] * 30, batch=32)
    assert not comparison.faster
    assert headline(comparison) == "NOT faster: pruned takes 1.25 of the dense time (95 % 1.25-1.25, batch 32)"


def test_an_interval_with_one_in_it_is_not_faster():
    comparison = made([1.0] * 30, [0.9, 1.1, 0.9, 1.1, 0.9] * 6)
    assert comparison.ratio == pytest.approx(0.9)
    assert comparison.ratio_interval == pytest.approx((0.9, 1.1))
    assert headline(comparison) == "NOT faster: pruned takes 0.90 of the dense time (95 % 0.90-1.10, batch 1)"


def test_a_small_difference_is_not_rounded_away():
    assert "0.997 of the dense time, 95 % 0.997-0.997" in headline(made([1.0] * 4, [0.997] * 4))


def test_medians_shrug_off_an_outlier():
    comparison = made([2.0] * 9 + [90.0], [1.0] * 10)
    assert comparison.dense_ms == pytest.approx(2)
    assert comparison.ratio == pytest.approx(0.5)


def test_the_bootstrap_interval_of_known_data():
    assert bootstrap_interval(np.array([0.7]), seed=0) == (0.7, 0.7)
    values = np.arange(1.0, 102.0)
    low, high = bootstrap_interval(values, seed=3)
    # The median of n = 101 has its 95 % interval at ranks n / 2 ± 1.96 · √n / 2: 40.7 and 60.3.
    assert low == pytest.approx(41, abs=2)
    assert high == pytest.approx(61, abs=2)
    assert bootstrap_interval(values, seed=3) == (low, high)


def test_a_biased_control_is_noisy():
    comparison = made([1.0] * 10, [0.5] * 10, control=[1.2] * 10)
    assert comparison.noisy
    assert comparison.noise == "the dense network against itself took 1.20 of its time"
    assert headline(comparison).endswith("batch 1); noisy: the dense network against itself took 1.20 of its time")
    assert not made([1.0] * 10, [0.5] * 10, control=[1.04] * 10).noisy


def test_a_scattered_control_is_noisy():
    # Quartiles 0.8 and 1.2 around 1: 40 % apart.
    comparison = made([1.0] * 40, [0.5] * 40, control=[0.8, 0.8, 1.0, 1.2, 1.2] * 8)
    assert comparison.control_spread == pytest.approx(0.4)
    assert comparison.noise == "equal blocks of the dense network lie 40% apart"


def test_interruptions_that_fall_on_one_network_are_noisy():
    def times(blocks, slow):
        return tuple((0.001,) * 9 + (slow,) for _ in range(blocks))

    comparison = Comparison(1, times(20, 0.001), times(20, 0.006), times(20, 0.001), {})
    assert comparison.ratio == pytest.approx(1.5)
    assert comparison.noise == "a few slow inferences make the ratio: that of the medians is 1.00"
    assert not Comparison(1, times(20, 0.001), times(20, 0.0015), times(20, 0.001), {}).noisy


@pytest.mark.parametrize(
    ("samples", "known"),
    [(63, {"p50"}), (64, {"p50", "p90"}), (661, {"p50", "p90"}), (662, {"p50", "p90", "p99"})],
)
def test_no_percentile_below_its_floor(samples, known):
    assert made([1.0] * samples, [0.5] * samples).percentiles_ms("pruned").keys() == known


def test_percentiles_are_of_single_inferences():
    comparison = made([float(ms) for ms in range(1, 102)], [1.0] * 101)
    assert comparison.percentiles_ms("dense") == pytest.approx({"p50": 51, "p90": 91})


def test_goes_through_json_unchanged():
    clock = Clock()
    comparison = compare(
        clock.network("d", 0.00123456789), clock.network("p", 0.0007), batch=1, min_blocks=2, seconds=0.01, clock=clock
    )
    data = json.loads(json.dumps(comparison.to_dict()))
    assert data["schema"] == 1
    assert data["statistics"]["ratio"] == comparison.ratio
    assert Comparison.from_dict(data) == comparison


def test_written_statistics_are_not_believed():
    data = made([1.0] * 4, [2.0] * 4).to_dict()
    data["statistics"]["ratio"] = 0.1
    assert Comparison.from_dict(data).ratio == pytest.approx(2)


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 2},
        {"dense_s": None},
        {"dense_s": [["x"]]},
        {"dense_s": [[1.0]]},
        {"dense_s": [], "pruned_s": [], "control_s": []},
        {"pruned_s": [[0.0], [0.0]]},
        {"pruned_s": [[float("nan")], [1.0]]},
        {"environment": 3},
    ],
)
def test_refuses_damaged_data(damage):
    data = made([1.0] * 2, [2.0] * 2).to_dict() | damage
    with pytest.raises(RunError, match="bench again"):
        Comparison.from_dict(data)


def test_the_environment_names_the_machine_and_no_place():
    found = environment()
    assert found["machine"].startswith(found["cpu"])
    assert found["cores"] >= 1 and found["threads"] >= 1
    assert found["versions"]["numpy"] == np.__version__
    assert str(sys.prefix) not in json.dumps(found)


def test_a_comparison_holds_the_load_before_and_after():
    clock = Clock()
    network = clock.network("d", 0.1)
    found = compare(network, network, batch=1, min_blocks=2, seconds=0.1, clock=clock).environment
    assert {"load_before", "load_after"} <= found.keys()


def test_measures_without_torch():
    code = (
        "import sys; from chipdeploy.latency.environment import environment; "
        "assert 'torch' in environment()['versions']; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_device_clock_is_taken_at_its_word():
    def forbidden():
        raise AssertionError("the host's clock was asked")

    measured = compare(
        lambda: 4e-3,
        lambda: 1e-3,
        control=lambda: 4e-3,
        batch=1,
        min_blocks=4,
        seconds=0.01,
        clock=forbidden,
        timed=True,
    )
    assert measured.dense_ms == 4.0
    assert measured.ratio == 0.25
    assert measured.control_ratio == 1.0


def test_throttled_blocks_are_dropped_counted_and_measured_again():
    answers = iter([False, True, False, True, True, False, False])
    measured = compare(
        lambda: 1e-2, lambda: 1e-2, batch=1, min_blocks=4, seconds=1e-6, timed=True, throttled=lambda: next(answers)
    )
    assert len(measured.dense_s) == 4
    assert measured.environment["throttled_blocks"] == 3


def test_a_device_that_always_throttles_is_too_noisy():
    with pytest.raises(NoisyError, match="slowed itself down in 9 blocks"):
        compare(lambda: 1e-2, lambda: 1e-2, batch=1, min_blocks=4, seconds=1e-6, timed=True, throttled=lambda: True)


def test_where_it_was_measured_is_said_and_kept():
    comparison = replace(made([1.0] * 4, [0.5] * 4), target="trt-fp16", on_device=True)
    assert headline(comparison).endswith("batch 1, trt-fp16, on the device)")
    again = Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert (again.target, again.on_device) == ("trt-fp16", True)
