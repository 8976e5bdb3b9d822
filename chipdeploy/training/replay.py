"""Training steps launched at once: a small network on a GPU waits for its launches, not for its arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from chipdeploy.training.orthogonal import OrthogonalSGD

WARM = 3  # steps before the capture: in them cuDNN chooses its algorithms, and momenta get their memory

Step = Callable[[Tensor, Tensor], Tensor]  # images, labels ▶ loss; the weights are moved


class Replayed:
    """A training step that is captured as a CUDA graph, and replayed from then on.

    What the host decides from step to step is frozen by this, so a step is handed over only where it decides nothing.
    The learning rate becomes a tensor, which the graph reads. A step that cannot be captured goes on without.

    Args:
        step: what is done with a batch; it must not keep what it is given.
        optimizer: that the step uses; one of `replayable`.
        device: a GPU.
    """

    def __init__(self, step: Step, optimizer: Optimizer, device: torch.device) -> None:
        self._step, self._seen, self._capture = step, 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss, which holds until the next step."""
        self._seen += 1
        if self._capture and self._seen > WARM:
            self._capture = False
            self._try(images, labels)
        if self._graph is None or images.shape != self._images.shape:
            return self._apart(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss

    def _apart(self, images: Tensor, labels: Tensor) -> Tensor:
        """A step as it is, on a stream of its own: what has run on the default one cannot be captured."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(images, labels)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _try(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a loader's, may go on with their own work.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = self._step(self._images, self._labels)
        except RuntimeError:  # it waits for the device, or copies from memory that the device cannot read
            return
        self._graph = graph


def replayable(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether an optimizer's steps can be captured here."""
    return device.type == "cuda" and isinstance(optimizer, OrthogonalSGD)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all parameters one learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
