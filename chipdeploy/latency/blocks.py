"""Blocks: networks that take turns in one process, there and back, so that drifts fall on all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from chipdeploy.errors import NoisyError

POSITION_S = 2e-3  # A position lasts at least this long, so that a timer tick is a small part of it.
WARM_UP_S = 0.2
# The first inference after another network refills the caches: 40 us on a network of 0.6 ms, nothing on a slow one.
SETTLE_BELOW_S = 0.02
MAX_RUNS = 200  # Inferences in a position at most ...
MAX_BLOCKS = 2000  # ... and blocks: the raw times of a network that does almost nothing must still fit a file.
MAX_DROPPED = 2  # times as many throttled blocks as wanted ones: after that the device will not calm down

Network = Callable[[], object]  # runs one inference and waits until it is done
Times = tuple[tuple[float, ...], ...]  # seconds of every single timed inference, a tuple a block


class Contest:
    """Networks, warmed up, each with its position in a block.

    A position repeats its network until about 2 ms are full, after one inference that is not timed: the networks before
    it have filled the caches with their own.

    Args:
        networks: by name.
        clock: seconds, from any start.
        timed: the networks return the seconds that they took by their device's own clock; `clock` is not asked.
    """

    def __init__(
        self, networks: Mapping[str, Network], *, clock: Callable[[], float] = time.perf_counter, timed: bool = False
    ) -> None:
        self._once = _own_seconds if timed else partial(_wall_seconds, clock)
        self._networks = dict(networks)
        warm: dict[int, float] = {}
        for network in self._networks.values():
            if id(network) not in warm:  # a control may be the dense network itself
                warm[id(network)] = self._warm_up(network)
        seconds = {name: warm[id(network)] for name, network in self._networks.items()}
        self._settle = min(seconds.values()) < SETTLE_BELOW_S
        self._runs = {name: _runs(once) for name, once in seconds.items()}
        self.block_s = 2 * sum((self._runs[name] + self._settle) * once for name, once in seconds.items())

    def blocks_in(self, seconds: float, least: int) -> int:
        """Blocks that fill `seconds`, `least` or more; even, so that what is mirrored in every second one balances."""
        wanted = max(least, min(MAX_BLOCKS, math.ceil(seconds / max(self.block_s, 1e-9))))
        return wanted + wanted % 2

    def run(
        self,
        blocks: int,
        order: Callable[[int], Sequence[str]],
        *,
        on_block: Callable[[int, int], None] | None = None,
        throttled: Callable[[], bool] | None = None,
    ) -> tuple[dict[str, Times], int]:
        """Seconds of every timed inference, by network and block, and how many blocks were dropped.

        Args:
            order: the names in the first half of a block, by its number; the second half runs backwards.
            on_block: told (blocks done, blocks in all) after each block.
            throttled: asked after every block whether the device slowed itself down in it; such blocks are dropped.

        Raises:
            NoisyError: most blocks were throttled.
        """
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in self._networks}
        done = dropped = 0
        while done < blocks:
            half = order(done)
            with _no_garbage_collection():
                there = {name: self._position(name) for name in half}
                back = {name: self._position(name) for name in reversed(half)}
            if throttled and throttled():
                dropped += 1
                if dropped > MAX_DROPPED * blocks:
                    raise NoisyError(
                        f"the device slowed itself down in {dropped} blocks; cool it, or lift its power limit"
                    )
                continue
            for name in half:
                times[name].append(there[name] + back[name])
            done += 1
            if on_block:
                on_block(done, blocks)
        return {name: tuple(rows) for name, rows in times.items()}, dropped

    def _position(self, name: str) -> tuple[float, ...]:
        """Seconds of each timed inference, to the nanosecond, after an untimed one if the caches are to settle."""
        network = self._networks[name]
        if self._settle:
            network()
        return tuple(round(self._once(network), 9) for _ in range(self._runs[name]))

    def _warm_up(self, network: Network) -> float:
        """Run until caches and clocks have settled; returns the median seconds of an inference."""
        times: list[float] = []
        while len(times) < 3 or (sum(times) < WARM_UP_S and len(times) < 1000):
            times.append(self._once(network))
        return float(np.median(times))


def _wall_seconds(clock: Callable[[], float], run: Network) -> float:
    before = clock()
    run()
    return clock() - before


def _own_seconds(run: Network) -> float:
    seconds = run()
    assert isinstance(seconds, float)
    return seconds


def _runs(seconds_once: float) -> int:
    """Inferences in a position."""
    return min(MAX_RUNS, math.ceil(POSITION_S / max(seconds_once, 1e-9)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside one position would be charged to the network that happened to run."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
