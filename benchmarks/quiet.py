"""A core of its own for what is timed while other jobs train: see `--quiet` of side_by_side.py."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CORES = "QUIET_CORES"  # environment variable: numbers, by commas


@contextmanager
def quiet_core() -> Iterator[None]:
    """Move this thread to a core that nobody else has; waits for one. Does nothing where none is set aside."""
    cores = [int(number) for number in os.environ.get(CORES, "").split(",") if number]
    before = os.sched_getaffinity(0)
    if not cores or (len(before) == 1 and before <= set(cores)):  # none, or it is on one already
        yield
        return
    with _taken(cores) as core:
        os.sched_setaffinity(0, {core})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


@contextmanager
def _taken(cores: list[int]) -> Iterator[int]:
    """The number of a core, locked for as long as the context lives."""
    while True:
        for core in cores:
            with Path(tempfile.gettempdir(), f"quiet-core-{core}").open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield core
                return
        time.sleep(0.05)


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run on a quiet core."""

    def apart(*arguments: Any, **named: Any) -> Any:
        with quiet_core():
            return function(*arguments, **named)

    return apart
