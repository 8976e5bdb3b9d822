"""What an inference engine is, and the registry that opens one by its target name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chipdeploy.errors import UsageError

Images = NDArray[np.float32]


class Engine(Protocol):
    """A network that is loaded and ready to run."""

    @property
    def name(self) -> str:
        """The target it runs on, e.g. `ort-cpu`."""

    def run(self, images: Images) -> Images:
        """Images [N, C, H, W] float32 to logits [N, classes] float32."""

    def describe(self) -> dict[str, object]:
        """What is needed to open the same engine again: runtime, version, threads, shapes. JSON values only."""


class Opener(Protocol):
    """Opens the engine that runs the file at `path`."""

    def __call__(self, path: Path, /, **options: int) -> Engine: ...


_ENGINES: dict[str, Opener] = {}


def engine(name: str) -> Callable[[Opener], Opener]:
    """Decorator: make an opener available as the target `name`."""

    def add(opener: Opener) -> Opener:
        if name in _ENGINES:
            raise ValueError(f"engine {name!r} is registered twice")
        _ENGINES[name] = opener
        return opener

    return add


def engine_names() -> list[str]:
    """Names of the targets that can be opened, sorted."""
    # Late, because the modules that register themselves import this one.
    from chipdeploy.engines import ort  # noqa: F401

    return sorted(_ENGINES)


def open_engine(name: str, path: Path, **options: int) -> Engine:
    """Load the network at `path` for the target `name`; `options` are the engine's own (`ort-cpu`: threads).

    Raises:
        UsageError: no such target, or an option outside its range.
        MissingError: the target's package or device is not on this machine.
        ExportError: the file is missing or not a network that the target can run.
    """
    names = engine_names()
    if name not in names:
        raise UsageError(f"unknown target {name!r}; known: {', '.join(names)}")
    return _ENGINES[name](path, **options)
