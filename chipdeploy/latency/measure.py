"""Two networks timed against each other: interleaved in one process, beside a control that should find nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chipdeploy.errors import RunError, UsageError
from chipdeploy.latency.blocks import Contest, Network, Times
from chipdeploy.latency.environment import environment, load_averages

SCHEMA = 1
RESAMPLES = 2000
P90_SAMPLES, P99_SAMPLES = 64, 662  # MLPerf's floors: below them a percentile is noise.
CONTROL_BIAS = 0.05
CONTROL_SPREAD = 0.25
OUTLIER_BIAS = 0.1  # quiet runs: below 0.003

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Raw times of two networks and of a control; every statistic is recomputed from them.

    Args:
        batch: images an inference.
        dense_s, pruned_s, control_s: seconds of every single timed inference, a tuple a block. The control is the
            dense network once more.
        environment: what `environment` said before, and the load after.
        seed: of the bootstrap.
        target: where both ran, e.g. `ort-cpu`; empty where nobody said.
        on_device: times by the device's own clock, data already there; otherwise from host to host.
    """

    batch: int
    dense_s: Times
    pruned_s: Times
    control_s: Times
    environment: Mapping[str, Any]
    seed: int = 0
    target: str = ""
    on_device: bool = False

    def __post_init__(self) -> None:
        blocks = {len(self.dense_s), len(self.pruned_s), len(self.control_s)}
        if len(blocks) != 1 or blocks == {0}:
            raise RunError(f"a comparison needs equally many blocks of each network, got {sorted(blocks)}; bench again")
        for times in (*self.dense_s, *self.pruned_s, *self.control_s):
            if not all(math.isfinite(t) and t >= 0 for t in times) or sum(times) <= 0:
                raise RunError("a comparison holds a block without a positive time; bench again")

    @property
    def threads(self) -> int:
        """Of the runtime on the CPU; 1 where nobody said, and on a GPU."""
        return int(self.environment.get("engine", {}).get("threads", 1))

    @property
    def where(self) -> str:
        """`batch 8, trt-fp16, on the device`: what a reader must know beside the numbers; threads if more than one."""
        many = f"{self.threads} threads" if self.threads > 1 else ""
        parts = (f"batch {self.batch}", self.target, many, "on the device" if self.on_device else "")
        return ", ".join(filter(None, parts))

    @cached_property
    def dense_ms(self) -> float:
        """Median milliseconds of a dense inference, of the whole batch."""
        return _median_ms(self.dense_s)

    @cached_property
    def pruned_ms(self) -> float:
        """Median milliseconds of a pruned inference, of the whole batch."""
        return _median_ms(self.pruned_s)

    @cached_property
    def ratios(self) -> NDArray[np.float64]:
        """Mean pruned time over mean dense time, of each block [blocks]."""
        return _ratios(self.pruned_s, self.dense_s)

    @cached_property
    def control_ratios(self) -> NDArray[np.float64]:
        """The same of the control over the dense network [blocks]: 1, but for noise."""
        return _ratios(self.control_s, self.dense_s)

    @cached_property
    def ratio(self) -> float:
        """Median over blocks of pruned / dense: below 1 is faster."""
        return float(np.median(self.ratios))

    @cached_property
    def ratio_interval(self) -> Interval:
        """95 % bootstrap interval of `ratio`."""
        return bootstrap_interval(self.ratios, self.seed)

    @cached_property
    def control_ratio(self) -> float:
        """Median over blocks of control / dense."""
        return float(np.median(self.control_ratios))

    @cached_property
    def control_interval(self) -> Interval:
        """95 % bootstrap interval of `control_ratio`."""
        return bootstrap_interval(self.control_ratios, self.seed)

    @cached_property
    def control_spread(self) -> float:
        """Interquartile range of the control's ratios over their median: how far apart two equal blocks are."""
        low, high = np.percentile(self.control_ratios, (25, 75))
        return float((high - low) / self.control_ratio)

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies below 1; anything less is no speedup."""
        return self.ratio_interval[1] < 1

    @property
    def noisy(self) -> bool:
        """Whether the control says that these times cannot be trusted."""
        return bool(self.noise)

    @property
    def noise(self) -> str:
        """Why the times cannot be trusted; empty where they can."""
        low, high = self.control_interval
        if low > 1 + CONTROL_BIAS or high < 1 - CONTROL_BIAS:
            return f"the dense network against itself took {self.control_ratio:.2f} of its time"
        if self.control_spread > CONTROL_SPREAD:
            return f"equal blocks of the dense network lie {self.control_spread:.0%} apart"
        # Interruptions that keep time with the blocks fall on one network, and the control does not see them.
        typical = self.pruned_ms / self.dense_ms if self.dense_ms else math.inf
        if abs(typical / self.ratio - 1) > OUTLIER_BIAS:
            return f"a few slow inferences make the ratio: that of the medians is {typical:.2f}"
        return ""

    def percentiles_ms(self, network: str) -> dict[str, float]:
        """p50, p90 and p99 of `dense`, `pruned` or `control`, in ms an inference; those with too few samples absent."""
        times = _flat({"dense": self.dense_s, "pruned": self.pruned_s, "control": self.control_s}[network])
        floors = {50: 1, 90: P90_SAMPLES, 99: P99_SAMPLES}
        return {f"p{p}": float(np.percentile(times, p)) * 1e3 for p, floor in floors.items() if times.size >= floor}

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the raw times, and the statistics for whoever reads the file without this package."""
        return {
            "schema": SCHEMA,
            "batch": self.batch,
            "seed": self.seed,
            "target": self.target,
            "on_device": self.on_device,
            "statistics": self._statistics(),
            "environment": dict(self.environment),
            "dense_s": [list(times) for times in self.dense_s],
            "pruned_s": [list(times) for times in self.pruned_s],
            "control_s": [list(times) for times in self.control_s],
        }

    def _statistics(self) -> dict[str, Any]:
        return {
            "blocks": len(self.dense_s),
            "dense_ms": self.dense_ms,
            "pruned_ms": self.pruned_ms,
            "ratio": self.ratio,
            "ratio_interval": list(self.ratio_interval),
            "control_ratio": self.control_ratio,
            "control_interval": list(self.control_interval),
            "control_spread": self.control_spread,
            "faster": self.faster,
            "noisy": self.noisy,
            "noise": self.noise,
            "dense_percentiles_ms": self.percentiles_ms("dense"),
            "pruned_percentiles_ms": self.percentiles_ms("pruned"),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Read what `to_dict` wrote; the statistics in it are ignored.

        Raises:
            RunError: another schema, or values that are missing or of the wrong kind.
        """
        if data.get("schema") != SCHEMA:
            raise RunError(f"a comparison of schema {data.get('schema')!r}, expected {SCHEMA}; bench again")
        try:
            return cls(
                batch=int(data["batch"]),
                dense_s=_times(data["dense_s"]),
                pruned_s=_times(data["pruned_s"]),
                control_s=_times(data["control_s"]),
                environment=dict(data["environment"]),
                seed=int(data["seed"]),
                target=str(data.get("target", "")),
                on_device=bool(data.get("on_device", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"a damaged comparison ({type(error).__name__}: {error}); bench again") from error


def compare(
    dense: Network,
    pruned: Network,
    *,
    batch: int,
    min_blocks: int = 30,
    seconds: float = 5.0,
    seed: int = 0,
    on_block: Callable[[int, int], None] | None = None,
    control: Network | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timed: bool = False,
    throttled: Callable[[], bool] | None = None,
) -> Comparison:
    """Time one inference of `pruned` against one of `dense`, and `dense` against itself.

    A block is A B C C B A, where B is the pruned network, A the dense one and C the control: a drift of the machine
    falls on all three alike. A and C swap places from block to block. Each position repeats its network until about
    2 ms are full, after one inference that is not timed: B always follows another network, but A and C often follow
    themselves, and the caches that they find warm would make B look slower.

    Args:
        dense, pruned: run one inference of `batch` images and wait until it is done.
        min_blocks: at least so many blocks (rounded up to even), however long they take.
        seconds: about how long to measure, beyond the warm-up.
        on_block: told (blocks done, blocks in all) after each block.
        control: the dense network loaded a second time, so that the control also finds what the place of a network in
            memory does; by default `dense` itself.
        clock: seconds, from any start.
        timed: the networks return the seconds that they took by their device's own clock, and `clock` is not asked.
        throttled: asked after every block whether the device slowed itself down in it; such blocks are dropped, counted
            in the environment, and measured again.

    Raises:
        UsageError: `batch` or `min_blocks` below 1, or `seconds` that are not positive.
        NoisyError: most blocks were throttled.
    """
    if batch < 1 or min_blocks < 1 or not 0 < seconds < math.inf:
        raise UsageError(
            f"batch, min_blocks and seconds must be positive, got {batch}, {min_blocks} and {seconds}; try 1, 30 and 5"
        )
    return compare_many(
        dense,
        [pruned],
        batch=batch,
        min_blocks=min_blocks,
        seconds=seconds,
        seed=seed,
        on_block=on_block,
        control=control,
        clock=clock,
        timed=timed,
        throttled=throttled,
    )[0]


def compare_many(
    dense: Network,
    pruned: Sequence[Network],
    *,
    batch: int,
    min_blocks: int = 30,
    seconds: float = 5.0,
    seed: int = 0,
    on_block: Callable[[int, int], None] | None = None,
    control: Network | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timed: bool = False,
    throttled: Callable[[], bool] | None = None,
) -> list[Comparison]:
    """Time several networks in the same blocks A B1 B2 ... C C ... B2 B1 A; see `compare`.

    One comparison a network, all with the same times of the dense one and its control: so most of the time goes to
    what is asked about. `seconds` are for all of them together. The Bs change places from block to block.
    """
    if batch < 1 or min_blocks < 1 or not 0 < seconds < math.inf or not pruned:
        raise UsageError(
            f"batch, min_blocks and seconds must be positive, got {batch}, {min_blocks} and {seconds}; try 1, 30 and 5"
        )
    before = environment()
    names = [f"pruned {number}" for number in range(len(pruned))]
    contest = Contest(
        {"dense": dense, **dict(zip(names, pruned, strict=True)), "control": control or dense}, clock=clock, timed=timed
    )

    def order(number: int) -> list[str]:
        turned = names[number % len(names) :] + names[: number % len(names)]
        half = ["dense", *turned, "control"]
        return half[::-1] if number % 2 else half

    times, dropped = contest.run(contest.blocks_in(seconds, min_blocks), order, on_block=on_block, throttled=throttled)
    facts = {**before, "load_after": load_averages(), "throttled_blocks": dropped}
    first = Comparison(batch, times["dense"], times[names[0]], times["control"], facts, seed)
    return [first, *(replace(first, pruned_s=times[name]) for name in names[1:])]


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Comparisons of the same networks as one: the blocks of all, with the environment of the last."""
    return replace(
        parts[-1],
        dense_s=tuple(block for part in parts for block in part.dense_s),
        pruned_s=tuple(block for part in parts for block in part.pruned_s),
        control_s=tuple(block for part in parts for block in part.control_s),
    )


def headline(comparison: Comparison) -> str:
    """The first line of any report: how much faster, or plainly that it is not."""
    ratio, low, high = ratio_texts(comparison)
    range_ = f"95 % {low}-{high}, {comparison.where}"
    if comparison.faster:
        line = f"pruned is {1 / comparison.ratio:.2f}x faster ({ratio} of the dense time, {range_})"
    else:
        line = f"NOT faster: pruned takes {ratio} of the dense time ({range_})"
    return f"{line}; noisy: {comparison.noise}" if comparison.noisy else line


def ratio_texts(comparison: Comparison) -> tuple[str, str, str]:
    """The ratio and both ends of its interval, in two digits unless these would round a real difference to 1.00."""
    values = (comparison.ratio, *comparison.ratio_interval)
    digits = 2 if all(abs(value - 1) >= 0.005 for value in values) else 3
    ratio, low, high = (f"{value:.{digits}f}" for value in values)
    return ratio, low, high


def bootstrap_interval(values: NDArray[np.float64], seed: int) -> Interval:
    """95 % percentile-bootstrap interval of the median of `values` [n]: n drawn with replacement, 2000 times."""
    draws = np.random.default_rng(seed).integers(0, values.size, (RESAMPLES, values.size))
    low, high = np.percentile(np.median(values[draws], axis=1), (2.5, 97.5))
    return float(low), float(high)


def _ratios(numerator: Times, denominator: Times) -> NDArray[np.float64]:
    return np.array([np.mean(a) / np.mean(b) for a, b in zip(numerator, denominator, strict=True)])


def _flat(times: Times) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(block, dtype=np.float64) for block in times])


def _median_ms(times: Times) -> float:
    return float(np.median(_flat(times))) * 1e3


def _times(data: Sequence[Sequence[float]]) -> Times:
    return tuple(tuple(float(t) for t in block) for block in data)
