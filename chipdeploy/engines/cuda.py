"""What engines on a GPU share: device buffers, a stream of their own, captured graphs, and the device's own clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chipdeploy.errors import MissingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WARM_UP = 3  # runs before a capture: libraries allocate and choose kernels in them
# Small networks live in the L2 cache: inputs that stand in other places are read from memory, as in real use.
ROTATED = 4


def require_gpu(what: str) -> None:
    """Raises MissingError where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise MissingError(f"{what} runs on an NVIDIA GPU and none is here; see 'chipdeploy doctor'")


def this_gpu() -> tuple[str, str]:
    """Compute capability, e.g. `sm90`, and name of the current GPU; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return "", ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}", torch.cuda.get_device_name()


def current_gpu() -> int:
    """Number of the GPU that torch works on; 0 where torch sees none."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def use_gpu(number: int) -> None:
    """Make a GPU the one that torch, and what asks `current_gpu`, works on from here."""
    import torch

    torch.cuda.set_device(number)


class Replay:
    """Work that is enqueued on a stream of its own, replayed as one CUDA graph where that is wanted.

    Args:
        enqueue: enqueues the work; it reads `source` and leaves its result in tensors of its own.
        source: the device tensor that the work reads; its address must stay.
        graph: capture once, replay ever after.
    """

    def __init__(self, enqueue: Callable[[], Tensor], source: Tensor, *, graph: bool) -> None:
        import torch

        self.source = source
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._enqueue = enqueue
        self._graph: torch.cuda.CUDAGraph | None = None
        torch.cuda.synchronize()  # weights and buffers may still be on their way, on another stream
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self.result = enqueue()
        self.stream.synchronize()
        if graph:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self.stream):
                self.result = enqueue()

    def start(self) -> None:
        """Enqueue one run."""
        import torch

        if self._graph is not None:
            with torch.cuda.stream(self.stream):
                self._graph.replay()
        else:
            with torch.cuda.stream(self.stream):
                self.result = self._enqueue()

    def __call__(self, values: Tensor) -> Tensor:
        """From host to host: values are copied in, the result is copied out."""
        import torch

        with torch.cuda.stream(self.stream):
            self.source.copy_(values, non_blocking=True)
        self.start()
        with torch.cuda.stream(self.stream):
            result = self.result.float().cpu()
        self.stream.synchronize()
        return result

    def stopwatch(self, values: Tensor) -> Callable[[], float]:
        """A call that runs once and returns seconds between two events on the stream: no copy to or from the host.

        Where the device is idle by then, the launch of the first kernel is within.
        """
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        copies = [values.to(self.source) for _ in range(ROTATED)]
        count = 0

        def once() -> float:
            nonlocal count
            with torch.cuda.stream(self.stream):
                self.source.copy_(copies[count % ROTATED])
                begin.record(self.stream)
            self.start()
            with torch.cuda.stream(self.stream):
                end.record(self.stream)
            end.synchronize()
            count += 1
            return float(begin.elapsed_time(end)) / 1e3

        return once
