"""Open engines timed against each other, by the clock that the target has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from chipdeploy.engines.base import Engine, Images
from chipdeploy.engines.target import Target
from chipdeploy.latency.gpu import GpuWatch
from chipdeploy.latency.measure import Comparison, compare_many


def time_engines(
    target: Target,
    dense: Engine,
    control: Engine,
    pruned: Sequence[Engine],
    images: Images,
    *,
    seconds: float,
    blocks: int,
    on_block: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Every pruned engine against the dense one, in the same blocks; see `compare_many`."""
    watch = GpuWatch.open() if target.on_gpu else None
    engines = (dense, control, *pruned)
    watches = [engine.stopwatch(images) for engine in engines]
    timed = all(watches)
    calls: list[Any] = watches if timed else [partial(engine.run, images) for engine in engines]
    found = compare_many(
        calls[0],
        calls[2:],
        control=calls[1],
        batch=len(images),
        min_blocks=blocks,
        seconds=seconds,
        timed=timed,
        on_block=on_block,
        throttled=watch.throttled if watch else None,
    )
    return [replace(one, target=target.name, on_device=timed) for one in found]
