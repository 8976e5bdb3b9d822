"""What an inference engine is, and the registry that opens one by its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chipdeploy.engines.target import Target
from chipdeploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import nn

Images = NDArray[np.float32]
MOST_THREADS = 1024


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer in an inference.

    Args:
        name: as the runtime calls it; after fusion a layer may be many of the network's.
        kind: the operator, or what the runtime calls it.
        ms: milliseconds an inference: the median of the runs where the runtime tells them apart, else their mean.
    """

    name: str
    kind: str
    ms: float


class Engine(Protocol):
    """A network that is loaded and ready to run."""

    @property
    def name(self) -> str:
        """The target it runs on, e.g. `ort-cpu`."""

    def run(self, images: Images) -> Images:
        """Images [N, C, H, W] float32 to logits [N, classes] float32, from host to host."""

    def stopwatch(self, images: Images) -> Callable[[], float] | None:
        """A call that runs one inference of images that lie on the device, and returns the device's own seconds.

        None where host and device are one: there the time of `run` is all there is.
        """

    def layer_times(self, images: Images, runs: int) -> list[LayerTime]:
        """Times of the layers, in the order in which they run, from a run of its own: profiling slows what it times.

        Raises:
            UsageError: the runtime does not tell.
        """

    def describe(self) -> dict[str, Any]:
        """What is needed to open the same engine again: runtime, version, threads, shapes. JSON values only."""


class Opener(Protocol):
    """Opens an engine for a target: from a file (an ONNX file, a TensorRT engine), or from a module for torch."""

    def __call__(self, artifact: Path | nn.Module, target: Target, /, **options: int) -> Engine: ...


_OPENERS: dict[str, Opener] = {}


def engine(runtime: str) -> Callable[[Opener], Opener]:
    """Decorator: an opener for all targets of a runtime."""

    def add(opener: Opener) -> Opener:
        if runtime in _OPENERS:
            raise ValueError(f"engine {runtime!r} is registered twice")
        _OPENERS[runtime] = opener
        return opener

    return add


def open_engine(name: str | Target, artifact: Path | nn.Module, **options: int) -> Engine:
    """Load a network for a target.

    Args:
        name: the target, e.g. `ort-cpu` or `trt-fp16`.
        artifact: an ONNX file for ort, an engine file for trt and rtx, a module for torch.
        options: the runtime's own. `threads` (on the CPU, default 1).

    Raises:
        UsageError: no such target, or an option that it does not have or outside its range.
        MissingError: the target's package or device is not on this machine.
        ExportError: the file is missing or not a network that the target can run.
    """
    # Late, because the modules that register themselves import this one.
    from chipdeploy.engines import eager, ort, trt  # noqa: F401

    target = Target.parse(name) if isinstance(name, str) else name
    return _OPENERS[target.runtime](artifact, target, **options)


def check_options(target: Target, options: dict[str, int], known: tuple[str, ...]) -> None:
    """Raises UsageError for an option that the target does not have."""
    if unknown := sorted(options.keys() - set(known)):
        raise UsageError(f"{target.name} has no option {', '.join(unknown)}; known: {', '.join(known) or 'none'}")


def check_threads(threads: int) -> None:
    """Raises UsageError for a number of threads that no machine has."""
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if threads > MOST_THREADS:
        raise UsageError(f"threads must be at most {MOST_THREADS}, got {threads}")


def check_images(what: str, images: Images, wanted: tuple[int | str, ...]) -> None:
    """Refuse images that a network does not take: a number is a fixed size, a string a free one.

    Raises:
        InputError: another type or shape.
    """
    if images.dtype != np.float32:
        raise InputError(f"{what} takes float32 images, got {images.dtype}; use images.astype('float32')")
    fits = len(images.shape) == len(wanted) and all(
        got == size if isinstance(size, int) else got >= 1 for got, size in zip(images.shape, wanted, strict=True)
    )
    if not fits:
        expected, got = (" x ".join(map(str, shape)) for shape in (wanted, images.shape))
        raise InputError(f"{what} takes images of {expected}, got {got}; resize the images")
